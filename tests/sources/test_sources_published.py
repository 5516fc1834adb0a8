"""Folders that a source writes for itself: whole or not there, whatever happens to who writes them."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_support import counts, write

from scshards.base.errors import SourceError, StorageError
from scshards.base.files import published
from scshards.sources import matrix as sources_matrix
from scshards.sources.open import open_source


def rows(source: Any) -> np.ndarray:
    out = np.zeros((source.n_rows, source.n_columns))
    for block in source.blocks():
        of_value = np.repeat(np.arange(len(block.indptr) - 1), np.diff(block.indptr))
        np.add.at(out, (block.first_row + of_value, block.indices), block.data)
    return out


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "f"
    with published(folder) as part:
        (part / "a").write_text("a")
        assert not folder.exists()
    assert (folder / "a").read_text() == "a"
    assert [p.name for p in folder.parent.iterdir()] == ["f"]


@pytest.mark.parametrize("error", [SourceError("x"), KeyboardInterrupt()])
def test_nothing_is_left_of_one_that_failed(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), published(tmp_path / "f") as part:
        (part / "a").write_text("a")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="temporary files"), published(tmp_path / "file" / "f"):
        raise AssertionError
    with pytest.raises(StorageError, match="No space"), published(tmp_path / "f"):
        raise OSError(28, "No space left on device")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from scshards.base.files import published\n"
        "with published(pathlib.Path(sys.argv[1])) as part:\n"
        "    (part / 'a').write_text('half'); print('there', flush=True); time.sleep(600)\n"
    )
    folder = tmp_path / "f"
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"there\n"
        # While it lives, its work is left alone; whoever is faster is seen.
        with published(folder) as part:
            (part / "a").write_text("whole")
            assert len(list(tmp_path.glob("f.part-*"))) == 2
        assert len(list(tmp_path.glob("f.part-*"))) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    with published(folder) as part:
        (part / "a").write_text("late")
    assert (folder / "a").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_transposition_that_broke_off_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = counts(60, 20)
    path = write(tmp_path / "a.h5ad", x, form="csc")
    real = sources_matrix.np.save

    def broken(file: Path, array: Any) -> None:
        if file.name == "indptr.npy":
            raise KeyboardInterrupt
        real(file, array)

    folder = tmp_path / "scratch" / "transposed"
    monkeypatch.setattr(sources_matrix.np, "save", broken)
    with pytest.raises(KeyboardInterrupt), open_source(path, scratch=folder) as source:
        source.transpose()
    assert not folder.exists()
    monkeypatch.setattr(sources_matrix.np, "save", real)
    with open_source(path, scratch=folder) as source:
        assert (rows(source) == x).all()


def test_many_at_once_see_all_or_nothing(tmp_path: Path) -> None:
    x = counts(300, 40)
    path = write(tmp_path / "a.h5ad", x, form="csc")
    for trial in range(5):
        folder, wrong = tmp_path / f"{trial}" / "transposed", []

        def look(folder: Path = folder, wrong: list[Any] = wrong) -> None:
            with open_source(path, scratch=folder) as source:
                wrong.extend([] if (rows(source) == x).all() else ["rows"])

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and [p.name for p in folder.parent.iterdir()] == ["transposed"]


def _transpose(path: Path, folder: Path) -> None:
    with open_source(path, scratch=folder) as source:
        source.transpose()


def test_two_processes_at_once(tmp_path: Path) -> None:
    x = counts(200, 30)
    path = write(tmp_path / "a.h5ad", x, form="csc")
    folder = tmp_path / "s" / "transposed"
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_transpose, args=(path, folder)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with open_source(path, scratch=folder) as source:
        assert (rows(source) == x).all()
    assert [p.name for p in folder.parent.iterdir()] == ["transposed"]

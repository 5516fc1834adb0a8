"""Folders that a source writes for itself: whole or not there, whatever happens to who writes them."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_support import counts, write

from scshards.base.errors import SourceError, StorageError
from scshards.base.files import Once
from scshards.sources import matrix as sources_matrix
from scshards.sources.open import open_source


def rows(source: Any) -> np.ndarray:
    out = np.zeros((source.n_rows, source.n_columns))
    for block in source.blocks():
        of_value = np.repeat(np.arange(len(block.indptr) - 1), np.diff(block.indptr))
        np.add.at(out, (block.first_row + of_value, block.indices), block.data)
    return out


def fill(text: str) -> Callable[[Path], object]:
    return lambda part: (part / "a").write_text(text)


def test_it_appears_at_the_end_and_is_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "f"

    def write_a(part: Path) -> None:
        fill("a")(part)
        assert not folder.exists()

    assert Once(folder).made(write_a) == folder
    assert Once(folder).made(fill("b")) == folder
    assert (folder / "a").read_text() == "a"


@pytest.mark.parametrize("error", [SourceError("x"), KeyboardInterrupt()])
def test_one_that_failed_is_made_again(tmp_path: Path, error: BaseException) -> None:
    def fail(part: Path) -> None:
        (part / "b").write_text("half")
        raise error

    with pytest.raises(type(error)):
        Once(tmp_path / "f").made(fail)
    assert not (tmp_path / "f").exists()
    assert [p.name for p in Once(tmp_path / "f").made(fill("a")).iterdir()] == ["a"]


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    def full(part: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="temporary files"):
        Once(tmp_path / "file" / "f").made(fill("a"))
    with pytest.raises(StorageError, match="No space"):
        Once(tmp_path / "f").made(full)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from scshards.base.files import Once\n"
        "def write(part):\n"
        "    (part / 'b').write_text('half'); print('there', flush=True); time.sleep(600)\n"
        "Once(pathlib.Path(sys.argv[1])).made(write)\n"
    )
    folder = tmp_path / "f"
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout, ThreadPoolExecutor(1) as pool:
        assert process.stdout.readline() == b"there\n"
        waiting = pool.submit(Once(folder).made, fill("whole"))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        waiting.result(timeout=600)
    assert [p.name for p in folder.iterdir()] == ["a"]
    assert (folder / "a").read_text() == "whole"


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
        assert not wrong and not list(folder.parent.glob("*.part"))


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
    assert not list(folder.parent.glob("*.part"))

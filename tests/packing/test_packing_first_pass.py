"""What fails while inputs are surveyed: all of it is told at once, and what was done is kept."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse as sp
from pack_support import adata, counts, quiet_pack, read_back, tree_sums, vocab_of, write

from scshards import PackOptions, ShardSet, verify
from scshards.base.errors import ConfigError, SourceError, StorageError
from scshards.base.storage import Storage
from scshards.packing import phases, refusals
from scshards.packing.pack import append, pack, pack_share

GENES, N, BAD = 6, 12, (3, 7, 11)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve inputs; the genes of three are not in the vocabulary."""
    for i in range(N):
        genes = [f"x{j}" if i in BAD else f"G{j:03d}" for j in range(GENES)]
        write(tmp_path / f"{i:02d}.h5ad", counts(10, GENES, seed=i), genes=genes)
    return tmp_path


def inputs(folder: Path) -> list[Path]:
    return [folder / f"{i:02d}.h5ad" for i in range(N)]


@pytest.fixture
def surveyed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ordinals of the inputs that are surveyed, in order."""
    real, seen = refusals.perform, []

    def perform(work: Any) -> Any:
        seen.append(work.task.ordinal)
        return real(work)

    monkeypatch.setattr(refusals, "perform", perform)
    return seen


def test_all_refusals_come_together_and_surveys_are_kept(folder: Path, surveyed: list[int]) -> None:
    with pytest.raises(SourceError) as caught:
        quiet_pack(inputs(folder), folder / "out", vocab_of(GENES))
    text = str(caught.value)
    assert "3 of 12 inputs can't be packed" in text and "--on-bad-input skip" in text
    assert all(str(folder / f"{i:02d}.h5ad") in text for i in BAD)
    assert "run the same command to go on" in text
    assert sorted(surveyed) == list(range(N))
    for i in BAD:
        write(folder / f"{i:02d}.h5ad", counts(10, GENES, seed=i))
    # One that was good is another now: its survey is of no use.
    write(folder / "05.h5ad", counts(17, GENES, seed=5))
    surveyed.clear()
    quiet_pack(inputs(folder), folder / "out", vocab_of(GENES))
    assert sorted(surveyed) == [3, 5, 7, 11]
    quiet_pack(inputs(folder), folder / "anew", vocab_of(GENES))
    assert tree_sums(folder / "out") == tree_sums(folder / "anew")


def test_few_inputs_that_are_refused_leave_nothing(folder: Path) -> None:
    with pytest.raises(SourceError, match="in the vocabulary"):
        quiet_pack(inputs(folder)[2:4], folder / "out", vocab_of(GENES))
    assert not (folder / "out").exists()


def test_the_same_refusal_of_all_is_told_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        quiet_pack(
            inputs(folder), folder / "out", vocab_of(GENES), where="nothing > 1", min_match=0
        )
    assert str(caught.value).count("no column 'nothing'") == 1
    assert not (folder / "out").exists()


def test_bad_inputs_are_left_out_when_that_is_asked_for(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = PackOptions(on_bad_input="skip", workers=1, obs=(), cells_per_shard=20)
    manifest = pack(inputs(folder), folder / "out", vocab_of(GENES), options)
    told = caplog.text
    good = [i for i in range(N) if i not in BAD]
    for i, source in enumerate(manifest.sources):
        assert bool(source.skipped) == (i in BAD) and source.kept == (0 if i in BAD else 10)
        assert (f"left out: {source.name}" in told) == (i in BAD)
    assert "in the vocabulary" in manifest.sources[3].skipped
    again = ShardSet(folder / "out").manifest
    assert again.sources == manifest.sources
    assert verify(folder / "out", progress=False).ok
    assert {int(key[:6]) for key in read_back(folder / "out")} == set(good)
    # They are still bad when more is added, which is refused unless told otherwise.
    write(folder / "more.h5ad", counts(4, GENES), genes=[f"y{i}" for i in range(GENES)])
    write(folder / "last.h5ad", counts(4, GENES))
    with pytest.raises(SourceError, match="in the vocabulary"):
        append([folder / "more.h5ad", folder / "last.h5ad"], folder / "out", progress=False)
    more = append(
        [folder / "more.h5ad", folder / "last.h5ad"], folder / "out", {"on_bad_input": "skip"},
        progress=False,
    )  # fmt: skip
    assert [bool(s.skipped) for s in more.sources[N:]] == [True, False]
    assert verify(folder / "out", progress=False).ok


def test_a_store_that_fails_is_no_bad_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, surveyed: list[int]
) -> None:
    real = phases.survey

    def survey(task: Any) -> Any:
        if task.ordinal == 5:
            raise StorageError("the server answered 503", where=task.file.name)
        return real(task)

    options = {"on_bad_input": "skip"}
    with monkeypatch.context() as m:
        m.setattr(phases, "survey", survey)
        with pytest.raises(StorageError, match=r"(?s)503.*run the same command to go on"):
            quiet_pack(inputs(folder), folder / "out", vocab_of(GENES), **options)
    assert sorted(surveyed) == list(range(N))
    surveyed.clear()
    quiet_pack(inputs(folder), folder / "out", vocab_of(GENES), **options)
    assert surveyed == [5]
    # Of three the store fails for, the rest is not looked at: each may take a minute.
    failing = {0, 1, 2}
    with monkeypatch.context() as m:

        def fails(task: Any) -> Any:
            if task.ordinal in failing:
                raise StorageError(f"the server answered 503 for {task.ordinal}")
            return real(task)

        m.setattr(phases, "survey", fails)
        surveyed.clear()
        with pytest.raises(StorageError, match=r"3 of 12 .* the rest was not looked at"):
            quiet_pack(inputs(folder), folder / "two", vocab_of(GENES), **options)
    assert surveyed == [0, 1, 2]


def test_an_output_that_fails_after_the_surveys_does_not_cost_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, surveyed: list[int]
) -> None:
    real = Storage.write

    def write_fails(self: Storage, path: str, data: bytes) -> None:
        if path == "vocab.json":
            raise StorageError("the server answered 503", where=self.at(path))
        real(self, path, data)

    options = {"on_bad_input": "skip"}
    with monkeypatch.context() as m:
        m.setattr(Storage, "write", write_fails)
        with pytest.raises(StorageError, match="503"):
            quiet_pack(inputs(folder), folder / "out", vocab_of(GENES), **options)
    assert sorted(surveyed) == list(range(N))
    surveyed.clear()
    quiet_pack(inputs(folder), folder / "out", vocab_of(GENES), **options)
    assert surveyed == [] and verify(folder / "out", progress=False).ok


def test_inputs_that_are_there_twice_come_together(folder: Path) -> None:
    for i, other in ((BAD[0], 0), (BAD[1], 1), (BAD[2], 0)):
        made = adata(sp.csr_matrix(counts(10, GENES, seed=other)))
        made.obs_names = [f"{other}-{cell}" for cell in "abcdefghij"]
        made.write_h5ad(folder / f"{i:02d}.h5ad")
        made.write_h5ad(folder / f"{other:02d}.h5ad")
    with pytest.raises(SourceError) as caught:
        quiet_pack(inputs(folder), folder / "out", vocab_of(GENES))
    text = str(caught.value)
    assert "3 of 12 inputs can't be packed" in text and "--allow-repeats" in text
    assert "--on-bad-input" not in text
    assert all(str(folder / f"{i:02d}.h5ad") in text for i in BAD)


def test_shares_survey_each_input_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes at the same time, and a third share after them."""
    v, options = vocab_of(GENES), PackOptions(workers=1, on_bad_input="skip")
    real = refusals.perform

    def slow(work: Any) -> Any:
        with (folder / "log").open("a") as f:
            f.write(json.dumps([os.getpid(), work.task.ordinal]) + "\n")
        time.sleep(0.02)
        return real(work)

    monkeypatch.setattr(refusals, "perform", slow)
    children = []
    for i in (1, 2):
        pid = os.fork()
        if pid == 0:
            try:
                pack_share(inputs(folder), folder / "out", v, options, False, share=(i, 3))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    pack_share(inputs(folder), folder / "out", v, options, False, share=(3, 3))
    done = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert sorted(ordinal for _, ordinal in done) == list(range(N))
    assert {pid for pid, _ in done} == set(children)
    monkeypatch.undo()
    pack(inputs(folder), folder / "out", v, options, False, finish=True)
    pack(inputs(folder), folder / "one", v, options, False)
    assert tree_sums(folder / "out") == tree_sums(folder / "one")


PHASES = """
import os, time
from scshards.packing.executors import Pool

def nap(task):
    time.sleep(0.2)
    return os.getpid()

with Pool(4) as pool:
    assert len(set(pool.run(nap, range(2)))) == 2
    assert len(set(pool.run(nap, range(12)))) == 4
    assert not pool.will_fork(3)
    assert len(set(pool.run(nap, range(3)))) <= 3
"""


def test_each_phase_has_the_processes_it_can_use(small_python: str) -> None:
    subprocess.run([small_python, "-c", PHASES], check=True, timeout=600)

"""One rank fails, is killed or is slow: the others end with its error, or wait for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from rank_host import RankFailed
from train_support import small_config

import scshards
from scshards.training.loop import train

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENDS = 120
"""Seconds in which all ranks have ended, however one of them failed."""


class Two(NamedTuple):
    """What became of two ranks: how each ended, what each wrote down, and what both printed."""

    codes: list[int | None]
    wrote: list[str]
    printed: str


@pytest.fixture
def two(rank_host, tmp_path) -> Callable[..., Two]:
    def started(*what: str) -> Two:
        (folder := tmp_path / "wrote").mkdir()
        with rank_host.team(2) as team, pytest.raises(RankFailed) as e:
            team.run("watch_worker:main", str(folder), *what, seconds=ENDS)
        wrote = [p.read_text() if (p := folder / r).exists() else "" for r in "01"]
        return Two(e.value.codes, wrote, str(e.value))

    return started


def test_a_wait_has_no_end_while_the_other_works_and_one_when_it_raises(two):
    before = "well\nConfigError: it can't be\n  to do: leave it\n"
    error = "the disk is full\n  where: rank 1\n"
    ended = two("slow", "refused", "raises")
    assert ended.codes == [0, 0]
    assert ended.wrote == [
        f"{before}RankError: another rank failed: {error}",
        f"{before}ScshardsError: {error}",
    ]


def test_a_rank_that_waits_for_nobody_is_interrupted(rank_host, tmp_path):
    with rank_host.team(2) as team:
        team.run("watch_worker:main", str(tmp_path), "works", seconds=ENDS)
    error = "the disk is full\n  where: rank 1\n"
    assert (tmp_path / "0").read_text() == f"RankError: another rank failed: {error}"
    assert (tmp_path / "1").read_text() == f"ScshardsError: {error}"


def test_a_wait_that_nothing_ends_ends_with_its_process(two):
    ended = two("stays")
    assert (ended.codes, ended.wrote[0]) == ([1, None], "")
    assert "this rank ends, as another one failed" in ended.printed


@pytest.mark.parametrize(("what", "rank"), [("killed", 1), ("host_killed", 0)])
def test_a_rank_that_is_killed_is_told_by_the_other(two, what, rank):
    ended = two(what)
    assert ended.codes == [0, -9][:: 1 if rank else -1]
    out = ended.wrote[1 - rank]
    assert out.startswith("ScshardsError: another rank has ended, and did not say why")
    assert "what killed it" in out


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("watch") / "run"
    train(shards, folder, small_config("run.steps=1"), shown=False)
    return str(folder)


@pytest.mark.parametrize("case", ["all", "first"])
def test_under_torchrun_an_error_is_said_once(python, run, shards, tmp_path, case):
    """Of all ranks (the output is there), and of the first alone (it can't be written)."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / ("" if case == "all" else "out.h5ad")
    words = ["embed", run, shards, "-o", str(out), "--device", "cpu"]
    done = subprocess.run(
        [python, *TORCHRUN, "-m", "scshards", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python},
        capture_output=True,
        text=True,
        timeout=2 * ENDS,
        check=False,
    )
    assert done.returncode != 0
    what = {"all": "exists already", "first": "can't be written"}[case]
    assert done.stderr.count("error: ") == done.stderr.count(what) == 1, done.stderr
    # torchrun reports by tracebacks of its own that a rank has failed; there are none of ours.
    assert str(Path(scshards.__file__).parent) not in done.stderr
    assert "interrupted" not in done.stderr

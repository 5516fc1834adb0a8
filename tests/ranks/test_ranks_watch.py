"""One rank fails, is killed or is slow: the others end with its error, or wait for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from train_support import small_config

from scshards.training.loop import train

WORKER = Path(__file__).with_name("watch_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENDS = 120
"""Seconds in which all ranks have ended, however one of them failed; they start in them, too."""


def _two(*what: str) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of both ranks; only the first has to end by itself."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *what],
            env={
                **os.environ,
                **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
                **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [started[0].communicate(timeout=ENDS)]
        if what[-1] in ("stays", "works"):
            started[1].kill()
        said.append(started[1].communicate(timeout=ENDS))
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(p.returncode, _plain(out), err) for p, (out, err) in zip(started, said, strict=True)]


def _plain(out: str) -> str:
    """Without what gloo itself writes to standard output (of torch 2.10)."""
    return "".join(x for x in out.splitlines(keepends=True) if not x.startswith("[Gloo]"))


def test_a_wait_has_no_end_while_the_other_works_and_one_when_it_raises():
    (_, out, _), (_, other, _) = _two("slow", "refused", "raises")
    before = "well\nConfigError: it can't be\n  to do: leave it\n"
    error = "the disk is full\n  where: rank 1\n"
    assert out == f"{before}RankError: another rank failed: {error}"
    assert other == f"{before}ScshardsError: {error}"


def test_a_rank_that_waits_for_nobody_is_interrupted():
    (_, out, _), (_, other, _) = _two("works")
    error = "the disk is full\n  where: rank 1\n"
    assert (out, other) == (f"RankError: another rank failed: {error}", f"ScshardsError: {error}")


def test_a_wait_that_nothing_ends_ends_with_its_process():
    (code, out, said), _ = _two("stays")
    assert (code, out) == (1, "")
    assert "this rank ends, as another one failed" in said


@pytest.mark.parametrize(("what", "rank"), [("killed", 1), ("host_killed", 0)])
def test_a_rank_that_is_killed_is_told_by_the_other(what, rank):
    both = _two(what)
    assert [code for code, _, _ in both] == [0, -9][:: 1 if rank else -1]
    out = both[1 - rank][1]
    assert out.startswith("ScshardsError: another rank has ended, and did not say why")
    assert "what killed it" in out


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("watch") / "run"
    train(shards, folder, small_config("run.steps=1"), shown=False)
    return str(folder)


@pytest.mark.parametrize("case", ["all", "first"])
def test_under_torchrun_an_error_is_said_once(run, shards, tmp_path, case):
    """Of all ranks (the output is there), and of the first alone (it can't be written)."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / ("" if case == "all" else "out.h5ad")
    words = ["embed", run, shards, "-o", str(out), "--device", "cpu"]
    done = subprocess.run(
        [*TORCHRUN, "-m", "scshards", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * ENDS,
        check=False,
    )
    assert done.returncode != 0
    what = {"all": "exists already", "first": "can't be written"}[case]
    assert done.stderr.count("error: ") == done.stderr.count(what) == 1, done.stderr
    # torchrun reports by a traceback of its own that a rank has failed; there is no other.
    assert done.stderr.count("Traceback") == 1 and "scshards/" not in done.stderr
    assert "interrupted" not in done.stderr

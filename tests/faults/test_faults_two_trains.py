"""One process trains in a folder at a time, whoever else is started there, and however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest
import torch
from train_support import small_config

from scshards.base.errors import ConfigError, OutputExistsError
from scshards.ranks.ranks import Ranks
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.save.folder import RunFolder

SETTINGS = ("run.steps=6", "run.save_every=2", "run.eval_every=6", "run.log_every=1")

STOPS = """
import os, sys, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from train_support import small_config
from scshards.training.loop import train
from scshards.training.step import Stepper
step = Stepper.step
def stops(self, batch, n, **kw):
    if n == 3:
        while not os.path.exists({run!r} + "/checkpoints/step-00000002"):
            time.sleep(0.01)  # it is written while training goes on
        print("at step 3", flush=True)
        time.sleep(600)
    return step(self, batch, n, **kw)
Stepper.step = stops
train({shards!r}, {run!r}, small_config(*{settings!r}), shown=False)
"""


def test_the_same_command_twice_is_refused_and_a_kill_lets_go(shards, tmp_path, request):
    run = tmp_path / "run"
    script = STOPS.format(
        here=str(request.path.parents[1]), shards=shards, run=str(run), settings=SETTINGS
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and "at step 3" in first.stdout.readline()
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(
            OutputExistsError, match=rf"another process .*process {first.pid} on"
        ) as e:
            train(shards, run, small_config(*SETTINGS), shown=False)
        assert str(run) in str(e.value)
        assert "wait until it has ended" in str(e.value) and "torchrun --nproc" in str(e.value)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    finally:
        first.kill()
        first.wait()
    summary = train(shards, run, small_config(*SETTINGS), shown=False)
    assert (summary.start, summary.step) == (2, 6)
    steps = [m["step"] for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not (run / "lock").exists()


def test_of_several_that_begin_at_once_one_trains(shards, tmp_path):
    """As `srun -n 4` without torchrun: each of them takes itself for a whole run."""
    ended: list[object] = []

    def one() -> None:
        try:
            ended.append(train(shards, tmp_path / "run", small_config(*SETTINGS), shown=False).step)
        except OutputExistsError as e:
            ended.append(e)

    with RunFolder(tmp_path / "run").lock():
        one()
    threads = [threading.Thread(target=one) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert 6 in ended and len(ended) == 5
    steps = [
        m["step"] for m in read_metrics(tmp_path / "run/metrics.jsonl") if m["kind"] == "train"
    ]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_lock_of_a_process_that_was_killed_before_it_began_is_no_run(shards, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text("process 1 on elsewhere")
    assert train(shards, tmp_path / "run", small_config("run.steps=1"), shown=False).step == 1


def test_what_is_refused_later_leaves_no_folder(shards, tmp_path, monkeypatch):
    def refuse(self, world_size):
        raise ConfigError("no lanes for them")

    monkeypatch.setattr(TrainConfig, "check_lanes", refuse)
    with pytest.raises(ConfigError, match="no lanes"):
        train(shards, tmp_path / "run", small_config("run.steps=1"), shown=False)
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_told_and_trained_on(shards, tmp_path, monkeypatch, caplog):
    def flock(file, kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train(shards, tmp_path / "run", small_config("run.steps=1"), shown=False).step == 1
    assert "can't lock" in caplog.text and str(tmp_path / "run") in caplog.text


def test_what_the_first_rank_is_refused_every_rank_is(monkeypatch):
    refused = OutputExistsError("another process is writing there")
    monkeypatch.setattr(Ranks, "gather", lambda self, thing: [refused, thing])
    other = Ranks(1, 2, torch.device("cpu"))
    with pytest.raises(OutputExistsError, match="another process"):
        other.first(lambda: pytest.fail("only the first rank locks"))

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
from scshards.base.storage import Storage
from scshards.ranks.ranks import Ranks
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.save.checkpoint import complete
from scshards.training.save.folder import RunFolder
from scshards.training.step import Stepper

SETTINGS = ("run.steps=6", "run.save_every=2", "run.eval_every=6", "run.log_every=1")

STOPS = """
import os, sys, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from train_support import small_config
from scshards.training.loop import train
from scshards.training.save.checkpoint import complete
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


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_two_runs_with_one_place_for_checkpoints(shards, tmp_path, monkeypatch, request, kind):
    """Folders of their own do not part runs that write their checkpoints to one place."""
    place = str(tmp_path / "place")
    if kind == "store":
        place = f"{request.getfixturevalue('s3').url}/place"
    settings = ("run.steps=4", "run.save_every=2", "run.eval_every=4", f"run.checkpoints={place}")
    step, refused = Stepper.step, []

    def beside(self, batch, n, **kw):
        if n == 3 and not refused:
            refused.append(None)
            with pytest.raises(OutputExistsError, match="another process is writing there") as e:
                train(shards, tmp_path / "b", small_config(*settings), shown=False)
            refused[0] = str(e.value)
        return step(self, batch, n, **kw)

    with monkeypatch.context() as m:
        m.setattr(Stepper, "step", beside)
        m.setattr("scshards.base.locks.WATCH_S", 5.0)
        m.setattr("scshards.base.locks.BEAT_S", 0.2)
        assert train(shards, tmp_path / "a", small_config(*settings), shown=False).step == 4
    assert "run.checkpoints" in refused[0] and place in refused[0]
    assert complete(place) == ["step-00000002", "step-00000004"]
    # When it has ended, another may go on there.
    more = ("run.steps=5", *settings[1:])
    assert train(shards, tmp_path / "b", small_config(*more), shown=False).start == 4
    assert not [n for n in Storage(place).list() if "lock" in n]


def test_a_run_that_was_taken_for_dead_publishes_no_more(shards, tmp_path, s3, monkeypatch):
    place = f"{s3.url}/place"
    settings = ("run.steps=4", "run.save_every=2", "run.eval_every=4", f"run.checkpoints={place}")
    step = Stepper.step

    def late(self, batch, n, **kw):
        for name in Storage(place).list("lock"):
            Storage(place).remove(name)
        return step(self, batch, n, **kw)

    with monkeypatch.context() as m:
        m.setattr(Stepper, "step", late)
        with pytest.raises(OutputExistsError, match="another process"):
            train(shards, tmp_path / "a", small_config(*settings), shown=False)
    assert complete(place) == []


def test_what_a_killed_run_has_left_goes_when_it_begins(shards, tmp_path):
    settings = ("run.steps=2", "run.save_every=2", "run.eval_every=2")
    run = tmp_path / "run"
    train(shards, run, small_config(*settings), shown=False)
    left = [
        run / ".args.json.abc.tmp",
        run / "checkpoints" / ".step-00000001.partial" / "index.json",
    ]
    left.append(run / "checkpoints" / "step-00000002" / ".state.json.xyz.tmp")
    kept = run / ".evaluation.json.abc.tmp"  # evaluate may be at it right now
    for path in (*left, kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{")
    train(shards, run, small_config(*settings), shown=False)  # it has nothing left to do
    assert not any(path.exists() for path in left) and kept.exists()

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from train_support import small_model

from scshards.base.errors import CheckpointError
from scshards.train import checkpoint
from scshards.train.checkpoint import TrainState
from scshards.train.config import OptimSettings
from scshards.train.optim import make_optimizer


def _trained(steps=2):
    model = small_model()
    optimizer = make_optimizer(model, OptimSettings(weight_decay=0.1))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.sin(p.detach() * 7)
        optimizer.step()
    return model, optimizer


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    model, optimizer = _trained()
    state = TrainState(step=20, best_step=10, best_loss=0.1 + 0.2, loader={"lanes": [1, 2]})
    path = checkpoint.save(tmp_path / "c", state, model, optimizer, keep_last=2)
    assert sorted(p.name for p in path.iterdir()) == ["model.pt", "optimizer.pt", "state.json"]

    again, fresh = _trained(steps=0)
    assert checkpoint.load(path, again, fresh) == state
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert a.equal(b)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert optimizer.state[a][name].equal(fresh.state[b][name])


def test_old_checkpoints_go_and_the_latest_is_last(tmp_path):
    model, optimizer = _trained()
    for step in (5, 10, 100, 15):
        checkpoint.save(tmp_path, TrainState(step=step), model, optimizer, keep_last=3)
    assert [p.name for p in checkpoint.complete(tmp_path)] == [
        "step-00000010",
        "step-00000015",
        "step-00000100",
    ]


KILLED = """
import os, sys
sys.path.insert(0, {folder!r})
import torch
from test_train_checkpoint import TrainState, _trained, checkpoint
from pathlib import Path

model, optimizer = _trained()
where = Path(sys.argv[1])
checkpoint.save(where, TrainState(step=1), model, optimizer, keep_last=1)
save, calls = torch.save, []
def killed(thing, path):
    save(thing, path)
    calls.append(path)
    if len(calls) == 2:
        os.kill(os.getpid(), 9)
torch.save = killed
checkpoint.save(where, TrainState(step=2), model, optimizer, keep_last=1)
"""


def test_a_checkpoint_whose_writer_was_killed_is_invisible(tmp_path, request):
    script = KILLED.format(folder=str(request.path.parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    assert len(list(tmp_path.iterdir())) == 2, "the torn one must be there, under another name"
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000001"]

    model, optimizer = _trained()
    checkpoint.save(tmp_path, TrainState(step=2), model, optimizer, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    model, optimizer = _trained()
    path = checkpoint.save(tmp_path, TrainState(step=1), model, optimizer, keep_last=1)
    other = torch.nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(path, other, make_optimizer(other, OptimSettings()))
    data = (path / "model.pt").read_bytes()
    (path / "model.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError) as e:
        checkpoint.load(path, model, optimizer)
    assert "remove this folder" in str(e.value)


def test_saving_a_step_again_only_renews_what_is_told_of_it(tmp_path):
    model, optimizer = _trained()
    path = checkpoint.save(tmp_path, TrainState(step=1), model, optimizer, keep_last=1)
    inode = (path / "model.pt").stat().st_ino
    state = TrainState(step=1, best_step=1, best_loss=2.0, evaluated_step=1)
    checkpoint.save(tmp_path, state, model, optimizer, keep_last=1)
    assert (path / "model.pt").stat().st_ino == inode
    assert checkpoint.load(path, model, optimizer) == state

"""Branches: runs that go on from a checkpoint of another run (`--from RUN@STEP`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from train_support import read_tensors, small_config

from scshards.base.errors import ConfigError
from scshards.cli import main
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.save.branch import branch_config

KEEPS = ("run.keep_every=5", "run.save_every=5", "run.log_every=1", "optim.ema=0.9")


@pytest.fixture(scope="module")
def old(shards, tmp_path_factory) -> Path:
    """20 steps at a constant rate, with checkpoints at 5, 10, 15 and 20."""
    run = tmp_path_factory.mktemp("old") / "run"
    train(shards, run, small_config(*KEEPS, "optim.schedule=constant"), shown=False)
    return run


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_branch_that_changes_nothing_is_the_run_itself(old, shards, tmp_path):
    before = _files(old)
    summary = train(shards, tmp_path / "new", branch_config(f"{old}@10"), shown=False)
    assert (summary.start, summary.step) == (10, 20)
    for kind in ("model", "optimizer", "average"):
        mine, theirs = (
            read_tensors(run / "checkpoints/step-00000020", kind) for run in (tmp_path / "new", old)
        )
        assert mine.keys() == theirs.keys() and mine
        assert all(mine[name].equal(theirs[name]) for name in mine)
    assert _files(old) == before
    # It chooses a best model of its own, beginning with the one it came from.
    valid = [m for m in read_metrics(tmp_path / "new/metrics.jsonl") if m["kind"] == "valid"]
    assert [m["step"] for m in valid] == [10, 20] and valid[0]["is_best"]


def test_a_cool_down_keeps_moments_and_cells_and_lowers_the_rate(old, shards, tmp_path):
    settings = ("run.steps=14", "optim.schedule=wsd", "optim.decay_steps=4", "run.eval_every=14")
    train(shards, tmp_path / "new", branch_config(f"{old}@10", None, settings), shown=False)
    lines = [m for m in read_metrics(tmp_path / "new/metrics.jsonl") if m["kind"] == "train"]
    theirs = [m for m in read_metrics(old / "metrics.jsonl") if m["kind"] == "train"]
    assert [m["step"] for m in lines] == [11, 12, 13, 14]
    assert [m["lr"] for m in lines] == pytest.approx([3e-3 * k / 5 for k in (4, 3, 2, 1)])
    # The first step sees the same cells with the same weights: the same loss, another rate.
    assert lines[0]["masked_mse"] == theirs[10]["masked_mse"]
    assert lines[1]["masked_mse"] != theirs[11]["masked_mse"]
    steps = read_tensors(tmp_path / "new/checkpoints/step-00000014", "optimizer")
    assert {float(t) for name, t in steps.items() if name.endswith("/step")} == {14.0}


def test_the_same_command_resumes_the_branch_and_another_is_refused(old, shards, tmp_path):
    args = ["train", shards, "-o", str(tmp_path / "new"), "--no-progress", "--from"]
    first = CliRunner().invoke(main, [*args, f"{old}@5", "--set", "run.steps=8"])
    assert first.exit_code == 0, first.output
    more = CliRunner().invoke(main, [*args, f"{old}@5", "--set", "run.steps=9"])
    assert more.exit_code == 0, more.output
    lines = read_metrics(tmp_path / "new/metrics.jsonl")
    assert [m["step"] for m in lines if m["kind"] == "train"] == [6, 7, 8, 9]
    other = CliRunner().invoke(main, [*args, f"{old}@10", "--set", "run.steps=9"])
    assert other.exit_code == 1
    with pytest.raises(ConfigError, match=r"run\.branch is '.*@5' there, '.*@10' now"):
        train(
            shards,
            tmp_path / "new",
            branch_config(f"{old}@10", None, ["run.steps=9"]),
            shown=False,
        )


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.d_hid=32", r"model\.d_hid is 16 there, 32 now"),
        ("data.max_length=30", r"data\.max_length is 40 there, 30 now"),
        ("run.seed=5", r"run\.seed is 0 there, 5 now"),
        ("task.start=other", r"task\.start is None there, 'other' now"),
        ('optim.freeze=["encoder"]', r"optim\.freeze is \[\] there, \['encoder'\] now"),
        ("optim.ema=0", r"optim\.ema is 0\.9 there, 0\.0 now"),
    ],
)
def test_model_task_and_data_are_those_of_the_run(old, setting, told):
    with pytest.raises(ConfigError, match=told):
        branch_config(f"{old}@10", None, [setting])


def test_a_step_or_run_that_is_not_there_is_refused(old, shards, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint of step 7") as e:
        train(shards, tmp_path / "new", branch_config(f"{old}@7"), shown=False)
    assert "5, 10, 15, 20" in str(e.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="not the folder of a run"):
        branch_config(str(tmp_path))


def test_the_latest_checkpoint_is_taken_when_no_step_is_named(old, shards, tmp_path):
    summary = train(
        shards, tmp_path / "new", branch_config(str(old), None, ["run.epochs=2"]), shown=False
    )
    assert (summary.start, summary.step) == (20, 2 * (224 // 16))

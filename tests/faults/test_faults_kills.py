"""A run that is killed or told to stop at any step on the disk, and the same command again: the same run.

Of pack, append, reshard, merge and export test_faults_packing.py says it.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from kill_driver import Driver
from pack_support import tree_sums
from test_faults_disk import sets
from train_support import read_tensors

from scshards.training.log.metrics import read_metrics
from scshards.training.save.checkpoint import complete

MEASURED = {"cells_per_s", "tokens_per_s", "padded_tokens_per_s", "data_wait", "memory_bytes", "seconds"}  # fmt: skip


def told(run: Path) -> dict[str, Any]:
    """What a run has written: all bytes but what was measured."""
    found: dict[str, Any] = dict(tree_sums(run))
    for path in run.rglob("*.json*"):
        name = path.relative_to(run).as_posix()
        if path.name == "metrics.jsonl":
            found[name] = [
                {k: v for k, v in m.items() if k not in MEASURED} for m in read_metrics(path)
            ]
        elif path.name == "state.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
    return found


STEPS = 6


@pytest.fixture(scope="module")
def straight(
    shards: str, train_driver: Driver, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], int]:
    """What a run writes that nobody disturbs, and its steps on the disk."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = train_driver.run(line(shards, run), run.parent)
    assert done["code"] == 0, done
    return told(run), done["steps"]


def line(shards: str, run: Path) -> list[str]:
    return ["train", shards, "-o", str(run), *sets(STEPS)]


@pytest.mark.parametrize(
    "stops", [3, pytest.param(40, marks=pytest.mark.slow)], ids=["few", "forty"]
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_run_that_is_stopped_at_random_steps_is_the_same_run(
    shards: str,
    tmp_path: Path,
    train_driver: Driver,
    straight: tuple[dict[str, Any], int],
    stops: int,
    number: signal.Signals,
) -> None:
    rng = random.Random(f"{number} {stops}")
    expected, steps = straight
    assert steps > 50
    for k in range(stops):
        run = tmp_path / f"{k}" / "run"
        run.parent.mkdir()
        # And what goes on is stopped once more, at some step that it may not have.
        for at in (rng.randrange(1, steps - 5), rng.randrange(1, steps)):
            done = train_driver.run(line(shards, run), run.parent, at, number)
            assert "Traceback" not in done["said"] and "error: " not in done["said"], (at, done)
            if number == signal.SIGKILL:
                assert done["code"] == -9 or at > done["steps"], (at, done)
            else:
                # In order: what was done is saved. Before a run has begun, it is an interruption.
                assert done["code"] in (0, 130), (at, done)
            if (run / "checkpoints").exists():
                for name in complete(run / "checkpoints"):
                    assert read_tensors(run / "checkpoints" / name), (at, name)
        again = train_driver.run(line(shards, run), run.parent)
        assert again["code"] == 0 and "Traceback" not in again["said"], again
        found = told(run)
        if number == signal.SIGTERM:
            # A signal saves a checkpoint at a step of its own, for which an earlier one has gone.
            others = {n for n in found.keys() ^ expected.keys() if "checkpoints/step-" in n}
            found, wanted = (
                {n: s for n, s in of.items() if n not in others} for of in (found, expected)
            )
            assert any(f"step-{STEPS:08d}" in n for n in wanted) and "best_model.pt" in wanted
            assert found == wanted
        else:
            assert found == expected
        assert not (run / "lock").exists() and not (run / "STOPPED").exists()
        shutil.rmtree(run.parent)

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time

import pytest
from train_support import small_config

from scshards.base.errors import ConfigError
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import MetricsLog, read_metrics
from scshards.training.log.trackers import check_trackers, open_trackers
from scshards.training.loop import train

BOARD = "run.trackers=['tensorboard']"


def read_board(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads out of its event files: {tag: [(step, value)]}."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(folder))
    board.Reload()
    return {t: [(s.step, s.value) for s in board.Scalars(t)] for t in board.Tags()["scalars"]}


def test_tensorboard_holds_what_metrics_jsonl_holds(shards, tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    train(shards, run, small_config(BOARD, "run.peak_tflops=0.1"), shown=False)
    lines = read_metrics(run / "metrics.jsonl")
    board = read_board(run / "tensorboard")
    assert {"train/masked_mse", "train/mfu", "valid/masked_mse", "valid/is_best"} <= board.keys()
    for tag, found in board.items():
        kind, name = tag.split("/")
        expected = [(m["step"], float(m[name])) for m in lines if m["kind"] == kind]
        assert [s for s, _ in found] == [s for s, _ in expected], tag
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6), tag


def test_steps_that_are_taken_again_are_read_once(tmp_path):
    pytest.importorskip("tensorboard")
    for start, value in ((0, 1.0), (10, 2.0)):
        with open_trackers(["tensorboard"], tmp_path, {}, step=start) as trackers:
            log = MetricsLog(tmp_path / "metrics.jsonl", start, trackers=trackers)
            for step in range(start + 5, 21, 5):
                log.write("train", step, loss=value, text="no number", nothing=float("nan"))
    assert read_board(tmp_path / "tensorboard") == {
        "train/loss": [(5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0)]
    }


def test_wandb_keeps_a_run_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_ERROR_REPORTING", "false"),
        ("WANDB_PROJECT", "cells"),
    ):
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    tables = TrainConfig().tables()
    with open_trackers(["wandb"], run, tables, step=0) as trackers:
        assert wandb.run.project == "cells"
        assert wandb.run.config["optim"]["lr"] == 1e-4
        first = wandb.run.id
        log = MetricsLog(run / "metrics.jsonl", 0, trackers=trackers)
        log.write("train", 5, loss=1.5)
        log.write("valid", 5, loss=2.5, is_best=True)
    assert wandb.run is None, "it is closed"
    (kept,) = run.glob("wandb/offline-run-*/*.wandb")
    assert first in kept.name
    # Their own process writes it, a moment later.
    deadline = time.monotonic() + 600
    while not all(n in kept.read_bytes() for n in (b"train/loss", b"valid/loss", b"valid/is_best")):
        assert time.monotonic() < deadline, kept.read_bytes()
        time.sleep(0.05)


def test_wandb_without_a_key_says_what_to_do(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import pathlib\n"
        "from scshards.training.log.trackers import open_trackers\n"
        "with open_trackers(['wandb'], pathlib.Path('run'), {}, step=0):\n"
        "    print('a run was opened')\n"
    )
    alone = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = python(
        code, alone | {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:1"}, tmp_path
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "ConfigError" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_anything_is_written(shards, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a folder of that name, as W&B leaves one, is not the library
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda wanted: None if wanted == name else found(wanted),
    )
    config = small_config(f"run.trackers=['{name}']")
    with pytest.raises(ConfigError) as e:
        train(shards, tmp_path / "run", config, shown=False)
    assert f"pip install 'scshards[{name}]'" in str(e.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="'tensorboard', 'wandb'"):
        TrainConfig.read(None, ["run.trackers=['mlflow']"])
    with pytest.raises(ConfigError, match="names one twice"):
        TrainConfig.read(None, ["run.trackers=['wandb', 'wandb']"])
    with pytest.raises(ConfigError, match="above 0"):
        TrainConfig.read(None, ["run.peak_tflops=-1.0"])
    check_trackers(())


def test_nothing_is_imported_that_was_not_asked_for(shards, tmp_path):
    code = (
        "import sys\n"
        "from train_support import small_config\n"
        "from scshards.training.loop import train\n"
        f"train({shards!r}, {str(tmp_path / 'run')!r}, small_config('run.steps=2'), shown=False)\n"
        "print({m.split('.')[0] for m in sys.modules} & {'tensorboard', 'wandb', 'matplotlib'})\n"
    )
    done = python(code, os.environ)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def python(code, environment, folder=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
    )

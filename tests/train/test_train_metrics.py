from __future__ import annotations

import json

import pytest
import torch

from scshards.train.metrics import MetricsLog, Window, read_metrics
from scshards.train.setup import Ranks
from scshards.train.step import StepResult


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (5, 10, 15, 20):
        log.write("train", step, loss=float(step))
    with path.open("a") as f:
        f.write('{"kind": "train", "ste')  # killed while writing
    again = MetricsLog(path, 10)
    again.write("train", 15, loss=float("nan"))
    assert read_metrics(path) == [
        {"kind": "train", "step": 5, "loss": 5.0},
        {"kind": "train", "step": 10, "loss": 10.0},
        {"kind": "train", "step": 15, "loss": None},
    ]
    MetricsLog(path, 0)
    assert read_metrics(path) == []


def test_only_the_first_rank_writes(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, enabled=False)
    log.write("train", 1, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_a_window_is_the_mean_over_values_not_over_steps():
    window = Window(Ranks(0, 1, torch.device("cpu")), {"masked_mse": 1.0, "mvc_mse": 0.5})
    shared = {"terms": ("masked_mse", "mvc_mse"), "lr": 0.1, "stop": False}
    for masked, mvc, n, cells in ((30.0, 60.0, 10, 4), (1000.0, 0.0, 90, 12)):
        window.add(
            StepResult(
                sums=torch.tensor([masked, mvc], dtype=torch.float64),
                counts=torch.tensor([n, n], dtype=torch.float64),
                tokens=2 * n,
                padded_tokens=3 * n,
                cells=cells,
                grad_norm=masked,
                **shared,
            ),
            seconds=2.0,
            waited=0.5,
        )
    line = window.close()
    assert line["masked_mse"] == pytest.approx(1030 / 100)
    assert line["mvc_mse"] == pytest.approx(60 / 100)
    assert line["loss"] == pytest.approx(10.3 + 0.5 * 0.6)
    assert line["cells_per_s"] == pytest.approx(16 / 4)
    assert line["tokens_per_s"] == pytest.approx(200 / 4)
    assert line["padded_tokens_per_s"] == pytest.approx(300 / 4)
    assert line["data_wait"] == pytest.approx(0.25)
    assert (line["steps"], line["grad_norm"]) == (2, 1000.0)
    assert line["memory_bytes"] > 1_000_000
    json.dumps(line)

from __future__ import annotations

import json

import pytest
import torch
from train_support import small_batch, small_model

from scshards.base.errors import StorageError
from scshards.ranks.ranks import Ranks
from scshards.training.log.flops import Amounts
from scshards.training.log.metrics import MEASURED, MetricsLog, Window, read_metrics
from scshards.training.step import StepResult

HERE = Ranks(0, 1, torch.device("cpu"))
WEIGHTS = {"masked_mse": 1.0, "mvc_mse": 0.5}


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


def taken(window: Window, masked: float, mvc: float, n: int, cells: int) -> None:
    window.took(2.0, waited=0.5)
    amounts = Amounts.of(small_batch(cells, seed=cells))
    window.add(
        StepResult(
            step=0,
            terms=("masked_mse", "mvc_mse"),
            sums=torch.tensor([masked, mvc], dtype=torch.float64),
            counts=torch.tensor([n, n], dtype=torch.float64),
            amounts=amounts,
            padded_tokens=3 * n,
            lr=0.1,
            grad_norm=masked,
        )
    )


def n_tokens(*cells: int) -> int:
    return sum(int((~small_batch(n, seed=n).is_pad).sum()) for n in cells)


def test_a_window_is_the_mean_over_values_not_over_steps():
    window = Window(HERE, WEIGHTS, small_model().config, None)
    taken(window, 30.0, 60.0, n=10, cells=4)
    taken(window, 1000.0, 0.0, n=90, cells=12)
    line = window.close()
    assert line["masked_mse"] == pytest.approx(1030 / 100)
    assert line["mvc_mse"] == pytest.approx(60 / 100)
    assert line["loss"] == pytest.approx(10.3 + 0.5 * 0.6)
    assert line["cells_per_s"] == pytest.approx(16 / 4)
    assert line["tokens_per_s"] == pytest.approx(n_tokens(4, 12) / 4)
    assert line["padded_tokens_per_s"] == pytest.approx(300 / 4)
    assert line["data_wait"] == pytest.approx(0.25)
    assert (line["steps"], line["grad_norm"]) == (2, 1000.0)
    assert line["memory_bytes"] > 1_000_000
    assert "mfu" not in line, "nobody knows what this processor can do"
    json.dumps(line)
    assert line.keys() - WEIGHTS.keys() <= MEASURED


def test_the_whole_call_is_the_mean_over_its_windows_but_the_first():
    window = Window(HERE, WEIGHTS, small_model().config, None)
    assert window.whole() == {}
    taken(window, 1.0, 1.0, n=10, cells=4)
    assert window.close()["cells_per_s"] == pytest.approx(4 / 2)
    assert window.whole()["cells_per_s"] == pytest.approx(4 / 2)
    for cells in (12, 20):
        taken(window, 1.0, 1.0, n=10, cells=cells)
        assert window.close()["cells_per_s"] == pytest.approx(cells / 2)
    assert window.whole()["cells_per_s"] == pytest.approx((12 + 20) / 4)


def test_utilization_is_arithmetic_over_what_the_device_can_do():
    model, peak = small_model().config, 1e9
    window = Window(HERE, WEIGHTS, model, peak)
    expected = 0
    for cells in (4, 12):
        taken(window, 1.0, 1.0, n=10, cells=cells)
        lengths = (~small_batch(cells, seed=cells).is_pad).sum(dim=1).tolist()
        d = model.d_model
        for n in lengths:  # layers, values, decoder, MVC: multiplications with addition
            expected += model.n_layers * (n * (4 * d * d + 2 * d * model.d_hid) + 2 * n * n * d)
            expected += n * (d + d * d) + n * (2 * d * d + d) + n * (d * d + d) + d * d
    assert window.close()["mfu"] == pytest.approx(3 * 2 * expected / 4.0 / peak)


def test_several_ranks_are_told_apart(monkeypatch):
    monkeypatch.setattr(Ranks, "total", lambda self, values: [2 * v for v in values])
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [mine, (0.5, 0.1)])
    window = Window(Ranks(0, 2, torch.device("cpu")), WEIGHTS, small_model().config, None)
    taken(window, 30.0, 60.0, n=10, cells=4)
    line = window.close()
    assert (line["slowest_step_s"], line["fastest_step_s"]) == (2.0, 0.5)
    assert line["data_waits"] == [0.25, 0.1]
    assert line.keys() - WEIGHTS.keys() <= MEASURED


def test_a_full_disk_is_told(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left") as e:
        log.write("train", 1, loss=1.0)
    assert "metrics.jsonl" in str(e.value) and "free some space" in str(e.value)

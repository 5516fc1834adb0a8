"""tools/bench_train measures one model twice, on the same cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from scshards.model.config import ModelConfig

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import bench_train_jobs

    return bench_train_jobs


def test_the_plain_loop_trains_the_same_model(jobs):
    shape = ModelConfig(n_tokens=9, pad_id=0, d_model=16, n_heads=2, d_hid=24, n_layers=2)
    assert jobs.same_model(shape) < 1e-4


def test_a_difference_would_be_seen(jobs, monkeypatch):
    import bench_train_plain

    shape = ModelConfig(n_tokens=9, pad_id=0, d_model=16, n_heads=2, d_hid=24, n_layers=2)
    other = {"decoder.fc.0.bias": "decoder.fc.2.bias", "decoder.fc.2.bias": "decoder.fc.0.bias"}
    names = bench_train_plain.names_of_plain
    monkeypatch.setattr(bench_train_plain, "names_of_plain", lambda n: other.get(n, names(n)))
    assert jobs.same_model(shape) > 1e-4

from __future__ import annotations

import pytest
from train_support import small_config

from scshards.train.loop import train
from scshards.train.metrics import read_metrics

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_cuda_trains_as_the_cpu_does(shards, tmp_path, precision, tolerance):
    lines = {}
    for device, kind in (("cpu", "fp32"), ("cuda", precision)):
        config = small_config("model.dropout=0", f"run.device={device}", f"run.precision={kind}")
        run = tmp_path / device
        assert train(shards, run, config, shown=False).precision == kind
        lines[device] = read_metrics(run / "metrics.jsonl")
    for a, b in zip(lines["cpu"][:2], lines["cuda"][:2], strict=True):
        assert b["masked_mse"] == pytest.approx(a["masked_mse"], rel=tolerance)
    assert lines["cuda"][0]["memory_bytes"] > 0

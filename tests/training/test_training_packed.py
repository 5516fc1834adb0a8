"""Packed cells train as padded ones do."""

from __future__ import annotations

import pytest
from train_support import small_config

from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train

TERMS = {"loss", "masked_mse", "mvc_mse", "grad_norm"}


def test_packed_and_padded_runs_are_one(shards, tmp_path):
    lines = {}
    for name, settings in (("padded", ()), ("packed", ("data.tokens_per_batch=640",))):
        config = small_config("model.dropout=0", "run.log_every=1", *settings)
        train(shards, tmp_path / name, config, shown=False)
        lines[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    assert len(lines["padded"]) > 20
    for padded, packed in zip(lines["padded"], lines["packed"], strict=True):
        assert (padded["kind"], padded["step"]) == (packed["kind"], packed["step"])
        for term in TERMS & padded.keys():
            assert padded[term] == pytest.approx(packed[term], rel=1e-4)
        if padded["kind"] == "train":
            assert 0 < packed["tokens_per_s"] < packed["padded_tokens_per_s"]

"""Packed cells train as padded ones do."""

from __future__ import annotations

import itertools

import pytest
import torch
from train_support import small_config

from scshards.ranks.ranks import Ranks
from scshards.training.data import endless, train_loader
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


def test_genes_that_did_not_fit_are_told(shards, tmp_path):
    """Against the tokens of the same cells, padded."""
    config = small_config("run.log_every=20", "data.tokens_per_batch=400")
    summary = train(shards, tmp_path / "run", config, shown=False)
    here = Ranks(0, 1, torch.device("cpu"))
    tokens = {}
    for name, of in (("packed", config), ("padded", small_config())):
        batches = itertools.islice(endless(train_loader(shards, of, here, 16)), 20)
        tokens[name] = sum(int((~b.is_pad).sum()) for b in batches)
    share = 1 - tokens["packed"] / tokens["padded"]
    (line,) = [m for m in read_metrics(tmp_path / "run/metrics.jsonl") if m["kind"] == "train"]
    assert 0 < share == pytest.approx(line["genes_cut"])
    assert f"{100 * share:.1f}% of genes cut" in summary.text()

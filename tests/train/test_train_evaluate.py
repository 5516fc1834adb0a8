from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import loader_of
from train_support import small_config

from scshards.base.errors import ConfigError
from scshards.model.scgpt import load_model
from scshards.shards.shardset import ShardSet
from scshards.train.evaluate import evaluate_run
from scshards.train.loop import train
from scshards.train.metrics import read_metrics


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train(shards, folder, small_config("run.steps=60", "data.max_length=30"), shown=False)
    return str(folder)


def _by_hand(shards: str, run: str) -> dict[str, float]:
    """The three errors, cell by cell in plain Python from one big batch of each split."""
    vocab = ShardSet(shards).vocab
    sums, counts = defaultdict(float), defaultdict(int)
    whole = loader_of(shards, split="train", shuffle=False, drop_last=False, batch_size=400)
    (batch,) = whole
    for genes, values in zip(batch.genes.tolist(), batch.targets.tolist(), strict=True):
        for g, v in zip(genes[1:], values[1:], strict=True):
            if g != vocab.pad_id:
                sums[g] += v
                counts[g] += 1
    overall = sum(sums.values()) / sum(counts.values())

    (batch,) = loader_of(
        shards, split="valid", max_length=30, shuffle=False, drop_last=False, batch_size=200
    )
    model = load_model(run).model
    with torch.no_grad():
        predicted = model(batch).predictions.tolist()
    errors = defaultdict(list)
    rows = (batch.genes.tolist(), batch.targets.tolist(), batch.is_masked.tolist())
    for b, (genes, values, masked) in enumerate(zip(*rows, strict=True)):
        if batch.weight[b] == 0:
            continue
        seen = [
            v
            for g, v, m in zip(genes[1:], values[1:], masked[1:], strict=True)
            if g != vocab.pad_id and not m
        ]
        own = sum(seen) / len(seen) if seen else overall
        for i, (g, v, m) in enumerate(zip(genes, values, masked, strict=True)):
            if m:
                gene = sums[g] / counts[g] if counts[g] else overall
                errors["model"].append((predicted[b][i] - v) ** 2)
                errors["gene_mean"].append((gene - v) ** 2)
                errors["cell_mean"].append((own - v) ** 2)
    return {k: float(np.mean(v)) for k, v in errors.items()} | {"n": len(errors["model"])}


def test_the_model_and_the_baselines_against_plain_formulas(shards, run):
    found = evaluate_run(run, shards, batch_size=16, device="cpu", shown=False)
    expected = _by_hand(shards, run)
    assert found.n_masked == expected["n"]
    assert found.n_cells == ShardSet(shards).manifest.cells("valid")
    assert found.model == pytest.approx(expected["model"], rel=1e-5)
    assert found.gene_mean == pytest.approx(expected["gene_mean"], rel=1e-9)
    assert found.cell_mean == pytest.approx(expected["cell_mean"], rel=1e-9)
    better = min(expected["gene_mean"], expected["cell_mean"])
    assert found.margin == pytest.approx(1 - expected["model"] / better, rel=1e-4)
    assert json.loads(Path(run, "evaluation.json").read_text()) == found.tables()


def test_the_loop_found_the_same_error_for_its_best_model(shards, run):
    lines = read_metrics(Path(run, "metrics.jsonl"))
    best = min(m["masked_mse"] for m in lines if m["kind"] == "valid")
    for size in (7, 64):
        found = evaluate_run(run, shards, batch_size=size, device="cpu", shown=False)
        assert found.model == pytest.approx(best, rel=1e-5)


def test_what_can_not_be_evaluated(shards, run, tmp_path):
    with pytest.raises(ConfigError, match="no split 'test'"):
        evaluate_run(run, shards, split="test", device="cpu", shown=False)
    with pytest.raises(ConfigError, match="not the folder of a run"):
        evaluate_run(str(tmp_path), shards, device="cpu", shown=False)

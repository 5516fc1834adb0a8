from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from loaders import loader_of
from train_support import small_config

from scshards.applying.embed import EmbedOptions, embed
from scshards.applying.evaluate import Evaluation, embed_some, evaluate_run
from scshards.base.errors import ConfigError
from scshards.model.scgpt import load_model
from scshards.shards.shardset import ShardSet
from scshards.tasks.confusion import Confusion
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train


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


def test_some_cells_are_embedded_as_the_whole_split_is(shards, run, tmp_path):
    """Beside `embed`, for the cells that are not sampled."""
    embed(
        run, shards, tmp_path / "all.h5ad", EmbedOptions(split="valid", device="cpu"), shown=False
    )
    every = anndata.read_h5ad(tmp_path / "all.h5ad")
    every = every[np.argsort(every.obs_names.to_numpy(str))]
    found = embed_some(run, shards, cells=1000, device="cpu")
    assert found.labels["kind"].tolist() == every.obs["kind"].tolist()
    shardset = ShardSet(shards)
    whole = [i for i, key in enumerate(every.obs_names) if len(shardset.cell(key).genes) < 30]
    assert len(whole) > 3
    wanted = every.obsm["X_scshards"][whole]
    np.testing.assert_allclose(found.vectors[whole], wanted, atol=1e-5)
    few = embed_some(run, shards, cells=7, device="cpu")
    assert few.vectors.shape == (7, found.vectors.shape[1])


def test_the_loop_found_the_same_error_for_its_best_model(shards, run):
    lines = read_metrics(Path(run, "metrics.jsonl"))
    best = min(m["masked_mse"] for m in lines if m["kind"] == "valid")
    for size in (7, 64):
        found = evaluate_run(run, shards, batch_size=size, device="cpu", shown=False)
        assert found.model == pytest.approx(best, rel=1e-5)


def test_the_precision_is_the_runs_unless_another_is_asked_for(shards, run):
    own, fp32, bf16 = (
        evaluate_run(run, shards, shown=False, precision=p).model for p in (None, "fp32", "bf16")
    )
    assert own == fp32 != bf16
    assert bf16 == pytest.approx(fp32, rel=0.02)


def test_what_can_not_be_evaluated(shards, run, tmp_path):
    with pytest.raises(ConfigError, match="no split 'test'"):
        evaluate_run(run, shards, split="test", device="cpu", shown=False)
    with pytest.raises(ConfigError, match="not the folder of a run"):
        evaluate_run(str(tmp_path), shards, device="cpu", shown=False)


@pytest.mark.parametrize(
    ("model", "verdict"),
    [
        (92.3, "the model is worse than each gene's mean: 92.3 against 52.7"),
        (39.525, "the model is better than each gene's mean: 39.52 against 52.7, 25.0% less"),
        (52.7, "the model is no better than each gene's mean: 52.7 against 52.7"),
    ],
)
def test_a_verdict_says_better_or_worse_and_than_what(model, verdict):
    found = Evaluation(
        split="valid", n_cells=9, n_masked=80, model=model, mvc=None, gene_mean=52.7, cell_mean=60.0
    )
    assert found.text()[-1] == verdict


def test_what_each_class_is_taken_for():
    """Five cells are a, of which three are found; c is never predicted, and d does not occur."""
    counts = np.array([[3, 2, 0, 0], [0, 4, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    found = Confusion(("a", "b", "c", "d"), counts)
    assert found.accuracy == 0.7
    assert found.macro_f1 == pytest.approx((6 / 9 + 8 / 10 + 0) / 3)
    (table,) = found.text()
    assert [line.split() for line in table.text().splitlines()[2:]] == [
        ["a", "5", "60.0%", "75.0%", "0.667", "b", "(2)"],
        ["b", "4", "100.0%", "66.7%", "0.800", "-"],
        ["c", "1", "0.0%", "-", "0.000", "a", "(1)"],
    ]


def test_a_table_of_many_classes_says_how_many_it_leaves_out():
    found = Confusion(tuple(map(str, range(33))), np.eye(33, dtype=np.int64))
    table, more = found.text()
    assert len(table.rows) == 30
    assert more == "3 smaller classes are not shown; --json has all"

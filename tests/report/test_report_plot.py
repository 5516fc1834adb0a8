from __future__ import annotations

import builtins
import shutil
from datetime import date

import anndata
import numpy as np
import pandas as pd
import pytest

from scshards.base.errors import ConfigError, SourceError
from scshards.base.pictures import pyplot
from scshards.report.curves import Curves, draw, panels
from scshards.report.plot import first_two_components, plot
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import MetricsLog, read_metrics
from scshards.training.save.folder import RunFolder

PNG = b"\x89PNG"
RATES = {
    "lr": 1e-3,
    "grad_norm": 3.0,
    "cells_per_s": 170.0,
    "data_wait": 0.01,
    "memory_bytes": 9**9,
}
COUNTS = {"n_masked": 100, "n_cells": 10, "is_best": True}


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(TrainConfig().tables(), "shards")
    log = MetricsLog(folder.metrics, 0)
    for step in range(10, 301, 10):
        mse = 29 + 300 * np.exp(-step / 20)
        log.write(
            "train", step, epoch=step / 100, loss=2 * mse, masked_mse=mse, new_term=mse, **RATES
        )
        if step % 50 == 0:
            held_out = 28.5 + 30 * np.exp(-step / 60)
            log.write("valid", step, epoch=step / 100, masked_mse=held_out, **COUNTS)
    folder.write("evaluation.json", {"gene_mean": 34.9, "cell_mean": 41.2})
    return folder.path


@pytest.fixture
def embedding(tmp_path):
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 12, 400)
    centres = rng.normal(size=(12, 16)) * 4
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical([f"kind {k}" for k in kind]),
            "depth": rng.integers(500, 9000, 400),
            "patient": [None if k == 3 else f"P{k % 3}" for k in kind],
        },
        index=[f"c{i}" for i in range(400)],
    )
    data = anndata.AnnData(np.ones((400, 3), np.float32), obs=obs)
    data.obsm["X_pca"] = np.zeros((400, 3))
    data.obsm["X_scshards"] = (centres[kind] + rng.normal(size=(400, 16))).astype(np.float32)
    data.write_h5ad(tmp_path / "cells.h5ad")
    return str(tmp_path / "cells.h5ad")


@pytest.mark.parametrize("colors", [[], ["kind"], ["depth"], ["patient"]])
def test_a_picture_comes_out(run, embedding, tmp_path, colors):
    out = plot(str(run), str(tmp_path / "run.png"), embeddings=[embedding], colors=colors)
    assert out.read_bytes()[:4] == PNG


def test_everything_that_a_run_measured_has_a_panel(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    rates = dict.fromkeys(("lr", "grad_norm", "cells_per_s", "tokens_per_s", "data_wait"), 0.5)
    log.write(
        "train", 1, steps=1, loss=4.0, masked_mse=2.0, new_term=2.0, memory_bytes=9**9, **rates
    )
    log.write("train", 2, steps=1, loss=3.0, masked_mse=1.0, new_term=2.0, mfu=0.4, **rates)
    log.write("valid", 2, masked_mse=3.0, accuracy=0.5, pca_accuracy=0.25, metric_cells=9, **COUNTS)
    curves = Curves(
        name="run",
        data="cells",
        day="2026-11-30",
        metrics=read_metrics(tmp_path / "metrics.jsonl"),
        baselines={},
    )
    assert [p.key for p in panels([curves])] == [
        *("masked_mse", "new_term", "loss", "accuracy"),
        *("lr", "grad_norm", "cells_per_s", "tokens_per_s", "mfu", "data_wait", "memory_bytes"),
    ]
    figure, axes = pyplot().subplots(11)
    for ax, panel in zip(axes, panels([curves]), strict=True):
        draw(ax, panel, [curves])
    drawn = {ax.get_title(): [line.get_xydata().tolist() for line in ax.lines] for ax in axes}
    assert drawn["Masked values"] == [[[1, 2], [2, 1]], [[2, 3]], [[2, 0], [2, 1]]]
    best = [[2, 0], [2, 1]]  # from the bottom to the top, at the step of the best model
    assert drawn["Accuracy of classes"] == [[[2, 0.5]], best, [[0, 0.25], [1, 0.25]]]
    assert drawn["Model FLOP/s utilization"] == [[[2, 40]]]
    assert drawn["Waiting for data"] == [[[1, 50], [2, 50]]]
    pyplot().close(figure)


def test_held_out_sets_are_drawn_beside_the_valid_split(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step, loss in ((1, 4.0), (2, 3.0)):
        log.write("train", step, masked_mse=loss)
        both = {"masked_mse": loss + 1, "old/masked_mse": loss + 2, "old/n_masked": 9}
        log.write(
            "valid", step, **both, probe_cells=9, **{"far/avg_bio": 0.5, "far/pca_avg_bio": 0.4}
        )
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    curves = Curves(name="run", data="cells", day="2026-11-30", metrics=metrics, baselines={})
    assert [p.key for p in panels([curves])] == ["masked_mse", "avg_bio"]
    figure, axes = pyplot().subplots(2)
    for ax, panel in zip(axes, panels([curves]), strict=True):
        draw(ax, panel, [curves])
    drawn = {line.get_label(): line.get_xydata().tolist() for ax in axes for line in ax.lines}
    assert drawn["held-out cells (best 4)"] == [[1, 5], [2, 4]]
    assert drawn["old"] == [[1, 6], [2, 5]] and drawn["far"] == [[1, 0.5], [2, 0.5]]
    pyplot().close(figure)


def test_the_axes_hold_what_the_lines_say(run):
    curves = Curves(
        name="run",
        data="cells",
        day="2026-11-30",
        metrics=read_metrics(RunFolder(run).metrics),
        baselines={"gene_mean": 34.9},
    )
    figure, ax = pyplot().subplots()
    draw(ax, panels([curves])[0], [curves])
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    assert lines["training cells"].shape == (30, 2)
    best = 28.5 + 30 * np.exp(-5)
    assert lines[f"held-out cells (best {best:.1f})"][-1] == pytest.approx([300, best])
    assert lines["each gene's mean (34.9)"][0, 1] == 34.9
    assert lines["best model (step 300)"][:, 0].tolist() == [300, 300]
    low, high = ax.get_ylim()
    assert 20 < low < best, "the first, high losses leave the top"
    assert 42 < high < 100
    pyplot().close(figure)


def test_one_far_value_does_not_flatten_a_loss(run):
    log = MetricsLog(RunFolder(run).metrics, 300)
    for step in range(301, 401):
        log.write("train", step, epoch=3.0, masked_mse=1000.0 if step == 350 else 30.0)
    metrics = read_metrics(RunFolder(run).metrics)
    curves = Curves(name="run", data="cells", day="2026-11-30", metrics=metrics, baselines={})
    figure, ax = pyplot().subplots()
    draw(ax, panels([curves])[0], [curves])
    assert ax.get_ylim()[1] < 200
    pyplot().close(figure)


def test_a_picture_says_what_it_is_of(run, embedding, tmp_path, monkeypatch):
    """Read as text, from an SVG."""
    monkeypatch.setitem(pyplot().rcParams, "svg.fonttype", "none")
    data = anndata.read_h5ad(embedding)
    counts = data.obs["kind"].value_counts()
    data.obsm["X_umap"] = np.stack([np.arange(400.0), np.arange(400.0)], axis=1)
    data.write_h5ad(embedding)
    out = plot(
        *(str(run), str(tmp_path / "run.svg")),
        **{"embeddings": [embedding], "colors": ["kind"], "layout": "X_umap"},
    )
    text = out.read_text()
    day = date.fromtimestamp(RunFolder(run).metrics.stat().st_mtime).isoformat()
    assert f"run on shards, step 300, {day}" in text
    assert f"{counts.index[0]} ({counts.iloc[0]})" in text
    assert "X_umap 1" in text and "PC 1" not in text
    with pytest.raises(SourceError, match="two columns"):
        plot(str(run), str(out), embeddings=[embedding], layout="X_pca")


def test_several_runs_come_in_one_picture(run, tmp_path):
    other = tmp_path / "other" / "run"
    shutil.copytree(run, other)
    out = plot([str(run), str(other)], str(tmp_path / "both.png"))
    assert out.read_bytes()[:4] == PNG
    with pytest.raises(ConfigError, match="several runs"):
        plot([str(run), str(other)])
    alone = plot(str(run))
    assert alone == run / "curves.png"
    assert alone.read_bytes()[:4] == PNG


def test_a_run_without_metrics_is_refused(run):
    RunFolder(run).metrics.write_text("")
    with pytest.raises(ConfigError, match="no metrics yet"):
        plot(str(run))


def test_panels_and_colours_are_paired(run, embedding, tmp_path):
    out = str(tmp_path / "run.png")
    plot(str(run), out, embeddings=[embedding, embedding], colors=["kind", "depth"])
    plot(str(run), out, embeddings=[embedding, embedding], colors=["kind"])
    with pytest.raises(ConfigError, match="3 --color for 2 --embedding"):
        plot(str(run), out, embeddings=[embedding] * 2, colors=["kind"] * 3)


def test_a_picture_of_a_run_without_evaluation(run, tmp_path):
    (run / "evaluation.json").unlink()
    assert plot(str(run), str(tmp_path / "run.png")).read_bytes()[:4] == PNG


def test_what_is_missing_is_named(run, embedding, tmp_path):
    out = str(tmp_path / "run.png")
    with pytest.raises(SourceError) as e:
        plot(str(run), out, embeddings=[embedding], colors=["knd"])
    assert "did you mean 'kind'" in str(e.value)
    bare = anndata.AnnData(np.ones((3, 3), np.float32))
    bare.write_h5ad(tmp_path / "bare.h5ad")
    with pytest.raises(SourceError, match="X_scshards"):
        plot(str(run), out, embeddings=[str(tmp_path / "bare.h5ad")])
    with pytest.raises(SourceError):
        plot(str(run), out, embeddings=[str(tmp_path / "absent.h5ad")])
    with pytest.raises(ConfigError, match="not the folder of a run"):
        plot(str(tmp_path), out)


def test_without_matplotlib_the_extra_is_named(run, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError) as e:
        plot(str(run), str(tmp_path / "run.png"))
    assert "pip install 'scshards[plot]'" in str(e.value)


def test_principal_components_are_those_of_the_covariance():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 5)) * [1, 5, 2, 0.5, 3] + 7
    xy, share = first_two_components(x)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    top = values[::-1][:2]
    np.testing.assert_allclose(xy.var(axis=0, ddof=1), top, rtol=1e-9)
    np.testing.assert_allclose(share, top / values.sum(), rtol=1e-9)
    np.testing.assert_allclose(
        np.abs(xy), np.abs((x - x.mean(axis=0)) @ vectors[:, ::-1][:, :2]), rtol=1e-7, atol=1e-9
    )

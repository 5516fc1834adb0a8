from __future__ import annotations

import builtins

import anndata
import numpy as np
import pandas as pd
import pytest

from scshards.base.errors import ConfigError, SourceError
from scshards.train.config import TrainConfig
from scshards.train.folder import RunFolder
from scshards.train.metrics import MetricsLog
from scshards.train.plot import plot, principal_components

PNG = b"\x89PNG"


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(TrainConfig(), "shards")
    log = MetricsLog(folder.metrics, 0)
    for step in range(10, 301, 10):
        log.write("train", step, masked_mse=29 + 300 * np.exp(-step / 20))
        if step % 50 == 0:
            log.write("valid", step, masked_mse=28.5 + 30 * np.exp(-step / 60))
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
    data.obsm["X_scshards"] = (centres[kind] + rng.normal(size=(400, 16))).astype(np.float32)
    data.write_h5ad(tmp_path / "cells.h5ad")
    return str(tmp_path / "cells.h5ad")


@pytest.mark.parametrize("colors", [[], ["kind"], ["depth"], ["patient"]])
def test_a_picture_comes_out(run, embedding, tmp_path, colors):
    out = plot(str(run), str(tmp_path / "run.png"), embeddings=[embedding], colors=colors)
    assert out.read_bytes()[:4] == PNG


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
    xy, share = principal_components(x)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    top = values[::-1][:2]
    np.testing.assert_allclose(xy.var(axis=0, ddof=1), top, rtol=1e-9)
    np.testing.assert_allclose(share, top / values.sum(), rtol=1e-9)
    np.testing.assert_allclose(
        np.abs(xy), np.abs((x - x.mean(axis=0)) @ vectors[:, ::-1][:, :2]), rtol=1e-7, atol=1e-9
    )

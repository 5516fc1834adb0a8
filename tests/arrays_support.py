"""Inputs with arrays beside the genes, and what they hold by anndata's own word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from pack_support import counts, quiet_pack, vocab_of

N_GENES, ANTIBODIES = 12, ["CD3", "CD4", "CD8"]
ALL: dict[str, Any] = {
    "obsm": ("X_pca", "protein", "spots"),
    "feature_arrays": ("Antibody Capture",),
}
"""The options that pack keeps every array by."""

Numbers = Mapping[str, Any]


def cells_with_arrays(n: int, *, seed: int = 0) -> anndata.AnnData:
    """Cells with genes and antibodies in X, and dense, tabular and sparse elements of obsm."""
    rng = np.random.default_rng(seed)
    x = counts(n, N_GENES + len(ANTIBODIES), seed=seed)
    names = [f"G{i:03d}" for i in range(N_GENES)] + ANTIBODIES
    types = ["Gene Expression"] * N_GENES + ["Antibody Capture"] * len(ANTIBODIES)
    obs = pd.DataFrame(
        {"donor": rng.choice(["a", "b", "c"], n)}, index=[f"c{seed}-{i}x" for i in range(n)]
    )
    a = anndata.AnnData(
        sp.csr_matrix(x), obs=obs, var=pd.DataFrame({"feature_types": types}, index=names)
    )
    pca = rng.normal(size=(n, 5)).astype(np.float32)
    pca[::7, 2] = np.nan
    a.obsm["X_pca"] = pca
    a.obsm["protein"] = pd.DataFrame(
        rng.integers(-3, 90, (n, 3)) / 4, columns=["p1", "p 2", "p3"], index=a.obs_names
    )
    a.obsm["spots"] = sp.random(n, 400, 0.05, format="csr", random_state=seed, dtype=np.float64)
    return a


def numbers_of(a: anndata.AnnData) -> dict[str, Any]:
    """Every array as [cells, width], by its name in a shard set."""
    x = a.X.toarray()
    return {
        "X_pca": a.obsm["X_pca"],
        "protein": a.obsm["protein"].to_numpy(),
        "spots": a.obsm["spots"].toarray().astype(np.float32),
        "Antibody Capture": x[:, N_GENES:].astype(np.int32),
    }


def assert_numbers(found: Numbers, numbers: Numbers, row: int) -> None:
    """The arrays of a cell, each [width], are those of a row, to the last bit of what is no -0."""
    for name, of in found.items():
        want = numbers[name][row]
        assert of.dtype == want.dtype and of.shape == want.shape, name
        assert np.array_equal(of, want, equal_nan=of.dtype.kind == "f"), name


def packed(folder: Path, n: int = 60, *, name: str = "set", **options: Any) -> tuple[Path, Numbers]:
    """A set of one input with all arrays, and its numbers."""
    a = cells_with_arrays(n)
    path = folder / "a.h5ad"
    if not path.exists():
        a.write_h5ad(path)
    made = {**ALL, "cells_per_shard": 16, "obs": ("donor",), **options}
    quiet_pack(path, folder / name, vocab_of(N_GENES), **made)
    return folder / name, numbers_of(a)

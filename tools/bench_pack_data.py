"""The h5ad files that tools/bench_pack measures on: like real ones in what costs time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp

GENES = 36_000
NAMES = [f"G{i:05d}" for i in range(GENES)]

_TABLE = 1 << 20


def dense_cells(cells: int, *, seed: int, depth: int = 4500, least: int = 500) -> sp.csr_matrix:
    """Libraries of lognormal depth, `depth` its median, drawn from a power law of genes.

    A depth of 4,500 gives about 3,500 values a cell.
    """
    rng = np.random.default_rng(seed)
    weights = rng.permutation(1 / np.arange(1, GENES + 1) ** 0.8)
    # Drawing from a table in which a gene stands as often as it is likely is drawing from the weights.
    ends = np.round(np.cumsum(weights) / weights.sum() * _TABLE).astype(int)
    table = np.repeat(np.arange(GENES, dtype=np.int32), np.diff(ends, prepend=0))
    indices, data, indptr = [], [], [0]
    for _ in range(cells):
        drawn = int(np.clip(rng.lognormal(np.log(depth), 0.7), least, 60_000))
        counts = np.bincount(table[rng.integers(0, _TABLE, drawn)], minlength=GENES)
        ids = np.flatnonzero(counts)
        indices.append(ids.astype(np.int32))
        data.append(counts[ids].astype(np.float32))
        indptr.append(indptr[-1] + len(ids))
    return sp.csr_matrix(
        (np.concatenate(data), np.concatenate(indices), np.array(indptr)), shape=(cells, GENES)
    )


def sparse_cells(cells: int, *, seed: int, values: int = 50) -> sp.csr_matrix:
    """Cells of so many values each, for files with many cells."""
    rng = np.random.default_rng(seed)
    gaps = rng.integers(1, GENES // values, (cells, values), dtype=np.int32)
    return sp.csr_matrix(
        (
            rng.integers(1, 9, cells * values).astype(np.float32),
            np.cumsum(gaps, axis=1, dtype=np.int32).reshape(-1),
            np.arange(cells + 1) * values,
        ),
        shape=(cells, GENES),
    )


def write_h5ad(
    path: Path,
    x: sp.csr_matrix,
    *,
    compression: str | None,
    obs: dict[str, list[str]] | None = None,
    obsm: dict[str, np.ndarray] | None = None,
    prefix: str = "c",
) -> None:
    """Write a matrix as h5ad. Genes lie in no order of the vocabulary, as in real files.

    Cells are called `prefix` and their number.
    """
    import anndata
    import pandas as pd

    names = np.random.default_rng(0).permutation(NAMES)
    frame = anndata.AnnData(x, var=pd.DataFrame(index=names))
    frame.obs_names = [f"{prefix}{i}" for i in range(x.shape[0])]
    for name, values in (obs or {}).items():
        frame.obs[name] = pd.Categorical(values)
    for name, rows in (obsm or {}).items():
        frame.obsm[name] = rows
    frame.write_h5ad(path, compression=compression)

"""A shard set with classes and domains, and what the tests of tasks share."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from scshards.cells.vocab import Vocab
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack

GENES = [f"G{i:02d}" for i in range(60)]

FINE = (
    "data.max_length=60",
    "data.shuffle_buffer=64",
    "data.lanes=4",
    "model.d_model=16",
    "model.n_heads=2",
    "model.d_hid=16",
    "model.n_layers=1",
    "model.dropout=0.0",
    "optim.lr=5e-3",
    "run.batch_size=16",
    "run.device=cpu",
)
"""Settings of a model that trains in a second."""


def pack_cells(
    folder: Path,
    n: int = 320,
    *,
    missing: int = 20,
    donors: tuple[str, ...] = ("a", "b"),
    kinds: int = 3,
    seed: int = 5,
) -> str:
    """Cells whose kind sets the rates of genes, and whose donor scales some of them."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, kinds, n)
    donor = rng.integers(0, len(donors), n)
    rates = np.random.default_rng(1).gamma(0.5, 6.0, (kinds, len(GENES)))
    shift = np.where(np.arange(len(GENES)) % 2, 1.0 + donor[:, None], 1.0)
    counts = rng.poisson(rates[kind] * shift * rng.uniform(0.5, 2.0, (n, 1)))
    names = np.array([f"k{k}" for k in kind], object)
    names[:missing] = None
    obs = {
        "kind": pd.Categorical(names),
        "donor": pd.Categorical([donors[d] for d in donor]),
        "age": rng.uniform(20, 80, n),
        "same": pd.Categorical(["one"] * n),
    }
    cells = anndata.AnnData(
        scipy.sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(obs, index=[str(i) for i in range(n)]),
        var=pd.DataFrame(index=GENES),
    )
    folder.mkdir(parents=True, exist_ok=True)
    cells.write_h5ad(folder / "cells.h5ad")
    options = PackOptions(
        obs=("kind", "donor", "age", "same"), valid_fraction=0.25, cells_per_shard=80, workers=1
    )
    pack(
        str(folder / "cells.h5ad"),
        str(folder / "shards"),
        Vocab.from_genes(GENES),
        options,
        progress=False,
    )
    return str(folder / "shards")

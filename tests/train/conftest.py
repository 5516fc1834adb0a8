"""One small shard set for all tests of this folder; one thread, as several processes run at a time."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from scshards.cells.vocab import Vocab
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack

torch.set_num_threads(1)

N_GENES = 60


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    """280 cells of three kinds in a shard set with a valid split; what a gene counts is learnable."""
    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(3)
    kind = rng.integers(0, 3, 280)
    rates = rng.gamma(0.5, 6.0, (3, N_GENES))
    counts = rng.poisson(rates[kind] * rng.uniform(0.3, 2.0, (280, 1)))
    genes = [f"G{i:02d}" for i in range(N_GENES)]
    cells = anndata.AnnData(
        scipy.sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"kind": pd.Categorical([f"k{k}" for k in kind])}, index=map(str, range(280))),
        var=pd.DataFrame(index=genes),
    )  # fmt: skip
    cells.write_h5ad(folder / "cells.h5ad")
    options = PackOptions(obs=("kind",), valid_fraction=0.2, cells_per_shard=50, workers=1)
    pack(
        str(folder / "cells.h5ad"),
        str(folder / "shards"),
        Vocab.from_genes(genes),
        options,
        progress=False,
    )
    return str(folder / "shards")

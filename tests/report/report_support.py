"""A shard set with names that would run if a page did not escape them, and the page of a report, parsed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from pack_support import quiet_pack, vocab_of

HOSTILE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>")
FIRST = "It loads nothing from the network."
N_GENES = 60


def make_set(folder: Path) -> Path:
    """A shard set of two inputs, of which the second names half of its genes otherwise."""
    rng = np.random.default_rng(5)
    for name, n, genes in (("cells", 260, "G{:03d}"), ("other", 90, "X{:03d}")):
        depth = rng.lognormal(0, 0.8, (n, 1))
        x = rng.poisson(rng.gamma(0.4, 3.0, N_GENES) * depth)
        x[:3] = 0
        x[:3, 0] = 1
        kinds = rng.choice(["T cell", "B cell", *HOSTILE], n, p=[0.6, 0.2, 0.1, 0.1]).astype(object)
        kinds[rng.random(n) < 0.15] = None
        obs = pd.DataFrame(
            {
                "kind": pd.Categorical(kinds),
                "donor": pd.Categorical([f"D{i}" for i in rng.integers(0, 9, n)]),
                "age": np.where(rng.random(n) < 0.1, np.nan, rng.uniform(20, 80, n)),
            },
            index=[f"{name}{i}" for i in range(n)],
        )
        names = [("G{:03d}" if i % 5 < 2 else genes).format(i) for i in range(N_GENES)]
        cells = anndata.AnnData(sp.csr_matrix(x.astype(np.float32)), obs, pd.DataFrame(index=names))
        cells.write_h5ad(folder / f"{name}.h5ad")
    quiet_pack(
        [str(folder / "cells.h5ad"), str(folder / "other.h5ad")],
        folder / "set",
        vocab_of(N_GENES),
        obs=("kind", "donor", "age"),
        split_by="donor",
        valid_fraction=0.25,
        cells_per_shard=70,
        min_genes=2,
        min_match=0.1,
        allow_mixed=True,
    )
    return folder / "set"


class Page:
    """A page, and the JSON that it is drawn from."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text("utf-8")
        data = re.search(
            r'<script type="application/json" id="facts">(.*?)</script>', self.text, re.S
        )
        assert data is not None
        self.facts: dict[str, Any] = json.loads(data[1])

    def rows(self, figure: str, choice: str = "") -> list[list[Any]]:
        """The rows of a figure."""
        return self.facts["figures"][figure]["choices"][choice]

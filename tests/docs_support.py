"""Pages of Markdown whose blocks are run: their blocks, and a folder with what the blocks name.

<!-- not run: it needs a GPU -->        before a block of sh or python: why no test runs it
<!-- needs: vl_convert -->             the same: it is run where this module is installed
<!-- output -->                         before a block of text: what the block before printed, where
                                        ... stands for anything
# NAME.toml                             as the first line of a block of toml: a file of that name
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

SHORT = "--set run.steps=20 --set run.eval_every=10"
N_GENES = 50
CENSUS = "the Census"
"""Blocks that need it run on the Census of the tests."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, from 1 on the line of its fence."""

    line: int
    language: str
    text: str
    note: str
    """What the comment before it says."""

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        _, given, reason = self.note.partition("not run:")
        return reason.strip() if given else None

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and self.reason is None

    @property
    def can_run(self) -> bool:
        """Whether it is run here: what it needs is installed."""
        needed = self.note.removeprefix("needs: ")
        is_there = needed in (self.note, CENSUS) or importlib.util.find_spec(needed) is not None
        return self.is_run and is_there

    @property
    def needs_census(self) -> bool:
        return self.note == f"needs: {CENSUS}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.finditer(
        r"^(?:<!-- ((?:(?!-->).)*) -->\n+)?^(`{3,})([^\n]*)\n(.*?)^\2$", page, re.S | re.M
    )
    return [
        Block(
            page.count("\n", 0, m.start(2)) + 1, m[3].strip(), m[4], " ".join((m[1] or "").split())
        )
        for m in found
    ]


def make_cells(folder: Path) -> None:
    """Inputs that pages name: a.h5ad, b.h5ad and new.h5ad by symbols, ensembl.h5ad, cite.h5ad."""
    rng = np.random.default_rng(0)
    symbols = [f"G{i:02d}" for i in range(N_GENES)]
    means = rng.gamma(0.5, 4, (3, N_GENES))
    for name, cells in (("a", 90), ("b", 60), ("new", 40), ("ensembl", 30), ("cite", 30)):
        kind = rng.integers(0, 3, cells)
        obs = pd.DataFrame(
            {
                "cell_type": [f"type {k}" for k in kind],
                "donor_id": [f"donor {i % 6}" for i in range(cells)],
                "tissue": [("lung", "gut", "skin")[i // 6 % 3] for i in range(cells)],
                "is_doublet": rng.random(cells) < 0.1,
                "pct mito": rng.uniform(0, 30, cells),
            },
            index=[f"{name}{i}" for i in range(cells)],
        )
        x = rng.poisson(means[kind] + 0.1).astype(np.float32)
        var = pd.DataFrame(index=symbols)
        if name == "ensembl":
            ids = [f"ENSG{i:011d}" for i in range(N_GENES)]
            var = pd.DataFrame({"feature_name": symbols}, index=ids)
        if name == "cite":
            x = np.hstack([x, rng.poisson(20, (cells, 3)).astype(np.float32)])
            var = pd.DataFrame(index=[*symbols, "CD3", "CD4", "CD8"])
            var["feature_types"] = ["Gene Expression"] * N_GENES + ["Antibody Capture"] * 3
        made = anndata.AnnData(sp.csr_matrix(x), obs=obs, var=var)
        if name == "cite":
            made.obsm["protein_expression"] = rng.normal(size=(cells, 4))
        made.write_h5ad(folder / f"{name}.h5ad")


def run_shell(commands: str, folder: Path, python: str, env: dict[str, str] | None = None) -> str:
    """What commands print; one that fails fails the test. Trainings by a config are cut short."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", re.sub(r"(--config \w+)", rf"\1 {SHORT}", commands)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | (env or {})
        | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}", "PYTHON_EXEC": python},
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout

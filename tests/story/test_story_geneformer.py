"""Story: the blocks of docs/howto/geneformer.md, run as they stand there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import anndata
import docs_support
import numpy as np
import pandas as pd
import scipy.sparse as sp

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "geneformer.md").read_text()


def blocks(language: str) -> list[str]:
    return [b.text for b in docs_support.blocks(PAGE) if b.language == language and not b.reason]


def test_the_how_to_runs_as_it_stands(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 4.0, 60), (200, 60)).astype(np.float32)
    counts[np.arange(200), np.arange(200) % 60] += 1  # every cell and every gene has some
    anndata.AnnData(
        sp.csr_matrix(counts),
        obs=pd.DataFrame(
            {"donor": [f"d{i % 4}" for i in range(200)]}, index=[f"c{i}" for i in range(200)]
        ),
        var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(60)]),
    ).write_h5ad(tmp_path / "cells.h5ad")
    (commands,) = blocks("sh")
    stream, train = blocks("python")
    checks = (
        "assert n_tokens == 60 + 5 and not batch.left_out.any()\n"
        "assert (batch.targets >= 0).any() and inputs['input_ids'].shape == (12, batch.genes.shape[1])\n"
    )
    has_transformers = importlib.util.find_spec("transformers") is not None
    trained = train + "print('trained', loss.item())\n" if has_transformers else ""
    (tmp_path / "howto.py").write_text(stream + checks + trained)
    python = Path(sys.executable)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    script = commands.replace("scshards ", f"{python} -m scshards ") + f"{python} howto.py\n"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "medians.json: medians of 60 genes" in done.stdout
    assert ("trained " in done.stdout) == has_transformers

"""Story: the Slurm example packs an atlas, under a stand-in for sbatch that runs jobs as they come."""

from __future__ import annotations

import subprocess
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from fake_slurm import jobs, log, slurm_environment

from scshards import Vocab, verify

EXAMPLE = Path(__file__).parents[2] / "examples" / "slurm" / "pack.sh"


def test_the_slurm_example(tmp_path: Path, python: str) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        x = sp.csr_matrix(rng.poisson(1.0, (50, 20)).astype(np.float32))
        names = pd.DataFrame(index=[f"G{j}" for j in range(20)])
        anndata.AnnData(x, var=names).write_h5ad(tmp_path / f"{i}.h5ad")
    (tmp_path / "vocab.json").write_bytes(Vocab.from_genes(f"G{j}" for j in range(20)).to_json())
    line = [
        "bash", str(EXAMPLE), str(tmp_path / "*.h5ad"), "-o", str(tmp_path / "out"),
        "--vocab", str(tmp_path / "vocab.json"), "--cells-per-shard", "20",
    ]  # fmt: skip
    env = slurm_environment(tmp_path, python) | {"SHARES": "3"}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "submitted: 1 (cells), then 2 (shards), then 3 (manifest)" in done.stdout
    assert jobs(tmp_path) == [0, 0, 0], log(tmp_path)
    assert "share 1/3 is done for this round; the whole is not finished yet:" in log(tmp_path)
    assert "--share $I/3; done" in log(tmp_path) and "--finish in place of" in log(tmp_path)
    report = verify(tmp_path / "out", progress=False)
    assert report.ok and report.cells == 150

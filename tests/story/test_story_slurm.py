"""Story: the Slurm example packs an atlas, under a stand-in for sbatch that runs jobs as they come."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scshards import Vocab, verify

EXAMPLE = Path(__file__).parents[2] / "examples" / "slurm" / "pack.sh"

# Runs the tasks of an array at once, a single job alone, and refuses to begin after a failure.
SBATCH = """#!/usr/bin/env bash
set -u
array=; dependency=
while :; do
  case "$1" in
    --parsable) ;;
    --array=1-*) array=${{1#--array=1-}} ;;
    --dependency=afterok:*) dependency=${{1#--dependency=afterok:}} ;;
    *) break ;;
  esac
  shift
done
n=$(ls "{jobs}" | wc -l); id=$((n + 1))
if [ -n "$dependency" ] && [ "$(cat "{jobs}/$dependency")" != 0 ]; then echo 1 > "{jobs}/$id"; echo $id; exit; fi
code=0
if [ -n "$array" ]; then
  pids=
  for i in $(seq "$array"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=$array SLURM_CPUS_PER_TASK=1 bash "$@" >> "{log}" 2>&1 &
    pids="$pids $!"
  done
  for pid in $pids; do wait "$pid" || code=1; done
else
  SLURM_CPUS_PER_TASK=2 bash "$@" >> "{log}" 2>&1 || code=1
fi
echo $code > "{jobs}/$id"
echo $id
"""


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "jobs").mkdir()
    scripts = {
        "sbatch": SBATCH.format(jobs=tmp_path / "jobs", log=tmp_path / "log.txt"),
        "scshards": f'#!/usr/bin/env bash\nexec "{sys.executable}" -m scshards "$@"\n',
    }
    for name, text in scripts.items():
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def test_the_slurm_example(tmp_path: Path, bin_folder: Path) -> None:
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
    env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "SHARES": "3"}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=240)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stderr
    assert "submitted: 1 (cells), then 2 (shards), then 3 (manifest)" in done.stdout
    assert [p.read_text() for p in sorted((tmp_path / "jobs").iterdir())] == ["0\n"] * 3, log
    assert "share 3 of 3: " in log and "run --finish" in log
    report = verify(tmp_path / "out", progress=False)
    assert report.ok and report.cells == 150

"""Story: the Slurm example trains, is told that its time is up, is queued again and finishes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scshards import Vocab
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack
from scshards.training.log.metrics import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"

# A cluster of one node: srun runs its command here, scontrol knows its name and notes a requeue.
SCRIPTS = {
    "srun": 'shift\necho $$ > "{folder}/srun.pid"\nexec "$@"\n',
    "torchrun": 'exec "{python}" -m torch.distributed.run "$@"\n',
    "scontrol": (
        'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "{folder}/requeued"; fi\n'
    ),
}

FAILS = """#!/usr/bin/env bash
if [ "$1" = --help ]; then echo --shutdown-timeout; else exit 1; fi
"""
"""A torchrun whose ranks are refused something."""

SETTINGS = (
    "data.max_length=20",
    "data.lanes=2",
    "model.d_model=8",
    "model.n_heads=2",
    "model.d_hid=8",
    "model.n_layers=1",
    "model.dropout=0",
    "run.batch_size=8",
    "run.log_every=1",
    "run.device=cpu",
)


@pytest.fixture
def cluster(tmp_path: Path, python: str) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in SCRIPTS.items():
        path = folder / name
        path.write_text("#!/usr/bin/env bash\n" + text.format(folder=tmp_path, python=python))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": "17",
        "PORT": "0",
        "PYTHON_EXEC": python,
    }


def test_a_job_whose_time_is_up_is_queued_again_and_finishes(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    rng = np.random.default_rng(0)
    cells = sp.csr_matrix(rng.poisson(1.0, (64, 20)).astype(np.float32))
    names = [f"G{j}" for j in range(20)]
    anndata.AnnData(cells, var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "cells.h5ad")
    options = PackOptions(workers=1)
    shards, run = str(tmp_path / "shards"), tmp_path / "run"
    pack(str(tmp_path / "cells.h5ad"), shards, Vocab.from_genes(names), options, progress=False)

    def line(steps: int) -> list[str]:
        words = [x for s in (*SETTINGS, f"run.steps={steps}") for x in ("--set", s)]
        return ["bash", str(EXAMPLE), shards, "-o", str(run), *words]

    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(line(1_000_000), env=cluster, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 600
            while len(read_metrics(run / "metrics.jsonl")) < 3:
                assert job.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, "training did not start"
                time.sleep(0.1)
            # As Slurm does without B: to what srun started, not to the script.
            os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
            code = job.wait(timeout=600)
        finally:
            if job.poll() is None:
                job.kill()
                job.wait()
    assert code == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    stopped = json.loads((run / "STOPPED").read_text())
    assert stopped["signal"] == "SIGUSR1"

    last = stopped["step"] + 5
    done = subprocess.run(line(last), env=cluster, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"step {last:,} of {last:,}" in done.stdout
    assert not (run / "STOPPED").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", "a run that is done stays done"

    (run / "STOPPED").write_text("{}")  # as an earlier job may have left it
    (tmp_path / "bin" / "torchrun").write_text(FAILS)
    assert subprocess.run(line(last), env=cluster, capture_output=True, timeout=60).returncode == 1
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_a_torchrun_that_gives_no_time_to_save_is_refused_at_the_start(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    """As that of torch 2.10, which has the one option and not the other."""
    (tmp_path / "bin" / "torchrun").write_text(
        "#!/usr/bin/env bash\necho '--signals-to-handle S'\n"
    )
    line = ["bash", str(EXAMPLE), "shards", "-o", str(tmp_path / "run")]
    done = subprocess.run(line, env=cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "needs torch 2.12 or later" in done.stderr
    assert not (tmp_path / "srun.pid").exists()

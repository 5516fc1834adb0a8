"""The golden runs of tests/golden: their cells, their settings, and how they were made.

    python tests/training/golden_run.py FOLDER      writes FOLDER/run_pretrain and FOLDER/run_integrate

What is there was written by an early version and is never made again: a version that can't go on with
it has lost the runs of its users. Read by test_training_versions.py.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import torch

from scshards.cells.vocab import Vocab
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack
from scshards.training.config import TrainConfig
from scshards.training.loop import train

COMMON = (
    "data.max_length=16",
    "data.shuffle_buffer=16",
    "data.lanes=2",
    "model.d_model=8",
    "model.n_heads=2",
    "model.d_hid=8",
    "model.n_layers=1",
    "model.dropout=0",
    "optim.lr=3e-3",
    "run.batch_size=8",
    "run.log_every=1",
    "run.eval_every=2",
    "run.save_every=2",
    "run.device=cpu",
)

RUNS = {
    "run_pretrain": (*COMMON, "optim.ema=0.9"),
    "run_integrate": (
        *COMMON,
        "task.name=integrate",
        "task.domain=donor",
        "task.label=kind",
        "task.metric_cells=0",
    ),
}
"""{folder: its settings}; they were stopped after 2 steps."""


def golden_shards(folder: Path) -> str:
    """100 cells of 20 genes, by arithmetic alone, so that they are the same ones for ever."""
    cell, gene = np.meshgrid(np.arange(100), np.arange(20), indexing="ij")
    mixed = (cell * 7919 + gene * 104729 + cell * gene * 31) % 1009
    counts = np.where(mixed % 5 < 3, 1 + mixed % (2 + (gene + cell % 3 * 5) % 11), 0)
    obs = {
        "kind": pd.Categorical([f"k{c % 3}" for c in range(100)]),
        "donor": pd.Categorical([f"d{c % 2}" for c in range(100)]),
    }
    genes = [f"G{i:02d}" for i in range(20)]
    cells = anndata.AnnData(
        scipy.sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(obs, index=[str(i) for i in range(100)]),
        var=pd.DataFrame(index=genes),
    )
    cells.write_h5ad(folder / "cells.h5ad")
    pack(
        str(folder / "cells.h5ad"),
        str(folder / "shards"),
        Vocab.from_genes(genes),
        PackOptions(obs=("kind", "donor"), valid_fraction=0.2, cells_per_shard=30, workers=1),
        progress=False,
    )
    return str(folder / "shards")


def main(out: str) -> None:
    to = Path(out).resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # a run says where its shards are: nobody's folders are to be in there
        golden_shards(Path())
        for name, settings in RUNS.items():
            train("shards", name, TrainConfig.read(None, [*settings, "run.steps=2"]), shown=False)
            shutil.copytree(name, to / name)
            # What it comes to when it goes on: beside it, and not in it.
            train("shards", name, TrainConfig.read(None, [*settings, "run.steps=4"]), shown=False)
            shutil.copy(Path(name) / "metrics.jsonl", to / f"{name}_on.jsonl")


if __name__ == "__main__":
    main(sys.argv[1])

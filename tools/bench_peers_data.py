"""The cells that tools/bench_peers gives to all: h5ad files, made once and kept in a folder."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
from bench_pack_data import dense_cells, write_h5ad
from peers.contract import CONTROL, DRUG, LINE

LINES, DRUGS = 4, 40
CONTROLS = 0.1
A_DRUG = 125
"""Cells of a perturbation in a line, about, as long as DRUGS are enough."""

RECIPE = 1
"""To be raised when the cells change, so that older ones are not taken for them."""


def files(folder: Path, cells: int) -> list[Path]:
    """The h5ad files of so many cells: one a cell line, sorted by perturbation, uncompressed."""
    made = folder / f"cells{RECIPE}-{cells}"
    if not made.exists():
        print(f"making {cells:,} cells in {made}", file=sys.stderr, flush=True)
        making = made.with_suffix(f".making{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for line in range(LINES):
            n = cells // LINES + (line < cells % LINES)
            write_h5ad(
                making / f"{LINE}{line}.h5ad",
                dense_cells(n, seed=line),
                compression=None,
                obs={LINE: [f"{LINE}{line}"] * n, DRUG: _drugs(n, line)},
                prefix=f"{LINE}{line}-c",
            )
        making.rename(made)
    return sorted(made.glob("*.h5ad"))


def _drugs(n: int, line: int) -> list[str]:
    """Each cell's perturbation, in ascending order; the control first."""
    rng = np.random.default_rng(line)
    drugs = int(np.clip(n // A_DRUG, 2, DRUGS))
    is_control = rng.random(n) < CONTROLS
    drawn = np.where(is_control, 0, rng.integers(1, drugs + 1, n))
    names = [CONTROL, *(f"d{i:02d}" for i in range(1, drugs + 1))]
    return [names[i] for i in np.sort(drawn)]

"""Batches for the model's tests, and what scGPT's own code computed from some (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scshards.cells.batch import Batch

NEAR = {"atol": 1e-5, "rtol": 1e-5}


def as_batch(
    genes_BL: Tensor,
    values_BL: Tensor,
    is_pad_BL: Tensor,
    targets_BL: Tensor | None = None,
    is_masked_BL: Tensor | None = None,
) -> Batch:
    n = len(genes_BL)
    return Batch(
        genes=genes_BL,
        values=values_BL,
        targets=values_BL if targets_BL is None else targets_BL,
        is_masked=torch.zeros_like(is_pad_BL) if is_masked_BL is None else is_masked_BL,
        is_pad=is_pad_BL,
        keys=torch.arange(n),
        labels={},
        weight=torch.ones(n),
    )


def golden_io(folder: Path) -> dict[str, Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(folder / "io.npz").items()}


def golden_batch(io: dict[str, Tensor]) -> Batch:
    names = ("genes", "values", "is_pad", "targets", "is_masked")
    return as_batch(*(io[f"in_{name}"] for name in names))

"""Batches for the model's tests, and what scGPT's own code computed from some (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scshards.cells.batch import Batch, GenerateBatch, PackedBatch

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
        key=torch.arange(n),
        labels={},
        weight=torch.ones(n),
    )


def golden_io(folder: Path) -> dict[str, Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(folder / "io.npz").items()}


def golden_batch(io: dict[str, Tensor]) -> Batch:
    names = ("genes", "values", "is_pad", "targets", "is_masked")
    return as_batch(*(io[f"in_{name}"] for name in names))


def golden_generate(io: dict[str, Tensor]) -> GenerateBatch:
    return GenerateBatch(
        known_genes=io["in_pcpt_gene"],
        known_values=io["in_pcpt_expr"],
        known_is_pad=io["in_pcpt_is_pad"],
        unknown_genes=io["in_gen_gene"],
        unknown_targets=io["in_gen_expr_target"],
        unknown_is_pad=io["in_gen_is_pad"],
        ratio=0.4,
        key=torch.arange(6),
        labels={},
        weight=torch.ones(6),
    )


def split_batch(known: Batch, unknown: Batch) -> GenerateBatch:
    """The genes of one batch known, of another unknown."""
    return GenerateBatch(
        known_genes=known.genes,
        known_values=known.values,
        known_is_pad=known.is_pad,
        unknown_genes=unknown.genes,
        unknown_targets=unknown.values,
        unknown_is_pad=unknown.is_pad,
        ratio=0.5,
        key=known.key,
        labels={},
        weight=known.weight,
    )


def packed_batch(batch: Batch, n_tokens: int, max_seqlen: int) -> PackedBatch:
    """The same cells one behind another, in `n_tokens` tokens."""
    is_real = ~batch.is_pad
    rest = n_tokens - int(is_real.sum())

    def pack(x_BL: Tensor, fill: float) -> Tensor:
        return torch.cat([x_BL[is_real], torch.full((rest,), fill, dtype=x_BL.dtype)])

    ends = is_real.sum(1).cumsum(0)
    return PackedBatch(
        genes=pack(batch.genes, int(batch.genes.max())),
        values=pack(batch.values, -2.0),
        targets=pack(batch.targets, -2.0),
        is_masked=pack(batch.is_masked, False),
        is_pad=torch.arange(n_tokens) >= ends[-1],
        cu_seqlens=torch.cat([torch.zeros(1), ends]).int(),
        max_seqlen=max_seqlen,
        key=batch.key,
        labels=batch.labels,
        weight=batch.weight,
    )

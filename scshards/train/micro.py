"""A batch in micro-batches, and how many tokens a batch of any kind has.

Called by the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.transformer import AnyBatch


def cut(batch: AnyBatch, rows: int) -> Iterator[AnyBatch]:
    """The batch in pieces of `rows` cells, each only as wide as its own longest cell.

    Raises
    ------
    ConfigError
        For packed cells in more than one piece: their batches have one shape, and pieces don't.
    """
    if rows >= len(batch):
        yield batch
        return
    if isinstance(batch, PackedBatch):
        raise ConfigError(
            "packed batches are not cut into micro-batches",
            where="run.micro_batch",
            advice="leave run.micro_batch out, and use a smaller run.batch_size",
        )
    for i in range(0, len(batch), rows):
        r = slice(i, i + rows)
        pieces: dict[str, Any] = {
            "key": batch.key[r],
            "labels": {k: v[r] for k, v in batch.labels.items()},
            "weight": batch.weight[r],
        }
        for is_pad, names in _per_token(batch):
            width = int((~getattr(batch, is_pad)[r]).sum(dim=1).max())
            pieces |= {name: getattr(batch, name)[r, :width] for name in (is_pad, *names)}
        yield dataclasses.replace(batch, **pieces)


def token_counts(batch: AnyBatch) -> tuple[int, int]:
    """Tokens of a batch without and with padding."""
    pads = _pads(batch)
    return sum(int((~p).sum()) for p in pads), sum(p.numel() for p in pads)


def _per_token(batch: Batch | GenerateBatch) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if isinstance(batch, GenerateBatch):
        return (
            ("known_is_pad", ("known_genes", "known_values")),
            ("unknown_is_pad", ("unknown_genes", "unknown_targets")),
        )
    return (("is_pad", ("genes", "values", "targets", "is_masked")),)


def _pads(batch: AnyBatch) -> tuple[Tensor, ...]:
    if isinstance(batch, GenerateBatch):
        return batch.known_is_pad, batch.unknown_is_pad
    return (batch.is_pad,)

"""A batch in micro-batches, and how many tokens a batch of any kind has room for.

Called by the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.transformer import AnyBatch


def cut(batch: AnyBatch, rows: int, *, sent: AnyBatch | None = None) -> Iterator[AnyBatch]:
    """The batch in pieces of `rows` cells, each only as wide as its own longest cell.

    Parameters
    ----------
    batch
        On the CPU, where the lengths of its cells are read.
    sent
        The same batch on a device, whose pieces are wanted.

    Raises
    ------
    ConfigError
        For packed cells in more than one piece: their batches have one shape, and pieces don't.
    """
    source = batch if sent is None else sent
    if rows >= len(batch):
        yield source
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
            "labels": {k: v[r] for k, v in source.labels.items()},
            "weight": source.weight[r],
        }
        for is_pad, names in _per_token(batch):
            width = int((~getattr(batch, is_pad)[r]).sum(dim=1).max())
            pieces |= {name: getattr(source, name)[r, :width] for name in (is_pad, *names)}
        yield dataclasses.replace(source, **pieces)


def padded_tokens(batch: AnyBatch) -> int:
    """Tokens of a batch on any device, with padding."""
    if isinstance(batch, GenerateBatch):
        return batch.known_is_pad.numel() + batch.unknown_is_pad.numel()
    return batch.is_pad.numel()


def _per_token(batch: Batch | GenerateBatch) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if isinstance(batch, GenerateBatch):
        return (
            ("known_is_pad", ("known_genes", "known_values")),
            ("unknown_is_pad", ("unknown_genes", "unknown_targets")),
        )
    return (("is_pad", ("genes", "values", "targets", "is_masked")),)

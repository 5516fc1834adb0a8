"""Batches of any kind cut into fewer cells, or padded to one width; how many tokens fit into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.nn.functional as F

from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.config import ModelConfig
from scshards.model.transformer import AnyBatch

T = TypeVar("T", bound=Batch | GenerateBatch)

_PER_TOKEN = {
    "is_pad": ("genes", "values", "targets", "is_masked"),
    "known_is_pad": ("known_genes", "known_values"),
    "unknown_is_pad": ("unknown_genes", "unknown_targets"),
}
"""{where padding is: what else batches have of each of those tokens}."""


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
    assert not isinstance(source, PackedBatch), "it is the same batch"
    for i in range(0, len(batch), rows):
        yield cells_of(source, slice(i, i + rows), batch)


def cells_of(batch: T, rows: slice, on_cpu: AnyBatch | None = None) -> T:
    """Some cells of a batch, only as wide as the longest of them; `on_cpu` tells their lengths."""
    lengths = batch if on_cpu is None else on_cpu
    pieces: dict[str, Any] = {
        "key": batch.key[rows],
        "labels": {k: v[rows] for k, v in batch.labels.items()},
        "weight": batch.weight[rows],
        "arrays": {k: v[rows] for k, v in batch.arrays.items()},
    }
    for is_pad, names in _parts(batch):
        width = int((~lengths[is_pad][rows]).sum(dim=1).max())
        pieces |= {name: batch[name][rows, :width] for name in (is_pad, *names)}
    return dataclasses.replace(batch, **pieces)


def as_wide(batch: AnyBatch, config: ModelConfig, kept: int = 1) -> AnyBatch:
    """The batch padded to `max_length` tokens a cell, so that compiled code sees one shape.

    Of a GenerateBatch both parts together are, split as a cell of that length is: one shape for each
    ratio. Packed batches have one shape anyway.

    Parameters
    ----------
    kept
        How many tokens of a cell, from `<cls>` on, are never unknown.
    """
    if isinstance(batch, PackedBatch):
        return batch
    widths = [config.max_length]
    if isinstance(batch, GenerateBatch):
        n_unknown = max(int((config.max_length - kept) * batch.ratio), 1)
        widths = [config.max_length - n_unknown, n_unknown]
    wide: dict[str, Any] = {}
    for (is_pad, names), width in zip(_parts(batch), widths, strict=True):
        more = (0, max(width - batch[is_pad].shape[1], 0))
        wide[is_pad] = F.pad(batch[is_pad], more, value=True)
        for name in names:
            is_id, is_flag = name.endswith("genes"), name == "is_masked"
            filler = config.pad_id if is_id else False if is_flag else config.pad_value
            wide[name] = F.pad(batch[name], more, value=filler)
    return dataclasses.replace(batch, **wide)


def padded_tokens(batch: AnyBatch) -> int:
    """Tokens of a batch on any device, with padding."""
    if isinstance(batch, PackedBatch):
        return batch.is_pad.numel()
    return sum(batch[is_pad].numel() for is_pad, _ in _parts(batch))


def _parts(batch: Batch | GenerateBatch) -> list[tuple[str, tuple[str, ...]]]:
    return [(is_pad, names) for is_pad, names in _PER_TOKEN.items() if is_pad in batch]

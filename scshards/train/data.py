"""The loaders of a run: the training stream, and a split read once in a fixed order.

Called by the loop, evaluate and the baselines.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from scshards.cells.batch import Batch
from scshards.shards.shardset import ShardSet
from scshards.stream.loader import CellLoader
from scshards.train.config import DataSettings, TrainConfig
from scshards.train.setup import Ranks

VALID_SEED = 0
"""Seeds the masks of every evaluation, so that runs of any seed are compared on the same values."""


def train_loader(
    root: str,
    config: TrainConfig,
    ranks: Ranks,
    rank_batch: int,
    storage_options: Mapping[str, Any] | None = None,
) -> CellLoader:
    """The shuffled training stream: one batch is this rank's share of one step."""
    data = config.data
    return CellLoader(
        root,
        split="train",
        batch_size=rank_batch,
        seed=config.run.seed,
        **_shape(data),
        **_place(ranks),
        lanes=data.lanes,
        shuffle_buffer=data.shuffle_buffer,
        where=data.where,
        take=data.take,
        weights=data.weights,
        epoch_cells=data.epoch_cells,
        **_reading(data),
        storage_options=storage_options,
    )


def once_loader(
    root: str,
    data: DataSettings,
    ranks: Ranks,
    split: str,
    batch_size: int,
    *,
    max_length: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> CellLoader:
    """Every cell of a split exactly once, with the masks that all evaluations share."""
    shape = _shape(data) | ({} if max_length is None else {"max_length": max_length})
    return CellLoader(
        root,
        split=split,
        batch_size=batch_size,
        seed=VALID_SEED,
        **shape,
        **_place(ranks),
        lanes=data.lanes,
        **_reading(data),
        shuffle=False,
        drop_last=False,
        storage_options=storage_options,
    )


def has_split(shardset: ShardSet, split: str) -> bool:
    """Whether the shard set has cells in that split."""
    return split in shardset.manifest.splits and shardset.manifest.cells(split) > 0


def endless(loader: CellLoader) -> Generator[Batch]:
    """The rest of this epoch, then one epoch after the other; close it to end the loader's threads."""
    while True:
        yield from loader


def _shape(data: DataSettings) -> dict[str, Any]:
    return {
        "max_length": data.max_length,
        "mask_ratio": data.mask_ratio,
        "n_bins": data.n_bins,
        "tie_break": data.tie_break,
        "pad_value": data.pad_value,
        "mask_value": data.mask_value,
    }


def _reading(data: DataSettings) -> dict[str, Any]:
    return {
        "threads": data.threads,
        "retries": data.retries,
        "timeout": data.timeout,
        "cache_dir": data.cache_dir,
        "cache_size": data.cache_size,
        "on_bad_shard": data.on_bad_shard,
        "max_bad_cells": data.max_bad_cells,
    }


def _place(ranks: Ranks) -> dict[str, Any]:
    return {"rank": ranks.rank, "world_size": ranks.world_size}

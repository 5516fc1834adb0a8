"""The loaders of a run: the training stream, and a split read once in a fixed order.

Called by the loop, evaluate and the baselines.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from scshards.cells.batch import Batch
from scshards.shards.shardset import ShardSet
from scshards.streaming.loader import CellLoader
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
        **_shape(config),
        **_place(ranks),
        tokens_per_batch=data.tokens_per_batch,
        lanes=data.lanes,
        shuffle_buffer=data.shuffle_buffer,
        where=_where(config, data.where),
        take=data.take,
        weights=data.weights,
        epoch_cells=data.epoch_cells,
        domain_by=_domain_by(config),
        **_reading(data),
        storage_options=storage_options,
    )


def once_loader(
    root: str,
    config: TrainConfig,
    ranks: Ranks,
    split: str,
    batch_size: int,
    *,
    storage_options: Mapping[str, Any] | None = None,
    **other: Any,
) -> CellLoader:
    """Every cell of a split that the task has use for, once, with the masks all evaluations share.

    `other` are options of CellLoader that are to be otherwise.
    """
    options = {
        "seed": VALID_SEED,
        **_shape(config),
        **_place(ranks),
        "lanes": config.data.lanes,
        "where": _where(config),
        "domain_by": _domain_by(config),
        **_reading(config.data),
        "shuffle": False,
        "drop_last": False,
        "storage_options": storage_options,
    }
    return CellLoader(root, split=split, batch_size=batch_size, **(options | other))


def has_split(shardset: ShardSet, split: str) -> bool:
    """Whether the shard set has cells in that split."""
    return split in shardset.manifest.splits and shardset.manifest.cells(split) > 0


def endless(loader: CellLoader) -> Generator[Batch]:
    """The rest of this epoch, then one epoch after the other; close it to end the loader's threads."""
    while True:
        yield from loader


def _shape(config: TrainConfig) -> dict[str, Any]:
    data = config.data
    shape: dict[str, Any] = {
        "objective": config.task.objective if config.task.masks else "none",
        "max_length": data.max_length,
        "n_bins": data.n_bins,
        "tie_break": data.tie_break,
        "include_zero_genes": data.include_zero_genes,
        "pad_value": data.pad_value,
        "mask_value": data.mask_value,
    }
    return shape | ({"mask_ratio": data.mask_ratio} if config.task.masks else {})


def _where(config: TrainConfig, own: str | None = None) -> str | None:
    """`own`, and only cells that have what the task needs to know of them."""
    task = config.task
    needed = {"pretrain": None, "integrate": task.domain, "annotate": task.label}[task.name]
    if needed is None:
        return own
    known = f"`{needed}` == `{needed}`"  # a missing value equals nothing, itself neither
    return known if own is None else f"({own}) and {known}"


def _domain_by(config: TrainConfig) -> str | None:
    task = config.task
    return task.domain if task.name == "integrate" and task.domain_norm else None


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

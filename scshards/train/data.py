"""The loaders of a run: the training stream, and a split read once in a fixed order.

Called by the loop, evaluate and the baselines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scshards.base.errors import ConfigError
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
    """The endless, shuffled training stream: one batch is this rank's share of one step.

    Raises
    ------
    ConfigError
        When the train split has fewer cells than one global batch.
    """
    data = config.data
    loader = CellLoader(
        root,
        split="train",
        batch_size=rank_batch,
        seed=config.run.seed,
        **_shape(data),
        **_place(ranks),
        lanes=data.lanes,
        shuffle_buffer=data.shuffle_buffer,
        threads=data.threads,
        storage_options=storage_options,
    )
    if len(loader) == 0:
        cells = loader.shardset.manifest.cells("train")
        raise ConfigError(
            f"the train split has {cells:,} cells, which is less than one batch",
            where="run.batch_size",
            advice=f"use at most {cells:,} cells a batch, or pack more cells",
        )
    return loader


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
        threads=data.threads,
        shuffle=False,
        drop_last=False,
        storage_options=storage_options,
    )


def has_split(shardset: ShardSet, split: str) -> bool:
    """Whether the shard set has cells in that split."""
    return split in shardset.manifest.splits and shardset.manifest.cells(split) > 0


def endless(loader: CellLoader) -> Iterator[Batch]:
    """The rest of this epoch, then one epoch after the other."""
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


def _place(ranks: Ranks) -> dict[str, int]:
    return {"rank": ranks.rank, "world_size": ranks.world_size}

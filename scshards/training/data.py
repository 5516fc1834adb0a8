"""The loaders of a run: the training stream, and a split read once in a fixed order.

Called by prepare, heldout, the loop, applying.evaluate and applying.replay.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch
from scshards.ranks.ranks import Ranks
from scshards.shards.shardset import ShardSet
from scshards.streaming.loader import CellLoader
from scshards.streaming.order.options import ChoiceOptions
from scshards.tasks.labels import having
from scshards.training.config import TrainConfig

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
        choose=replace(
            data.choose,
            where=_where(config, data.choose.where),
            domain_by=config.task.batch_domain or data.choose.domain_by,
        ),
        collate=config.collate,
        read=replace(data.read, storage_options=storage_options),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def once_loader(
    root: str,
    config: TrainConfig,
    ranks: Ranks,
    split: str,
    batch_size: int,
    *,
    storage_options: Mapping[str, Any] | None = None,
    choose: Mapping[str, Any] | None = None,
    collate: Mapping[str, Any] | None = None,
) -> CellLoader:
    """Every cell of a split that the task has use for, once a pass, with the masks of all evaluations.

    `choose` and `collate` are fields of ChoiceOptions and CollateOptions that are to be otherwise.
    """
    own = ChoiceOptions(where=_where(config), domain_by=config.task.batch_domain)
    padded = replace(config.collate, tokens_per_batch=None)
    return CellLoader(
        root,
        split=split,
        batch_size=batch_size,
        seed=VALID_SEED,
        choose=replace(own, **(choose or {})),
        collate=replace(padded, **(collate or {})),
        read=replace(config.data.read, storage_options=storage_options),
        shuffle=False,
        drop_last=False,
        fixed_epoch=True,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def has_split(shardset: ShardSet, split: str) -> bool:
    """Whether the shard set has cells in that split."""
    return split in shardset.manifest.splits and shardset.manifest.cells(split) > 0


def check_split(shardset: ShardSet, split: str, at: str) -> None:
    """ConfigError unless the shard set has cells in that split; `at` says whose it is."""
    shardset.shards(split)  # refuses what is none, naming those that there are
    if not has_split(shardset, split):
        raise ConfigError(f"the split {split!r} has no cells", where=at)


def endless(loader: CellLoader) -> Generator[Batch]:
    """The rest of this epoch, then one epoch after the other; close it to end the loader's threads."""
    while True:
        yield from loader


def _where(config: TrainConfig, own: str | None = None) -> str | None:
    """`own`, and only cells that have what the task needs to know of them."""
    needed = config.task.needed
    if needed is None:
        return own
    known = having(needed)
    return known if own is None else f"({own}) and {known}"

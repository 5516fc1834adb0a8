"""Which batches `scshards mix` looks at: what a person chooses, and nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from scshards.base.config import Options
from scshards.base.records import Count, Positive


@dataclass(frozen=True, kw_only=True)
class MixOptions(Options):
    """Which batches are looked at, beside which cells (ChoiceOptions) and how they are shuffled.

    Attributes
    ----------
    batch_size
        Cells of a batch, of each rank.
    world_size
        Ranks that train.
    shuffle
        Read in random order, or that of the shards.
    seed
        The seed of the order.
    epoch
        The epoch that is looked at.
    batches
        How many global batches are looked at, spread over the epoch.
    """

    batch_size: Positive = 64
    world_size: Positive = 1
    shuffle: bool = True
    seed: int = 0
    epoch: Count = 0
    batches: Positive = 256

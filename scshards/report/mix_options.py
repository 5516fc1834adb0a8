"""Which batches `scshards mix` looks at: what a person chooses, and nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from scshards.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class MixOptions:
    """Which batches are looked at; the names are those of CellLoader.

    Attributes
    ----------
    batch_size
        Cells of a batch, of each rank.
    world_size
        Ranks that train.
    lanes
        Shuffle buffers that cells are read through.
    shuffle_buffer
        Cells in the buffers of all lanes together.
    shuffle
        Read in random order, or that of the shards.
    where
        Take the cells this is true for: an expression over labels, n_genes and total (the sum of a
        cell's values) in pandas query syntax, such as "tissue == 'lung' and n_genes > 500".
    balanced
        Draw the values of this label equally often.
    seed
        The seed of the order.
    epoch
        The epoch that is looked at.
    batches
        How many global batches are looked at, spread over the epoch.
    """

    batch_size: int = 64
    world_size: int = 1
    lanes: int = 64
    shuffle_buffer: int = 8192
    shuffle: bool = True
    where: str | None = None
    balanced: str | None = None
    seed: int = 0
    epoch: int = 0
    batches: int = 256

    def __post_init__(self) -> None:
        for name in ("batch_size", "world_size", "lanes", "shuffle_buffer", "batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"it is at least 1, not {getattr(self, name)}", where=name)
        if self.epoch < 0:
            raise ConfigError(f"it is at least 0, not {self.epoch}", where="epoch")

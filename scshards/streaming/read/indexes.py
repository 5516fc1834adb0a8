"""The indexes of the shards that are being read: where each cell lies, its key, its labels.

Those used last stay in memory. Called by streaming.read.source, from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.cells.batch import KEY_ROW_BITS
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import ShardList
from scshards.streaming.stages import StageClock


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What the stream needs of a shard's index.

    Attributes
    ----------
    starts, sizes
        int64 [cells]: where each member's payload lies in the uncompressed tar.
    keys
        int64 [cells]: `source << 40 | row`.
    labels
        int64 [cells, columns]: codes, or the bits of float64 numbers.
    chosen_by
        Columns, by their names in the index, that say how often a cell appears.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]
    chosen_by: dict[str, NDArray[Any]]


class IndexCache:
    """Reads indexes and keeps some.

    Parameters
    ----------
    shards
        Whose indexes.
    columns
        Label columns to carry along with each cell.
    chosen_by
        Index columns that say how often a cell appears.
    kept
        How many stay in memory.
    clock
        Where time and bytes are counted.
    """

    def __init__(
        self,
        shards: ShardList,
        columns: Sequence[str],
        chosen_by: Sequence[str],
        kept: int,
        clock: StageClock,
    ) -> None:
        self._shards, self._clock = shards, clock
        self.columns, self._chosen_by = tuple(columns), tuple(chosen_by)
        self._kept = max(1, kept)
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, shard: int, read: Callable[[int], bytes]) -> ShardIndex:
        """The index of a shard, whose bytes `read` gives when it is not kept.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            When it is not the index that was packed.
        """
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        with self._clock.time("index"):
            made = self._made(shard, read(shard))
        self._clock.count(reads=1, bytes=self._shards.shards[shard].index_bytes)
        with self._lock:
            self._indexes[shard] = made
            while len(self._indexes) > self._kept:
                self._indexes.popitem(last=False)
        return made

    def _made(self, shard: int, data: bytes) -> ShardIndex:
        names = [OBS_PREFIX + c for c in self.columns]
        wanted = ["offset", "size", "source", "row", *names, *self._chosen_by]
        table = self._shards.index(shard, list(dict.fromkeys(wanted)), data)
        labels = np.empty((len(table["row"]), len(names)), np.int64)
        for j, name in enumerate(names):
            labels[:, j] = _as_bits(table[name])
        return ShardIndex(
            starts=table["offset"].astype(np.int64),
            sizes=table["size"].astype(np.int64),
            keys=(table["source"].astype(np.int64) << KEY_ROW_BITS) | table["row"],
            labels=labels,
            chosen_by={c: table[c] for c in self._chosen_by},
        )


def _as_bits(values: NDArray[Any]) -> NDArray[np.int64]:
    """Codes as int64; numbers as the bits of their float64."""
    if values.dtype.kind == "f":
        return values.astype(np.float64).view(np.int64)
    return values.astype(np.int64)

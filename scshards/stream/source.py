"""The cells of a split, chunk by chunk: checked bytes, and where each cell lies in them.

Every cell's place is checked against its chunk's bounds, and the bytes were checked by stream.fetch, so
nothing behind this module meets bytes that were not packed. Called by stream.lanes, from several
threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.cells.batch import KEY_ROW_BITS
from scshards.shards.index import OBS_PREFIX
from scshards.stream.fetch import ChunkFetcher
from scshards.stream.shardlist import ShardList
from scshards.stream.stages import StageClock


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedChunk:
    """Some consecutive cells of a shard and the bytes they lie in.

    Attributes
    ----------
    data
        uint8: uncompressed tar bytes, in a buffer that is used again when no view of it is left.
    starts, sizes
        int64 [cells]: where each member's payload lies in `data`.
    keys
        int64 [cells]: `source << 40 | row`.
    labels
        int64 [cells, columns]: codes, or the bits of float64 numbers.
    """

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Index:
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]
    chunk_raw: NDArray[np.int64]


class CellSource:
    """Reads the cells of one split.

    Parameters
    ----------
    shards
        What to read.
    columns
        Label columns to carry along with each cell.
    indexes_kept
        How many shards' indexes stay in memory.
    clock
        Where time and bytes are counted.
    """

    def __init__(
        self, shards: ShardList, columns: Sequence[str], indexes_kept: int, clock: StageClock
    ) -> None:
        self._list, self.clock = shards, clock
        self.shards = shards.shards
        self.columns = tuple(columns)
        self._kept = max(1, indexes_kept)
        self._indexes: OrderedDict[int, _Index] = OrderedDict()
        self._lock = threading.Lock()
        self._fetcher = ChunkFetcher(shards, clock)

    def pieces(self, shard: int, first: int, end: int) -> list[tuple[int, int, int, int]]:
        """Cells [first, end) of a shard as (shard, chunk, first cell, end cell), chunk by chunk."""
        bounds = np.concatenate(([0], np.cumsum(self.shards[shard].chunks.cells)))
        at = int(np.searchsorted(bounds, first, side="right")) - 1
        out = []
        while first < end:
            stop = min(end, int(bounds[at + 1]))
            if stop > first:
                out.append((shard, at, first, stop))
            first = stop
            at += 1
        return out

    def load(self, shard: int, chunk: int, first: int, end: int) -> LoadedChunk:
        """Read and check one chunk; the cells [first, end) of its shard.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            Naming the shard and the chunk.
        """
        index = self._index(shard)
        data = self._fetcher.fetch(shard, chunk)
        starts = index.starts[first:end] - (index.chunk_raw[chunk] - len(data))
        sizes = index.sizes[first:end]
        if len(starts) and (
            starts.min() < 0 or sizes.min() <= 0 or (starts + sizes).max() > len(data)
        ):
            raise FormatError(
                "the index points outside a chunk",
                where=f"{self._list.at(shard)}, chunk {chunk}",
                advice="run scshards verify on the shard set",
            )
        return LoadedChunk(
            data=data,
            starts=starts,
            sizes=sizes,
            keys=index.keys[first:end],
            labels=index.labels[first:end],
        )

    def _index(self, shard: int) -> _Index:
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        with self.clock.time("index"):
            made = self._read_index(shard)
        self.clock.count(reads=1, bytes=self.shards[shard].index_bytes)
        with self._lock:
            self._indexes[shard] = made
            while len(self._indexes) > self._kept:
                self._indexes.popitem(last=False)
        return made

    def _read_index(self, shard: int) -> _Index:
        info = self.shards[shard]
        names = [OBS_PREFIX + c for c in self.columns]
        table = self._list.index(shard, ["offset", "size", "source", "row", *names])
        labels = np.empty((info.cells, len(names)), np.int64)
        for j, name in enumerate(names):
            labels[:, j] = _as_bits(table[name])
        return _Index(
            starts=table["offset"].astype(np.int64),
            sizes=table["size"].astype(np.int64),
            keys=(table["source"].astype(np.int64) << KEY_ROW_BITS) | table["row"],
            labels=labels,
            chunk_raw=np.cumsum(info.chunks.raw),
        )


def _as_bits(values: NDArray[Any]) -> NDArray[np.int64]:
    """Codes as int64; numbers as the bits of their float64."""
    if values.dtype.kind == "f":
        return values.astype(np.float64).view(np.int64)
    return values.astype(np.int64)

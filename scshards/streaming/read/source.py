"""The cells of a stratum, chunk by chunk: checked bytes, and where each cell lies in them.

    appearance of a shard's cells --streaming.order.strata--> cell --index--> chunk, place in it

Every cell's place is checked against its chunk's bounds, and the bytes were checked by read.fetch, so
nothing behind this module meets bytes that were not packed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError, ScshardsError
from scshards.shards.shardlist import ShardList
from scshards.streaming.order.strata import Appearances, Passes
from scshards.streaming.quarantine import BAD, Quarantine
from scshards.streaming.read.fetch import ChunkFetcher
from scshards.streaming.read.indexes import IndexCache, ShardIndex

COPY_COLUMN = "copy"
"""What the last column of labels is called where cells may appear more than once."""


@dataclass(frozen=True, slots=True)
class CellBytes:
    """Some cells, in order, and the bytes they lie in.

    Attributes
    ----------
    data
        uint8: a chunk's uncompressed tar bytes, or the memory of a store.
    starts, sizes
        int64 [cells]: where each member's payload lies in `data`.
    keys
        int64 [cells]: `source << 40 | row`.
    labels
        int64 [cells, columns]: codes, or the bits of float64 numbers; where cells may appear more than
        once, the last column says how often the cell appeared before.
    """

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]


class CellSource:
    """Reads the cells of one stratum.

    Parameters
    ----------
    shards
        What to read.
    indexes, fetcher
        Where indexes and chunks come from; strata share them.
    appearances
        Which cells, and how often each.
    order
        int64: the shards along the stratum's line; the next one is looked up ahead of need.
    passes_kept
        For how many shards it stays in memory which cells appear.
    quarantine
        Decides over chunks and indexes that are bad.
    """

    def __init__(
        self,
        shards: ShardList,
        indexes: IndexCache,
        fetcher: ChunkFetcher,
        appearances: Appearances,
        order: NDArray[np.int64],
        passes_kept: int,
        quarantine: Quarantine,
    ) -> None:
        self._list, self._indexes, self.fetcher = shards, indexes, fetcher
        self._appearances, self._quarantine = appearances, quarantine
        self._choice = appearances.stratum.choice
        self.columns = (*indexes.columns, *([COPY_COLUMN] if self._choice.resamples else []))
        self._next = dict(pairwise(order.tolist()))
        self._passes: OrderedDict[int, Passes] = OrderedDict()
        self._kept = passes_kept
        self._lock = threading.Lock()

    def pieces(self, shard: int, first: int, end: int) -> list[tuple[int, int, int, int]]:
        """Appearances [first, end) of a shard's cells as (shard, chunk, first, end), chunk by chunk."""
        bounds = np.cumsum(self._list.shards[shard].chunks.cells)
        if self._choice.is_every_cell(shard):
            at = int(np.searchsorted(bounds, first, side="right"))
            last = int(np.searchsorted(bounds, end - 1, side="right"))
            chunks = np.arange(at, last + 1)
            cuts = bounds[at:last]
        else:
            passes = self.passes(shard)
            each = np.searchsorted(bounds, passes.cells[first:end], side="right")
            is_new = each[1:] != each[:-1]
            # A new pass may begin in the chunk in which the one before it ended.
            inner = passes.starts[(passes.starts > first) & (passes.starts < end)]
            is_new[inner - first - 1] = True
            starts = np.flatnonzero(is_new) + 1
            chunks = each[np.concatenate(([0], starts))]
            cuts = first + starts
        ends = [*cuts.tolist(), end]
        return [
            (shard, chunk, a, b)
            for chunk, a, b in zip(chunks.tolist(), [first, *ends], ends, strict=False)
            if a < b
        ]

    def load(self, shard: int, chunk: int, first: int, end: int) -> CellBytes:
        """Read and check one chunk; appearances [first, end) of cells of it.

        Cells that are lost to the quarantine have a size of 0 and a key of -1.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            Naming the shard and the chunk.
        """
        index, error = self._index(shard)
        if index is None:
            self.fetcher.skip(shard, chunk)
            loaded = self._lost(shard, None, first, end, error)
        else:
            try:
                loaded = self._read(index, shard, chunk, first, end)
            except BAD as e:
                loaded = self._lost(shard, chunk, first, end, e)
        # From the middle of a shard on: whoever deals is not to wait for the next one's index.
        if 2 * end > self._appearances.count(shard) and shard in self._next:
            self.look_up(self._next[shard])
        return loaded

    def _index(self, shard: int) -> tuple[ShardIndex | None, ScshardsError | None]:
        """A shard's index, or None and why there is none, unless that was said before."""
        if self._quarantine.is_lost(shard, None):
            return None, None
        try:
            return self._indexes.of(shard, self.fetcher.index), None
        except BAD as e:
            return None, e

    def _read(self, index: ShardIndex, shard: int, chunk: int, first: int, end: int) -> CellBytes:
        data = self.fetcher.fetch(shard, chunk)
        cells: slice | NDArray[np.int32] = slice(first, end)
        if not self._choice.is_every_cell(shard):
            passes = self.passes(shard)
            cells = passes.cells[first:end]
        starts = index.starts[cells] - self._list.chunk_starts(shard)[1][chunk]
        sizes = index.sizes[cells]
        # Of numbers that are not known to be small, no sum: it might wrap around.
        inside = (starts >= 0) & (starts <= len(data)) & (sizes > 0) & (sizes <= len(data) - starts)
        if not inside.all():
            raise FormatError(
                "the index points outside a chunk",
                where=f"{self._list.at(shard)}, chunk {chunk}",
                advice="run scshards verify on the shard set",
            )
        labels = index.labels[cells]
        if self._choice.resamples:
            labels = np.column_stack([labels, passes.copies(first, end)])
        return CellBytes(
            data=data, starts=starts, sizes=sizes, keys=index.keys[cells], labels=labels
        )

    def _lost(
        self, shard: int, chunk: int | None, first: int, end: int, error: ScshardsError | None
    ) -> CellBytes:
        cells: NDArray[np.integer] = np.arange(first, end)
        if not self._choice.is_every_cell(shard):
            cells = self.passes(shard).cells[first:end]
        self._quarantine.lose(shard, chunk, cells, error)
        n = end - first
        return CellBytes(
            data=np.zeros(0, np.uint8),
            starts=np.zeros(n, np.int64),
            sizes=np.zeros(n, np.int64),
            keys=np.full(n, -1, np.int64),
            labels=np.full((n, len(self.columns)), -1, np.int64),
        )

    def look_up(self, shard: int) -> None:
        """Read what `pieces` needs of a shard, so that it does not have to wait for it."""
        if self._choice.columns:
            self.passes(shard)

    def passes(self, shard: int) -> Passes:
        """Which cell each appearance of a shard's cells is; where its index is lost, as many of any."""
        with self._lock:
            if shard in self._passes:
                self._passes.move_to_end(shard)
                return self._passes[shard]
        table = {}
        if self._choice.columns:
            index, error = self._index(shard)
            if index is None:
                # Its cells will be lost, at the places that they have: only their number matters.
                self._quarantine.lose(shard, None, np.zeros(0, np.int64), error)
                return self._appearances.of_any(shard, self._list.shards[shard].cells)
            table = index.chosen_by
        made = self._appearances.passes(shard, table)
        with self._lock:
            self._passes[shard] = made
            while len(self._passes) > self._kept:
                self._passes.popitem(last=False)
        return made

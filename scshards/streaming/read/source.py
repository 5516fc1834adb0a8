"""The cells of a stratum, chunk by chunk: checked bytes, and where each cell lies in them.

    appearance of a shard's cells --streaming.order.strata--> cell --index--> chunk, place in it

Every cell's place is checked against its chunk's bounds, and the bytes were checked by read.fetch, so
nothing behind this module meets bytes that were not packed. Called from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.cells.batch import KEY_ROW_BITS
from scshards.shards.index import ARRAY_COLUMNS, OBS_PREFIX
from scshards.shards.shardlist import ShardList
from scshards.shards.tar import arrays_offsets
from scshards.streaming.order.strata import Appearances, Passes
from scshards.streaming.quarantine import BAD, Quarantine
from scshards.streaming.read.fetch import REMOTE_READS, ChunkFetcher, Piece

Made = TypeVar("Made")

_MOST = 1 << 48
"""Bytes of a shard: sums of a few such numbers do not wrap around."""


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
        once, the last column says how often the cell appeared before. Where arrays are read, `sizes` is
        from the begin of the first member to the end of the second, and the column behind the labels has
        the size of the first.
    """

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """What the stream needs of a shard's index: of its cells what CellBytes has, in the whole tar.

    `chosen_by` has the columns, by their names in the index, that say how often a cell appears.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]
    chosen_by: dict[str, NDArray[Any]]


def shards_kept(stretches: int) -> int:
    """Of how many shards is kept what a rank that reads so many stretches at a time needs of them.

    One for each, and the next one of those that come to the end of theirs; and where stretches are few,
    one for each read that may be under way.
    """
    return max(stretches * 5 // 4 + 2, REMOTE_READS)


class Kept(Generic[Made]):
    """What was made of some shards, those used last, `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._made: OrderedDict[int, Made] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, shard: int) -> bool:
        with self._lock:
            return shard in self._made

    def get(self, shard: int, make: Callable[[int], Made]) -> Made:
        """That of a shard, made now if it is not kept."""
        with self._lock:
            if shard in self._made:
                self._made.move_to_end(shard)
                return self._made[shard]
        made = make(shard)
        with self._lock:
            self._made[shard] = made
            while len(self._made) > self.most:
                self._made.popitem(last=False)
        return made


class IndexCache(Kept[ShardIndex]):
    """The indexes of the shards that a loader's passes read.

    Each pass says how many stay in memory.

    Parameters
    ----------
    chosen_by
        Index columns that say how often a cell appears.
    arrays
        Whether the members with the cells' arrays are read, too.
    """

    def __init__(self, chosen_by: Sequence[str], *, arrays: bool = False) -> None:
        super().__init__(most=1)
        self._chosen_by, self._arrays = chosen_by, arrays

    def columns(self, shards: ShardList) -> int:
        """Of the labels of cells, without that for cells which appear more than once."""
        return len(shards.labels) + self._arrays

    def of(self, shard: int, fetcher: ChunkFetcher) -> ShardIndex:
        """The index of a shard, which `fetcher` reads when it is not kept.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            When it is not the index that was packed.
        """
        return self.get(shard, lambda shard: self._read(shard, fetcher))

    def _read(self, shard: int, fetcher: ChunkFetcher) -> ShardIndex:
        names = [OBS_PREFIX + c for c in fetcher.shards.labels]
        arrays = [*ARRAY_COLUMNS] if self._arrays else []
        wanted = ["offset", "size", "source", "row", *arrays, *names, *self._chosen_by]
        data = fetcher.index(shard)
        with fetcher.clock.time("index"):
            table = fetcher.shards.index(shard, list(dict.fromkeys(wanted)), data)
            labels = np.empty((len(table["row"]), len(names) + self._arrays), np.int64)
            for j, name in enumerate(names):
                of_all = table[name]
                is_number = of_all.dtype.kind == "f"
                labels[:, j] = of_all.astype(np.float64).view(np.int64) if is_number else of_all
            starts, sizes = (table[n].astype(np.int64) for n in ("offset", "size"))
            if self._arrays:
                labels[:, -1] = sizes
                sizes = _with_arrays(table, fetcher.shards.at(shard))
            return ShardIndex(
                starts=starts,
                sizes=sizes,
                keys=(table["source"].astype(np.int64) << KEY_ROW_BITS) | table["row"],
                labels=labels,
                chosen_by={c: table[c] for c in self._chosen_by},
            )


def _with_arrays(table: dict[str, NDArray[Any]], where: str) -> NDArray[np.int64]:
    """The bytes from the begin of each cell's first member to the end of its second."""
    at, size, second, more = (table[n] for n in ("offset", "size", *ARRAY_COLUMNS))
    small = (at >= 0) & (at < _MOST) & (size > 0) & (size < _MOST) & (more > 0) & (more < _MOST)
    if not (small.all() and np.array_equal(second, arrays_offsets(at, size))):
        raise FormatError(
            "the index does not say where the arrays of a cell are",
            where=where,
            advice="run scshards verify on the shard set",
        )
    return second + more - at


class ChunkCells:
    """Reads cells of chunks: checked, or lost to the quarantine.

    Parameters
    ----------
    indexes, fetcher
        Where indexes and chunks come from.
    quarantine
        Decides over chunks and indexes that are bad.
    """

    def __init__(self, indexes: IndexCache, fetcher: ChunkFetcher, quarantine: Quarantine) -> None:
        self._list, self._indexes, self.fetcher = fetcher.shards, indexes, fetcher
        self.quarantine = quarantine

    def index(self, shard: int) -> ShardIndex:
        """A shard's index; an error of BAD where there is none, each time without reading it again."""
        reason = self.quarantine.reason(shard, None)
        if reason is not None:
            raise FormatError(reason)
        return self._indexes.of(shard, self.fetcher)

    def load(
        self, piece: Piece, cells: NDArray[np.integer], copies: NDArray[np.int64] | None
    ) -> CellBytes:
        """Read and check the chunk of a piece; some cells of it, told by their places in the shard.

        Cells that are lost to the quarantine have a size of 0 and a key of -1. `copies`, if there are
        any, become the last column of labels.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            Naming the shard and the chunk.
        """
        shard, bad_part = piece.shard, None
        try:
            index = self.index(shard)
            bad_part = piece.chunk
            return self._read(index, piece, cells, copies)
        except BAD as e:
            self.quarantine.lose(shard, bad_part, cells, e)
        n, columns = len(cells), self._indexes.columns(self._list) + (copies is not None)
        return CellBytes(
            data=np.zeros(0, np.uint8),
            starts=np.zeros(n, np.int64),
            sizes=np.zeros(n, np.int64),
            keys=np.full(n, -1, np.int64),
            labels=np.full((n, columns), -1, np.int64),
        )

    def _read(
        self,
        index: ShardIndex,
        piece: Piece,
        cells: NDArray[np.integer],
        copies: NDArray[np.int64] | None,
    ) -> CellBytes:
        shard, chunk = piece.shard, piece.chunk
        data = self.fetcher.fetch(shard, chunk, piece.read)
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
        if copies is not None:
            labels = np.column_stack([labels, copies])
        return CellBytes(
            data=data, starts=starts, sizes=sizes, keys=index.keys[cells], labels=labels
        )


class CellSource:
    """Reads the cells of one stratum.

    Parameters
    ----------
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
        indexes: IndexCache,
        fetcher: ChunkFetcher,
        appearances: Appearances,
        order: NDArray[np.int64],
        passes_kept: int,
        quarantine: Quarantine,
    ) -> None:
        self._list, self.fetcher = fetcher.shards, fetcher
        self._chunks = ChunkCells(indexes, fetcher, quarantine)
        self._appearances = appearances
        self._choice = appearances.stratum.choice
        self.needs_index = bool(self._choice.columns)
        self._next = dict(pairwise(order.tolist()))
        self._passes: Kept[Passes] = Kept(passes_kept)

    def pieces(self, shard: int, first: int, end: int) -> list[Piece]:
        """Appearances [first, end) of a shard's cells, chunk by chunk."""
        bounds = np.cumsum(self._list.shards[shard].chunks.cells)
        if self._choice.is_every_cell(shard):
            at = int(np.searchsorted(bounds, first, side="right"))
            last = int(np.searchsorted(bounds, end - 1, side="right"))
            chunks = np.arange(at, last + 1)
            cuts = bounds[at:last]
        else:
            passes = self._passes_of(shard)
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
            Piece(shard, chunk, a, b)
            for chunk, a, b in zip(chunks.tolist(), [first, *ends], ends, strict=False)
            if a < b
        ]

    def load(self, piece: Piece, which: NDArray[np.int64] | None = None) -> CellBytes:
        """Read and check the chunk of a piece; its cells, or some `which` of these.

        See ChunkCells.load.
        """
        shard = piece.shard
        at = np.arange(piece.first, piece.end) if which is None else piece.first + which
        copies = self._passes_of(shard).copies(at) if self._choice.resamples else None
        loaded = self._chunks.load(piece, self._cells(shard, at), copies)
        # From the middle of a shard on: whoever deals is not to wait for the next one's index.
        if 2 * piece.end > self._appearances.count(shard) and shard in self._next:
            self.look_up(self._next[shard])
        return loaded

    def look_up(self, shard: int) -> None:
        """Read what `pieces` needs of a shard, so that it does not have to wait for it."""
        if self.needs_index:
            self._passes_of(shard)

    def _cells(self, shard: int, at: NDArray[np.int64]) -> NDArray[np.integer]:
        """Which cells of a shard some appearances are."""
        if self._choice.is_every_cell(shard):
            return at
        return self._passes_of(shard).cells[at]

    def _passes_of(self, shard: int) -> Passes:
        """Which cell each appearance of a shard's cells is; where its index is lost, as many of any."""
        return self._passes.get(shard, self._made_passes)

    def _made_passes(self, shard: int) -> Passes:
        table = {}
        if self.needs_index:
            try:
                table = self._chunks.index(shard).chosen_by
            except BAD as e:
                # Its cells will be lost, at the places that they have: only their number matters.
                self._chunks.quarantine.lose(shard, None, np.zeros(0, np.int64), e)
                return self._appearances.of_any(shard, self._list.shards[shard].cells)
        return self._appearances.passes(shard, table)

"""What is left of an epoch of sets, as blocks of cells and controls in batch order.

    positions of this rank --order.plan--> sets --sets.plan--> places in shards   some blocks ahead
    a chunk that the next blocks need --read once--> its cells that any known block needs --> store
    a block whose cells are all there --> its rows: of each batch the cells, then the controls

Which sets come is known ahead, so a chunk gives all that it will be asked for soon: no chunk is kept,
and no more cells than those of `held_sets`. Runs on one thread at a time; chunks are read on others.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.streaming.mix.blocks import BLOCK_CELLS, Block, Reader
from scshards.streaming.mix.store import CellStore
from scshards.streaming.order.plan import EpochPlan, Share
from scshards.streaming.order.state import Order
from scshards.streaming.quarantine import BAD
from scshards.streaming.read.fetch import Piece
from scshards.streaming.read.source import ChunkCells, Kept
from scshards.streaming.sets.groups import SetGroups
from scshards.streaming.sets.plan import EpochSets

_BLOCKS_READ = 4
"""Blocks that are read ahead from a disk: fewer would wait for one another."""

_AT_ONCE = 1 << 16
"""Positions whose sets are worked out at a time."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetBlock(Block):
    """Sets of `batches` batches in a row: of each its cells, set by set, then its controls.

    `groups`, int64 [sets, labels], are the groups' codes, of these `categories` of each label; -1 in
    sets that only fill up a batch.
    """

    groups: Ints
    categories: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetReader(Reader):
    """Reads sets of cells and their controls.

    Attributes
    ----------
    choice
        Which sets.
    first, step
        Only the batches first, first + step, ... are wanted: a block of which none is has no cells.
    """

    choice: SetGroups
    first: int
    step: int

    def blocks(self) -> Iterator[SetBlock]:
        """The blocks, in order; the first one is a batch, and each of the next has twice as many.

        Raises
        ------
        Whatever reading a chunk raises.
        """
        order, shards = self.order, self.fetcher.shards
        share, size = order.share(0, self.position), self.choice.plan.size
        per_batch = order.batch_size
        held = held_sets(order)
        store = self.stores.take(
            2 * size * held, shards.cell_bytes, self.indexes.columns(shards) + 1
        )
        appearances = order.appearances(0, self.position)
        ahead = _Ahead(
            self.choice,
            order.plan(0, self.position, appearances),
            share,
            self.choice.plan.epoch(self.position.epoch, shuffle=order.shuffle),
            ChunkCells(self.indexes, self.fetcher, self.quarantine),
            store,
            self.fetchers,
            self.indexes.most,
        )
        most = max(1, BLOCK_CELLS // (2 * size * per_batch))
        counts = _doubling(order.left(self.position)[0], most)
        known: deque[_Block] = deque()
        begin, batch = share.begin, 0
        following = next(counts, 0)
        while known or following:
            while following and (
                not known or sum(b.sets for b in known) + following * per_batch <= held
            ):
                is_wanted = (self.first - batch) % self.step < following
                known.append(ahead.block(following * per_batch, is_wanted=is_wanted))
                batch += following
                following = next(counts, 0)
            # The later a chunk is read, the more of the sets that want its cells are known: so a few
            # blocks are read while one is taken, and of a store's as many as keep it busy.
            read = 0
            for i, block in enumerate(known):
                if i >= _BLOCKS_READ and (shards.is_local or 4 * read >= held):
                    break
                ahead.read(block)
                read += block.sets
            block = known.popleft()
            with self.fetcher.clock.time("input"):
                for job in block.reads:
                    job.result()
            batches = block.sets // per_batch
            rows = block.places.reshape(batches, per_batch, 2, size).swapaxes(1, 2).reshape(-1)
            yield SetBlock(
                cells=store.look(rows),
                batches=batches,
                epoch=self.position.epoch,
                begin=begin,
                free=functools.partial(store.free, rows[rows >= 0]),
                groups=block.groups,
                categories=self.choice.categories,
            )
            begin += batches * share.global_batch


def held_sets(order: Order) -> int:
    """Sets whose cells and controls a rank holds in memory, at most: two shuffle buffers, or batches."""
    return 2 * max(order.batch_size, -(-order.shuffle_buffer // order.world_size))


class _Wanted(NamedTuple):
    """Cells of a chunk: to which rows of a block they go."""

    block: _Block
    rows: Ints
    cells: Ints
    copies: Ints


class _Block:
    """A block before its cells are there.

    Attributes
    ----------
    places
        int64 [rows]: where each cell lies in the store; -1 as long as it does not.
    chunks
        (shard, chunk): where cells are that nobody reads yet.
    reads
        What puts them there.
    """

    def __init__(self, groups: Ints, rows: int) -> None:
        self.groups, self.sets = groups, len(groups)
        self.places = np.full(rows, -1, np.int64)
        self.chunks: dict[tuple[int, int], None] = {}
        self.reads: list[Future[None]] = []


class _Ahead:
    """Blocks that are known ahead, and the chunks that they wait for."""

    def __init__(
        self,
        choice: SetGroups,
        plan: EpochPlan,
        share: Share,
        sets: EpochSets,
        chunks: ChunkCells,
        store: CellStore,
        fetchers: Executor,
        shards_kept: int,
    ) -> None:
        self._choice, self._sets, self._chunks = choice, sets, chunks
        self._store, self._fetchers = store, fetchers
        self._coming = _sets_of(plan, share)
        self._list = chunks.fetcher.shards
        self._orders: Kept[NDArray[np.int32] | None] = Kept(shards_kept)
        self._waiting: dict[tuple[int, int], list[_Wanted]] = {}

    def block(self, sets: int, *, is_wanted: bool) -> _Block:
        """The next so many sets, as a block that waits for its cells, if they are wanted; fewer fill it
        up at the end."""
        with self._chunks.fetcher.clock.time("deal"):
            pairs = list(itertools.islice(self._coming, sets))
            if not is_wanted:
                pairs = []
            groups, which = np.array(pairs, np.int64).reshape(-1, 2).T
            codes = np.full((sets, self._choice.codes.shape[1]), -1, np.int64)
            codes[: len(pairs)] = self._choice.codes[groups]
            block = _Block(codes, sets * 2 * self._sets.size)
            # [sets, cells and controls, size], row by row.
            shard, place, copy = (
                np.stack(both, axis=1).reshape(-1)
                for both in zip(*self._sets.of(groups, which), strict=True)
            )
            by_shard = np.argsort(shard, kind="stable")
            each, begins = np.unique(shard[by_shard], return_index=True)
        if not self._list.is_local:
            # All at once: one after another, each would have to be waited for.
            list(
                self._fetchers.map(self._order, [s for s in each.tolist() if s not in self._orders])
            )
        ends = [*begins[1:].tolist(), len(by_shard)]
        for of, a, z in zip(each.tolist(), begins.tolist(), ends, strict=False):
            rows = by_shard[a:z]
            order = self._order(of)
            if order is not None:  # the cells of a lost index stay away
                self._wait(of, order[place[rows]].astype(np.int64), rows, copy[rows], block)
            else:
                self._lose(of, place[rows])
        return block

    def read(self, block: _Block) -> None:
        """Begin to read the chunks that a block still waits for, for all blocks that are known."""
        pieces = [Piece(shard, chunk, 0, 0) for shard, chunk in block.chunks]
        for piece in self._chunks.fetcher.announced(pieces):
            wanted = self._waiting.pop((piece.shard, piece.chunk))
            job = self._fetchers.submit(self._load, piece, wanted)
            for one in wanted:
                del one.block.chunks[piece.shard, piece.chunk]
                one.block.reads.append(job)

    def _wait(self, shard: int, cells: Ints, rows: Ints, copies: Ints, block: _Block) -> None:
        """Let these rows of a block wait for the chunks of their cells."""
        bounds = np.cumsum(self._list.shards[shard].chunks.cells)
        chunk = np.searchsorted(bounds, cells, side="right")
        along = np.argsort(chunk, kind="stable")
        each, begins = np.unique(chunk[along], return_index=True)
        for of, at in zip(each.tolist(), np.split(along, begins[1:]), strict=True):
            block.chunks[shard, of] = None
            wanted = _Wanted(block, rows[at], cells[at], copies[at])
            self._waiting.setdefault((shard, of), []).append(wanted)

    def _load(self, piece: Piece, wanted: list[_Wanted]) -> None:
        cells, copies = (
            np.concatenate([getattr(w, x) for w in wanted]) for x in ("cells", "copies")
        )
        loaded = self._chunks.load(piece, cells, copies)
        with self._chunks.fetcher.clock.time("store"):
            places = self._store.put(loaded)
        ends = np.cumsum([len(w.rows) for w in wanted])
        for one, own in zip(wanted, np.split(places, ends[:-1]), strict=True):
            one.block.places[one.rows] = own

    def _order(self, shard: int) -> NDArray[np.int32] | None:
        """The cells of a shard in the order of their kinds; None where its index is lost."""
        return self._orders.get(shard, self._made_order)

    def _made_order(self, shard: int) -> NDArray[np.int32] | None:
        try:
            table = self._chunks.index(shard).chosen_by
        except BAD as e:
            self._chunks.quarantine.lose(shard, None, np.zeros(0, np.int64), e)
            return None
        return self._choice.order(shard, table).astype(np.int32)

    def _lose(self, shard: int, places: Ints) -> None:
        """Count cells of a lost index: nobody can tell which they are, but their number is known."""
        try:
            self._chunks.index(shard)
        except BAD as e:
            self._chunks.quarantine.lose(shard, None, places, e)


def _sets_of(plan: EpochPlan, share: Share) -> Iterator[tuple[int, int]]:
    """The sets at this rank's positions, in order: the group, and which of its sets."""
    first = share.begin + (share.rank - share.begin) % share.world_size
    step = share.world_size
    for begin in range(first, share.end, _AT_ONCE * step):
        positions = np.arange(begin, min(share.end, begin + _AT_ONCE * step), step)
        _, groups, which = plan.cells_at(positions)
        yield from zip(groups.tolist(), which.tolist(), strict=True)


def _doubling(whole: int, most: int) -> Iterator[int]:
    """A whole in parts of 1, 2, 4, ... and then of `most`."""
    part = 1
    while whole:
        part = min(part, most, whole)
        yield part
        whole -= part
        part *= 2

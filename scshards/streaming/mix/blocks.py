"""What is left of an epoch, as blocks of a few batches' worth of undecoded cells, in batch order.

    one part:  blocks of several batches, dealt from its lanes
    domains:   a block of one batch from the domain whose turn it is, and so on

    chunks of a lane's stretch --streaming.mix.store--> places --shuffle buffer--> rows of a block

Buffers hold the numbers of places in the store; the steps are those of kernels.order. A stretch asks
for its next chunk when it has used up half of the last one. Where an epoch is resumed, buffers are
replayed on integers, and what is in them is read in the order in which it is needed. A collator
(collate.batches) makes batches of blocks. Runs on one thread at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.order import (
    DONE,
    EPOCH,
    FILLED,
    NEXT_INPUT,
    QUEUE,
    deal,
    first_needed,
    replay,
)
from scshards.streaming.mix.store import CellStore, CellStores
from scshards.streaming.order.plan import EpochPlan, Share
from scshards.streaming.order.state import Order, Position
from scshards.streaming.order.strata import Choice
from scshards.streaming.quarantine import Quarantine
from scshards.streaming.read.fetch import ChunkFetcher, Piece
from scshards.streaming.read.source import CellBytes, CellSource, IndexCache, shards_kept
from scshards.streaming.stages import StageClock

BLOCK_CELLS = 512
"""About how many cells a block has: enough to make Python's share small, few enough to start soon."""

_BLOCKS = 4
"""Blocks that are dealt or collated at a time, about: the store is made with room for them."""

_READ = 32
"""Bits of the number of a cell in its read, behind the number of the read."""

Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Cells of `batches` batches in a row; row i belongs to batch i // batch_size.

    A row whose size is 0 holds no cell: it only fills up the last batch of an evaluation. `begin` is
    the position of `epoch` at which the first batch starts, the same on every rank. After `free` was
    called the cells' memory is used for others.
    """

    cells: CellBytes
    batches: int
    epoch: int
    begin: int
    free: Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """What reads this rank's share of what is left of an epoch is made of.

    Attributes
    ----------
    order, position
        What comes when, and from where on.
    indexes, fetcher, fetchers
        Where indexes and chunks come from, and what runs the reads.
    stores
        Where memory for cells comes from.
    quarantine
        Decides over chunks and indexes that are bad.
    """

    order: Order
    position: Position
    indexes: IndexCache
    stores: CellStores
    fetcher: ChunkFetcher
    fetchers: Executor
    quarantine: Quarantine


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReader(Reader):
    """Reads single cells.

    Attributes
    ----------
    choice
        Which cells, and how often.
    """

    choice: Choice

    def blocks(self) -> Iterator[Block]:
        """The blocks, in the order of the turns.

        Raises
        ------
        Whatever reading a chunk raises.
        """
        store = self._store()
        left = self.order.left(self.position)
        if len(left) == 1:
            yield from self._part(0, left[0], store, BLOCK_CELLS)
            return
        streams: dict[int, Iterator[Block]] = {}
        for part, begin in self.order.turns(self.position):
            if part not in streams:
                streams[part] = self._part(part, left[part], store, 1)
            yield dataclasses.replace(next(streams[part]), begin=begin)

    def _part(self, part: int, batches: int, store: CellStore, block_cells: int) -> Iterator[Block]:
        """So many batches of a part, in blocks of about so many cells.

        The first one is a batch, and each of the next has twice as many, so that the first batch need
        not wait for the cells of others.
        """
        share = self.order.share(part, self.position)
        appearances = self.order.appearances(part, self.position)
        plan = self.order.plan(part, self.position, appearances)
        kept = shards_kept(len(share.my_lanes()))
        sources = [
            CellSource(self.indexes, self.fetcher, each, line.shards, kept, self.quarantine)
            for each, line in zip(appearances, plan.lines, strict=True)
        ]
        clock = self.fetcher.clock
        lanes = _Lanes(plan, share, sources, store, self.fetchers, clock)
        per_block = max(1, block_cells // share.batch_size)
        begin, count = share.begin, 1
        while batches:
            count = min(count, per_block, batches)
            yield lanes.block(begin, count)
            batches -= count
            begin += count * share.global_batch
            count *= 2

    def _store(self) -> CellStore:
        """Room for what this rank's stretches, their buffers and the blocks hold at a time."""
        shards = self.fetcher.shards
        chunk = max((int(s.chunks.cells.max(initial=1)) for s in shards.shards), default=1)
        stretches, buffered = self.order.held(self.position)
        # Of each, besides its buffer, the chunk that it uses up and, half of the time, the next one.
        at_a_time = buffered + stretches * 3 * chunk // 2 + _BLOCKS * BLOCK_CELLS
        columns = self.indexes.columns(shards) + self.choice.resamples
        return self.stores.take(at_a_time, shards.cell_bytes * 9 // 8 + 64, columns)


class _Lanes:
    """The lanes that hold a position of a rank's share.

    Parameters
    ----------
    plan, share
        Which lanes of which epoch, and from which position on.
    sources, store
        Where the chunks of each stratum come from, and where their cells are kept.
    fetchers
        Runs the reads, one chunk of each stretch ahead of need.
    clock
        Where the time is counted.
    """

    def __init__(
        self,
        plan: EpochPlan,
        share: Share,
        sources: Sequence[CellSource],
        store: CellStore,
        fetchers: Executor,
        clock: StageClock,
    ) -> None:
        self._plan, self._share = plan, share
        self._store, self._fetchers, self._clock = store, fetchers, clock
        lanes = share.my_lanes()
        self._stretches = [s for lane in lanes for s in plan.by_lane[lane]]
        self._sources = [sources[s.stratum] for s in self._stretches]
        n = len(self._stretches)
        self._lanes = np.array(lanes, np.int64)
        self._firsts = np.searchsorted([s.lane for s in self._stretches], [*lanes, plan.lanes])
        lane_cells = np.array([max(1, plan.lane_cells(lane)) for lane in lanes], np.int64)
        self._steps = EPOCH // lane_cells
        done = [min(share.emissions(k, share.begin), plan.lane_cells(k)) for k in lanes]
        self._done = np.array(done, np.int64)
        self._cells = np.array([s.cells for s in self._stretches], np.int64)
        self._fillers = np.array(
            [a + np.argmax(self._cells[a:z]) if z > a else a for a, z in pairwise(self._firsts)],
            np.int64,
        )
        self._keys = np.array([s.key for s in self._stretches], np.uint64)
        self._due = np.array([s.due for s in self._stretches], np.int64)
        self._every = np.array([s.every for s in self._stretches], np.int64)
        buffers = np.array([s.buffer for s in self._stretches], np.int64)
        self._limits = np.minimum(buffers, self._cells)
        self._slots = np.zeros((n, int(self._limits.max(initial=1))), np.int64)
        self._states = np.zeros((n, 3), np.int64)
        self._queues = np.zeros((n, 1), np.int64)
        self._at = np.zeros(n, np.int64)
        self._counts = np.zeros(n, np.int64)
        self._pieces: list[Iterator[Piece]] = []
        self._ahead: list[Future[Places] | None] = [None] * n
        # Reads of cells of replayed buffers, by their numbers.
        self._refills: dict[int, Future[Places]] = {}
        self._numbers = itertools.count()
        emitted = [n for k, d in zip(lanes, done, strict=True) for n in plan.turns(k, d)]
        if any(source.needs_index for source in sources):
            self._look_up(emitted)
        # Reads, each with the time at which the first of its cells is due.
        reads: list[tuple[int, Callable[[], None]]] = []
        for i, count in enumerate(emitted):
            reads += self._replay(i, count)
            source, stretch = self._sources[i], self._stretches[i]
            # What no buffer had yet.
            runs = plan.runs(stretch, int(self._states[i, NEXT_INPUT]), stretch.cells)
            self._pieces.append(source.fetcher.announced(_pieces(source, runs)))
            reads.append((self._time(i, count), functools.partial(self._ask, i)))
        for _, ask in sorted(reads, key=operator.itemgetter(0)):
            ask()

    def _look_up(self, emitted: Sequence[int]) -> None:
        """Look up the shards that are read first, in which most cells of replayed buffers lie.

        All at once: lane after lane, each would have to wait for its own.
        """
        begun: dict[tuple[CellSource, int], None] = {}
        for source, stretch, at in zip(self._sources, self._stretches, emitted, strict=True):
            first, end = max(0, at - stretch.buffer), min(stretch.cells, at + stretch.buffer + 1)
            runs = self._plan.runs(stretch, first, end)
            begun |= {(source, shard): None for shard, _, _ in runs}
        list(self._fetchers.map(lambda at: at[0].look_up(at[1]), begun))

    def _time(self, i: int, emission: int) -> int:
        """When an emission of a stretch is due."""
        return self._stretches[i].due + emission * self._stretches[i].every

    def block(self, begin: int, batches: int) -> Block:
        """The cells of so many batches, from a position of the epoch on.

        Raises
        ------
        Whatever reading a chunk raises.
        """
        share = self._share
        end = min(share.end, begin + batches * share.global_batch)
        rows = np.full(batches * share.batch_size, -1, np.int64)  # of no place, until it is found
        emissions = (end - begin) // share.lanes + 2  # of a lane, at most
        taken = np.empty(emissions * len(self._lanes), np.int64)
        state = np.zeros(3, np.int64)
        with self._clock.time("deal"):
            while True:
                i = deal(
                    self._lanes, self._firsts, self._fillers, self._steps, self._done, self._cells,
                    self._keys, self._limits, self._due, self._every, self._slots, self._states,
                    self._queues, self._at, self._counts, begin, end, share.lanes, share.rank,
                    share.world_size, rows, taken, state,
                )  # fmt: skip
                if i == DONE:
                    break
                if state[2] == QUEUE:
                    self._refresh(i)
                else:
                    self._refill(i, int(state[2]))
            # Sooner, a chunk would only take memory; later, a lane might have to wait for it.
            for used in np.flatnonzero(2 * (self._counts - self._at) <= self._counts).tolist():
                self._ask(used)
            cells = self._store.look(rows)
        return Block(
            cells=cells,
            batches=batches,
            epoch=self._plan.epoch,
            begin=begin,
            free=functools.partial(self._store.free, taken[: state[1]]),
        )

    def _refresh(self, i: int) -> None:
        """The stretch's next chunk into its queue."""
        self._ask(i)
        job, self._ahead[i] = self._ahead[i], None
        assert job is not None, "a stretch that has cells left has a chunk left"
        with self._clock.time("input"):
            places = job.result()
        if self._states[i, FILLED] < self._limits[i]:
            self._ask(i)  # its buffer takes more than this chunk
        if len(places) > self._queues.shape[1]:
            wider = np.zeros((len(self._queues), len(places) * 5 // 4), np.int64)
            wider[:, : self._queues.shape[1]] = self._queues
            self._queues = wider
        self._queues[i, : len(places)] = places
        self._at[i], self._counts[i] = 0, len(places)

    def _ask(self, i: int) -> None:
        """Begin to read the stretch's next chunk, if there is one and nobody did."""
        if self._ahead[i] is None:
            piece = next(self._pieces[i], None)
            if piece is not None:
                self._ahead[i] = self._fetchers.submit(self._load, self._sources[i], piece)

    def _load(self, source: CellSource, piece: Piece, which: Places | None = None) -> Places:
        chunk = source.load(piece, which)
        with self._clock.time("store"):
            return self._store.put(chunk)

    def _replay(self, i: int, emitted: int) -> list[tuple[int, Callable[[], None]]]:
        """Replay the stretch's buffer; reads of what is in it, as `__init__`'s.

        Until they were read, its slots hold numbers of the cells, as kernels.order.deal takes them: of
        the read, and of the cell in it.
        """
        if emitted == 0:
            return []
        stretch, source = self._stretches[i], self._sources[i]
        slots, state = replay(stretch.cells, int(self._limits[i]), stretch.key, emitted)
        self._states[i] = state
        inputs = slots[: state[FILLED]]
        order = np.argsort(inputs)
        ordered = inputs[order]
        needed = first_needed(slots, state, stretch.cells, stretch.key)
        reads: list[tuple[int, Callable[[], None]]] = []
        at = 0
        while at < len(ordered):
            (run, *_) = self._plan.runs(stretch, int(ordered[at]), int(ordered[-1]) + 1)
            piece = source.pieces(*run)[0]
            end = int(np.searchsorted(ordered, ordered[at] + piece.end - piece.first))
            first = int(needed[order[at:end]].min())
            which = ordered[at:end] - ordered[at]
            number = next(self._numbers)
            self._slots[i, order[at:end]] = -2 - (number << _READ | np.arange(end - at))
            ask = functools.partial(self._ask_again, number, source, piece, which)
            reads.append((self._time(i, first), ask))
            at = end
        return reads

    def _ask_again(self, number: int, source: CellSource, piece: Piece, which: Places) -> None:
        self._refills[number] = self._fetchers.submit(self._load, source, piece, which)

    def _refill(self, i: int, cell: int) -> None:
        """Put the cells that were read together with this one into the stretch's slots."""
        with self._clock.time("input"):
            places = self._refills[cell >> _READ].result()
        cells = -2 - self._slots[i]
        mine = cells >> _READ == cell >> _READ
        self._slots[i, mine] = places[cells[mine] & ((1 << _READ) - 1)]


def _pieces(source: CellSource, runs: Sequence[tuple[int, int, int]]) -> Iterator[Piece]:
    """What is to be read, chunk by chunk. It refers to no lanes: their memory is free at once."""
    for run in runs:
        yield from source.pieces(*run)

"""What is left of an epoch, as blocks of a few batches' worth of undecoded cells, in batch order.

    one part:  blocks of several batches, dealt from its lanes (mix.lanes)
    domains:   a block of one batch from the domain whose turn it is, and so on

A collator (collate.batches) makes batches of them. Runs on one thread at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.shards.shardlist import ShardList
from scshards.streaming.mix.lanes import Lanes
from scshards.streaming.mix.store import CellStore, CellStores
from scshards.streaming.order.plan import EpochPlan, Share
from scshards.streaming.order.state import Order, Position
from scshards.streaming.order.strata import Choice
from scshards.streaming.quarantine import Quarantine
from scshards.streaming.read.fetch import ChunkFetcher
from scshards.streaming.read.indexes import IndexCache
from scshards.streaming.read.source import CellSource
from scshards.streaming.stages import StageClock

BLOCK_CELLS = 512
"""About how many cells a block has: enough to make Python's share small, few enough to start soon."""

_BLOCKS = 4
"""Blocks that are dealt or collated at a time, about: the store is made with room for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Cells of `batches` batches in a row; row i belongs to batch i // batch_size.

    A row whose size is 0 holds no cell: it only fills up the last batch of an evaluation. `begin` is
    the position of `epoch` at which the first batch starts, the same on every rank. After `free` was
    called the cells' memory is used for others.
    """

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]
    batches: int
    epoch: int
    begin: int
    free: Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReader:
    """Reads this rank's share of what is left of an epoch.

    Attributes
    ----------
    shards, choice, order, position
        Which cells.
    indexes, fetcher, fetchers
        Where indexes and chunks come from, and what runs the reads.
    stores
        Where memory for cells comes from.
    quarantine
        Decides over chunks and indexes that are bad.
    clock
        Where time and bytes are counted.
    """

    shards: ShardList
    choice: Choice
    order: Order
    position: Position
    indexes: IndexCache
    stores: CellStores
    fetcher: ChunkFetcher
    fetchers: Executor
    quarantine: Quarantine
    clock: StageClock

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
        begin = sum(self.position.consumed)
        streams: dict[int, Iterator[Block]] = {}
        for part, after in self.order.turns(self.position):
            if part not in streams:
                streams[part] = self._part(part, left[part], store, 1)
            yield dataclasses.replace(next(streams[part]), begin=begin)
            begin = sum(after.consumed)

    def _part(self, part: int, batches: int, store: CellStore, block_cells: int) -> Iterator[Block]:
        """So many batches of a part, in blocks of about so many cells.

        The first one is a batch, and each of the next has twice as many, so that the first batch need
        not wait for the cells of others.
        """
        share = self.order.share(part, self.position)
        appearances = self.order.appearances(part, self.position)
        plan = self.order.plan(part, self.position, appearances)
        sources = [
            CellSource(
                self.shards,
                self.indexes,
                self.fetcher,
                each,
                line.shards,
                2 * plan.lanes,
                self.quarantine,
            )
            for each, line in zip(appearances, plan.lines, strict=True)
        ]
        if self.choice.columns:
            # All at once: lane after lane, each would have to wait for its own.
            list(self.fetchers.map(lambda at: sources[at[0]].look_up(at[1]), _begun(plan, share)))
        with contextlib.closing(
            Lanes(plan, share, sources, store, self.fetchers, self.clock)
        ) as lanes:
            per_block = max(1, block_cells // share.batch_size)
            begin, count = share.begin, 1
            while batches:
                count = min(count, per_block, batches)
                end = min(share.end, begin + count * share.global_batch)
                with self.clock.time("deal"):
                    rows, taken = lanes.deal(begin, end, count * share.batch_size)
                    cells = store.look(rows)
                yield Block(
                    data=cells.data,
                    starts=cells.starts,
                    sizes=cells.sizes,
                    keys=cells.keys,
                    labels=cells.labels,
                    batches=count,
                    epoch=plan.epoch,
                    begin=begin,
                    free=functools.partial(store.free, taken),
                )
                batches -= count
                begin += count * share.global_batch
                count *= 2

    def _store(self) -> CellStore:
        """Room for what this rank's stretches, their buffers and the blocks hold at a time."""
        shards = self.shards.shards
        chunk = max((int(s.chunks.cells.max(initial=1)) for s in shards), default=1)
        stretches, buffered = self.order.held(self.position)
        # Of each, besides its buffer, the chunk that it uses up and, half of the time, the next one.
        at_a_time = buffered + stretches * 3 * chunk // 2 + _BLOCKS * BLOCK_CELLS
        columns = len(self.shards.labels) + self.choice.resamples
        return self.stores.take(at_a_time, self.shards.cell_bytes * 9 // 8 + 64, columns)


def _begun(plan: EpochPlan, share: Share) -> list[tuple[int, int]]:
    """(stratum, shard) that the rank's lanes read first: most cells of replayed buffers lie there."""
    found: dict[tuple[int, int], None] = {}
    for lane in share.my_lanes():
        emissions = min(share.emissions(lane, share.begin), plan.lane_cells(lane))
        emitted = plan.turns(lane, emissions)
        for stretch, at in zip(plan.of_lane(lane), emitted, strict=True):
            first = max(0, at - stretch.buffer)
            end = min(stretch.cells, at + stretch.buffer + 1)
            found |= {(stretch.stratum, s): None for s, _, _ in plan.runs(stretch, first, end)}
    return list(found)

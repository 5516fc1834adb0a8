"""What is left of an epoch, as blocks in the order of their turns.

    one part:  its blocks (streaming.mix.blocks)
    domains:   a block of one batch from the domain whose turn it is, and so on

Called by streaming.blockstream; runs on one thread at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import Executor

from scshards.shards.shardlist import ShardList
from scshards.streaming.mix.blocks import BLOCK_CELLS, Block, blocks, new_store
from scshards.streaming.mix.store import CellStore
from scshards.streaming.order.plan import EpochPlan, Share
from scshards.streaming.order.state import Order, Position
from scshards.streaming.order.strata import Choice
from scshards.streaming.quarantine import Quarantine
from scshards.streaming.read.fetch import ChunkFetcher
from scshards.streaming.read.indexes import IndexCache
from scshards.streaming.read.source import CellSource
from scshards.streaming.stages import StageClock


class EpochReader:
    """Reads the epochs of a loader; indexes stay from one to the next.

    Parameters
    ----------
    shards
        What is read.
    choice
        How often cells appear.
    clock
        Where time and bytes are counted.
    """

    def __init__(self, shards: ShardList, choice: Choice, clock: StageClock) -> None:
        self._shards, self._choice, self._clock = shards, choice, clock
        self._indexes: IndexCache | None = None  # made when an epoch is read first

    def blocks(
        self,
        order: Order,
        position: Position,
        fetcher: ChunkFetcher,
        quarantine: Quarantine,
        fetchers: Executor,
    ) -> Iterator[Block]:
        """The blocks of this rank's share of what is left of the epoch.

        Parameters
        ----------
        order, position
            Which cells.
        fetcher
            Where chunks come from.
        quarantine
            Decides over chunks and indexes that are bad.
        fetchers
            Runs the reads.

        Raises
        ------
        Whatever reading a chunk raises.
        """
        labels = tuple(self._shards.labels)
        if self._indexes is None:
            # A shard of each stretch, and the next one of those that come to the end of theirs.
            kept = order.stretches(position) * 5 // 4 + 2
            self._indexes = IndexCache(
                self._shards, labels, self._choice.columns, kept, self._clock
            )
        columns = len(labels) + self._choice.resamples
        store = new_store(self._shards, *order.held(position), columns)
        part_of = functools.partial(
            self._part, order, position, self._indexes, fetcher, quarantine, store, fetchers
        )
        left = order.left(position)
        if len(left) == 1:
            yield from part_of(0, left[0], BLOCK_CELLS)
            return
        begin = sum(position.consumed)
        streams: dict[int, Iterator[Block]] = {}
        for part, after in order.turns(position):
            if part not in streams:
                streams[part] = part_of(part, left[part], 1)
            yield dataclasses.replace(next(streams[part]), begin=begin)
            begin = sum(after.consumed)

    def _part(
        self,
        order: Order,
        position: Position,
        indexes: IndexCache,
        fetcher: ChunkFetcher,
        quarantine: Quarantine,
        store: CellStore,
        fetchers: Executor,
        part: int,
        batches: int,
        block_cells: int,
    ) -> Iterator[Block]:
        share = order.share(part, position)
        appearances = order.appearances(part, position)
        plan = order.plan(part, position, appearances)
        sources = [
            CellSource(
                self._shards,
                indexes,
                fetcher,
                each,
                line.shards,
                2 * plan.lanes,
                quarantine,
                self._clock,
            )
            for each, line in zip(appearances, plan.lines, strict=True)
        ]
        if self._choice.columns:
            # All at once: lane after lane, each would have to wait for its own.
            list(fetchers.map(lambda at: sources[at[0]].look_up(at[1]), _begun(plan, share)))
        return blocks(plan, share, batches, sources, store, fetchers, block_cells, self._clock)


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

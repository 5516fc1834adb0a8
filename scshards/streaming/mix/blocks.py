"""A rank's share of an epoch, as blocks of a few batches' worth of undecoded cells.

    lanes (streaming.mix.lanes) --deal--> Block: rows in batch order --streaming.collate.batches--> Batch

Called by streaming.mix.reading, on one thread at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.shards.shardlist import ShardList
from scshards.streaming.mix.lanes import Lanes
from scshards.streaming.mix.store import CellStore
from scshards.streaming.order.plan import EpochPlan, Share
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


def blocks(
    plan: EpochPlan,
    share: Share,
    batches: int,
    sources: Sequence[CellSource],
    store: CellStore,
    fetchers: Executor,
    block_cells: int,
    clock: StageClock,
) -> Iterator[Block]:
    """The blocks of a rank's share, `batches` batches in all, of about `block_cells` cells each.

    The first one is a batch, and each of the next has twice as many, so that the first batch need not
    wait for the cells of others.

    Raises whatever reading a chunk raises.
    """
    lanes = Lanes(plan, share, sources, store, fetchers, clock)
    per_block = max(1, block_cells // share.batch_size)
    begin = share.begin
    count = 1
    while batches:
        count = min(count, per_block, batches)
        end = min(share.end, begin + count * share.global_batch)
        with clock.time("deal"):
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


def new_store(shards: ShardList, stretches: int, buffered: int, columns: int) -> CellStore:
    """A store with room for what a rank's stretches, their buffers and its blocks hold at a time."""
    chunk = max((int(s.chunks.cells.max(initial=1)) for s in shards.shards), default=1)
    # Of each, besides its buffer, the chunk that it uses up and, half of the time, the next one.
    at_a_time = buffered + stretches * 3 * chunk // 2 + _BLOCKS * BLOCK_CELLS
    return CellStore(at_a_time, shards.cell_bytes * 9 // 8 + 64, columns)

"""A rank's share of an epoch, as blocks of a few batches' worth of undecoded cells.

    lanes (stream.reader) --deal, lane by lane--> Block: rows in batch order --stream.collate--> Batch

Lanes are asked for many cells at a time, so that no Python runs per cell. Called by stream.loader, on
one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.stream.buffers import BufferPool
from scshards.stream.plan import EpochPlan, Share
from scshards.stream.reader import LaneReader, Staging
from scshards.stream.source import CellSource

BLOCK_CELLS = 1024
"""About how many cells a block has: enough to make Python's share small, few enough to start soon."""

_BLOCKS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Cells of `batches` batches in a row; row i belongs to batch i // batch_size.

    A row whose size is 0 holds no cell: it only fills up the last batch of an evaluation. `begin` is
    the position of the epoch at which the first batch starts, the same on every rank.
    """

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]
    batches: int
    begin: int


def blocks(
    plan: EpochPlan, share: Share, batches: int, source: CellSource, fetchers: Executor
) -> Iterator[Block]:
    """The blocks of a rank's share, `batches` batches in all.

    Raises whatever reading a chunk raises.
    """
    lanes = share.my_lanes()
    cell_bytes = _cell_bytes(source) * 9 // 8  # some are longer than the mean
    readers = [
        LaneReader(plan, k, source, fetchers, share.emissions(k, share.begin), cell_bytes)
        for k in lanes
    ]
    per_block = max(1, BLOCK_CELLS // share.batch_size)
    buffers = BufferPool(kept=_BLOCKS)
    begin = share.begin
    while batches:
        count = min(per_block, batches)
        end = min(share.end, begin + count * share.global_batch)
        rows = count * share.batch_size
        # A block whose cells are longer than the mean grows; the next ones are as large as it became.
        staging = Staging(rows, len(source.columns), buffers.take(rows * cell_bytes + 4096))
        with source.clock.time("deal"):
            for reader in readers:
                _deal(reader, share, begin, end, staging)
        cell_bytes = max(cell_bytes, -(-int(staging.tail[0]) // rows))
        yield Block(
            data=staging.data,
            starts=staging.starts,
            sizes=staging.sizes,
            keys=staging.keys,
            labels=staging.labels,
            batches=count,
            begin=begin,
        )
        batches -= count
        begin += count * share.global_batch


def _deal(reader: LaneReader, share: Share, begin: int, end: int, staging: Staging) -> None:
    """Put a lane's cells at the positions [begin, end) where they belong in the block."""
    until = share.emissions(reader.lane, end)
    stride = share.stride()
    first = share.first_mine(reader.lane, reader.emitted)
    mine = np.arange(first, until, stride, dtype=np.int64)
    rows = share.rows(mine * share.lanes + reader.lane, begin)
    reader.deal(until, first, stride, rows, staging)


def _cell_bytes(source: CellSource) -> int:
    """The mean bytes of a cell in the split's tars, headers included: a first guess for buffers."""
    cells = sum(s.cells for s in source.shards)
    return int(sum(int(s.chunks.raw.sum()) for s in source.shards) / max(cells, 1)) + 1

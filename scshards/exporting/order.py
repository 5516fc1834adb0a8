"""`order="source"`: the cells as they were in the inputs, sorted outside of memory.

    members --SpillWriter--> a spill, grouped by bucket --> members, bucket after bucket, sorted

A bucket is a stretch of keys whose members take about BUCKET_BYTES. The shards are read once, in their
own order, for any compression and from any store: random reads would fetch a whole chunk for each cell.
Members are kept encoded. Called by exporting.export.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scshards.base.progress import Progress
from scshards.exporting.cells import SAMPLED, Members, Survey
from scshards.kernels import members as kernels
from scshards.shards.chunks import READ_BYTES
from scshards.shards.spill import SpillWriter, read_members, read_records

BUCKET_BYTES = 1 << 27


def in_source_order(
    members: Iterable[Members], survey: Survey, dtype: np.dtype[Any], folder: Path, *, shown: bool
) -> Iterator[Members]:
    """The cells by input and row, about READ_BYTES at a time.

    Parameters
    ----------
    members, dtype
        In any order; and of their cells.
    folder
        For temporary files, as large as all members.

    Raises
    ------
    StorageError
        When it can't be written.
    """
    buckets = np.cumsum(survey.sizes * SAMPLED) // BUCKET_BYTES
    bounds = survey.keys[1:][np.diff(buckets) > 0]
    total = sum(survey.cells.values())
    with (
        SpillWriter(folder, 0, len(bounds) + 1) as spill,
        Progress("sort", total, shown=shown) as bar,
    ):
        for some in members:
            cells, sizes = some.cells, np.ascontiguousarray(some.cells["size"])
            n, every = int(sizes.sum()), np.arange(len(cells))
            if spill.used + n > len(spill.members):
                spill.make_room(n)
            room = spill.members[spill.used :]
            kernels.gather_slices(some.raw, some.starts, sizes, every, room)
            bucket = np.searchsorted(bounds, cells["key"], side="right").astype(np.int32)
            spill.add(bucket, cells, spill.used + n)
            bar.add(len(cells), bytes=n)
    return _read_back(folder, dtype)


def _read_back(folder: Path, dtype: np.dtype[Any]) -> Iterator[Members]:
    segments = np.load(folder / "000000.npy")
    for of_bucket in np.split(segments, np.flatnonzero(np.diff(segments["shard"])) + 1):
        cells = read_records(folder, of_bucket, dtype)
        sizes = np.ascontiguousarray(cells["size"])
        starts = np.cumsum(sizes) - sizes
        raw = np.empty(int(sizes.sum()), np.uint8)
        for some, found in read_members(folder, of_bucket, sizes):
            raw[starts[some.start] :][: len(found)] = found
        raw.setflags(write=False)  # as chunks are: the kernels are compiled once
        order = np.argsort(cells["key"])
        part = np.cumsum(sizes[order]) // READ_BYTES
        for places in np.split(order, np.flatnonzero(np.diff(part)) + 1):
            yield Members(cells=cells[places], raw=raw, starts=starts[places])

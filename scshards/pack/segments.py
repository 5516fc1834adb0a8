"""The directories of all spills as one, by shard: which parts of which spills a shard is made of.

    merge(folder, tasks, shards)     segments.npy, and firsts.npy: where each shard begins in it

A directory has a row for each shard in each run of a task, so that all of them together grow with tasks
and shards, and may not fit in memory: they are merged for as many shards at a time as do. Called by
pack.phases, between scatter and write.
"""

from __future__ import annotations

import bisect
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.pack.marks import publish_array
from scshards.pack.sources_matrix import scratch_writes
from scshards.pack.spill import SEGMENT

SEGMENTS, FIRSTS, CELLS = "segments.npy", "firsts.npy", "shard-cells.npy"

GROUP_ROWS = 1 << 21
"""Most rows that are sorted in memory at once: 92 MB."""


def merge(folder: Path, n_tasks: int, n_shards: int) -> NDArray[np.int64]:
    """Write segments.npy and firsts.npy [shards + 1]; the cells of each shard [shards] come back.

    A task without a directory, which packed no cell, has no part in it. What is written appears whole or
    not at all; when it is there already, it is not made again.
    """
    with scratch_writes(folder):
        if (folder / CELLS).exists():
            done: NDArray[np.int64] = np.load(folder / CELLS)
            return done
        rows, cells = np.zeros(n_shards, np.int64), np.zeros(n_shards, np.int64)
        for number in range(n_tasks):
            part = np.load(folder / f"{number:06d}.npy", mmap_mode="r")
            for a in range(0, len(part), GROUP_ROWS):
                some = np.array(part[a : a + GROUP_ROWS])
                rows += np.bincount(some["shard"], minlength=n_shards)
                cells += np.bincount(some["shard"], some["cells"], n_shards).astype(np.int64)
        firsts = np.append(0, np.cumsum(rows))
        _write_segments(folder, n_tasks, firsts)
        publish_array(folder / FIRSTS, firsts)
        # Last: its presence says that the others are whole.
        publish_array(folder / CELLS, cells)
        return cells


def read_segments(folder: Path, shard: int) -> NDArray[Any]:
    """The rows of one shard, ordered by task."""
    firsts = np.load(folder / FIRSTS, mmap_mode="r")
    segments = np.load(folder / SEGMENTS, mmap_mode="r")
    return np.array(segments[int(firsts[shard]) : int(firsts[shard + 1])])


def _write_segments(folder: Path, n_tasks: int, firsts: NDArray[np.int64]) -> None:
    n_shards = len(firsts) - 1
    handle, temporary = tempfile.mkstemp(prefix=f"{SEGMENTS}.", suffix=".part", dir=folder)
    with os.fdopen(handle, "wb") as f:
        header = {"descr": SEGMENT.descr, "fortran_order": False, "shape": (int(firsts[-1]),)}
        np.lib.format.write_array_header_1_0(f, header)
        low = 0
        while low < n_shards:
            high = int(np.searchsorted(firsts, firsts[low] + GROUP_ROWS, side="right")) - 1
            high = min(max(high, low + 1), n_shards)
            parts = [np.empty(0, SEGMENT)]
            for number in range(n_tasks):
                part = np.load(folder / f"{number:06d}.npy", mmap_mode="r")
                a, b = (_place(part, shard) for shard in (low, high))
                parts.append(np.array(part[a:b]))
            rows = np.concatenate(parts)
            f.write(rows[np.argsort(rows["shard"], kind="stable")].data)
            low = high
    os.replace(temporary, folder / SEGMENTS)  # noqa: PTH105


def _place(directory: NDArray[Any], shard: int) -> int:
    """Where the rows of a shard begin in a directory, which is sorted by shard."""
    return bisect.bisect_left(
        range(len(directory)), shard, key=lambda i: int(directory[i]["shard"])
    )

"""Spill files: what pass 1 leaves in the scratch folder for pass 2, one per task.

    SpillWriter: members[used:] = ..., add(...)        000012.bin, then 000012.npy
    read_records(segments), read_members(segments)     one record per cell, and their members

A spill file is a row of runs. A run holds the cells that fit in one buffer, grouped by shard: first all
their records, then all their members. The directory (.npy) has a row for each shard in each run, ordered
by shard; it is written last, so that one that is there says that its spill is whole. Called by
pack.scatter and pack.writer.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.pack.buffers import borrowed
from scshards.pack.marks import publish_array
from scshards.pack.sources_matrix import scratch_writes
from scshards.shards import kernels as shard_kernels

RUN_BYTES = 1 << 26
"""Most bytes of members that are grouped in memory, unless one cell alone has more."""

SMALL_RUN_BYTES, SEGMENT_BYTES = 1 << 23, 1 << 15
"""What fits in a processor's cache is grouped faster; but pass 2 reads a shard's part of every run, and
those should not be small: a run has so many bytes for each shard, and no less than the small run."""

PIECE_BYTES = 1 << 20
"""How many bytes of members are read at once in pass 2, unless one cell alone has more."""

SEGMENT = np.dtype(
    [
        ("shard", "<i4"),
        ("task", "<i4"),
        ("cells", "<i8"),
        ("records_at", "<i8"),
        ("members_at", "<i8"),
        ("bytes", "<i8"),
    ]
)
"""A shard's cells in one run: how many, where their records and members are, bytes of members."""


def record_dtype(labels: Sequence[str]) -> np.dtype[Any]:
    """What is known of a cell beside its member; `labels` are the kinds of its labels."""
    fields = [("key", "<i8"), ("size", "<i8"), ("n_genes", "<i4"), ("total", "<f8")]
    fields += [
        (f"label-{i}", "<f8" if kind == "number" else "<i4") for i, kind in enumerate(labels)
    ]
    return np.dtype(fields)


class SpillWriter:
    """Writes one task's spill; a context manager that leaves no directory when it fails.

    Attributes
    ----------
    members
        uint8: where members are to be written, from `used` on.
    used
        How much of it is filled.
    """

    members: NDArray[np.uint8]

    def __init__(self, folder: Path, task: int, n_shards: int) -> None:
        self._path, self._task = folder / f"{task:06d}.bin", task
        self._run_bytes = min(RUN_BYTES, max(SMALL_RUN_BYTES, n_shards * SEGMENT_BYTES))
        self.used = 0
        self._records: list[NDArray[Any]] = []
        self._shards: list[NDArray[np.int32]] = []
        self._segments: list[NDArray[Any]] = []
        self._at = 0

    def __enter__(self) -> SpillWriter:
        # A name of its own: another process may do the same task, after this one was given up.
        with scratch_writes(self._path):
            handle, self._temporary = tempfile.mkstemp(
                prefix=f"{self._path.name}.", suffix=".part", dir=self._path.parent
            )
            self._file = os.fdopen(handle, "wb")
        self._buffers = contextlib.ExitStack()
        self._take_buffers(self._run_bytes)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self._buffers, self._file:
            if kind is None:
                self._flush()
        if kind is not None:
            Path(self._temporary).unlink(missing_ok=True)
            return
        segments = np.concatenate([np.empty(0, SEGMENT), *self._segments])
        with scratch_writes(self._path):
            os.replace(self._temporary, self._path)  # noqa: PTH105
        order = np.argsort(segments["shard"], kind="stable")
        publish_array(self._path.with_suffix(".npy"), segments[order])

    def add(self, shards: NDArray[np.int32], records: NDArray[Any], end: int) -> None:
        """Add the cells whose members were written to `members` one after another, up to `end`."""
        self.used = end
        if len(records):
            self._shards.append(shards)
            self._records.append(records)

    def make_room(self, size: int) -> None:
        """Empty `members`, which has room for at least `size` bytes then."""
        self._flush()
        if size > len(self.members):
            self._buffers.close()
            self._take_buffers(size)

    def _take_buffers(self, size: int) -> None:
        self.members, self._grouped = (self._buffers.enter_context(borrowed(size)) for _ in "12")

    def _flush(self) -> None:
        if not self._records:
            return
        shards, records = np.concatenate(self._shards), np.concatenate(self._records)
        order = np.argsort(shards, kind="stable")
        sizes = records["size"]
        n = shard_kernels.gather_slices(
            self.members, np.cumsum(sizes) - sizes, sizes, order, self._grouped
        )
        assert n == self.used
        shards, records = shards[order], records[order]
        first = np.flatnonzero(np.append(True, shards[1:] != shards[:-1]))
        ends = np.append(0, np.cumsum(records["size"]))
        segments = np.empty(len(first), SEGMENT)
        segments["shard"], segments["task"] = shards[first], self._task
        segments["cells"] = np.diff(np.append(first, len(shards)))
        segments["records_at"] = self._at + first * records.dtype.itemsize
        segments["members_at"] = self._at + records.nbytes + ends[first]
        segments["bytes"] = np.diff(np.append(ends[first], ends[-1]))
        with scratch_writes(self._path):
            self._file.write(records.data)
            self._file.write(self._grouped[:n].data)
        self._at += records.nbytes + n
        self._segments.append(segments)
        self._records, self._shards, self.used = [], [], 0


def read_records(folder: Path, segments: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The records of the cells of one shard.

    Parameters
    ----------
    folder
        Of the spill files.
    segments
        The shard's rows of all directories, ordered by task.
    dtype
        Of the records.
    """
    records = np.empty(int(segments["cells"].sum()), dtype)
    p = 0
    for f, s in _opened(folder, segments):
        n = int(s["cells"])
        _read_into(f, int(s["records_at"]), records[p : p + n].view(np.uint8))
        p += n
    return records


def read_members(
    folder: Path, segments: NDArray[Any], sizes: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """The members of the same cells, some at a time: (which cells, their members one after another).

    `sizes` are those of the cells' members. The bytes are good until the next are asked for.
    """
    ends = np.cumsum(sizes)
    with borrowed(int(max(PIECE_BYTES, sizes.max(initial=0)))) as buffer:
        first = 0
        for f, s in _opened(folder, segments):
            last = first + int(s["cells"])
            start = base = int(ends[first] - sizes[first])
            while first < last:
                # As many of the segment's cells as fit.
                stop = min(int(np.searchsorted(ends, start + len(buffer), side="right")), last)
                members = buffer[: int(ends[stop - 1]) - start]
                _read_into(f, int(s["members_at"]) + start - base, members)
                yield slice(first, stop), members
                first, start = stop, int(ends[stop - 1])


def _opened(folder: Path, segments: NDArray[Any]) -> Iterator[tuple[Any, Any]]:
    """Each segment with its spill file, each file opened once."""
    for task, group in itertools.groupby(segments, key=lambda s: int(s["task"])):
        with (folder / f"{task:06d}.bin").open("rb", buffering=0) as f:
            for s in group:
                yield f, s


def _read_into(f: Any, at: int, out: NDArray[np.uint8]) -> None:
    f.seek(at)
    view = out.data
    while len(view):
        n = f.readinto(view)
        assert n, "a spill file is shorter than its directory says"
        view = view[n:]

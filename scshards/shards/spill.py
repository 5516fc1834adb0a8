"""Spill files: members in a scratch folder, grouped by shard. Pass 1 of a pack leaves one per task for
pass 2; export sorts by one.

    SpillWriter: members[used:] = ..., add(...)        000012.bin, then 000012.npy
    read_records(segments), read_members(segments)     one record per cell, and their members

A spill file is a row of runs. A run holds the cells that fit in one buffer, grouped by shard: first all
their records, then all their members. The directory (.npy) has a row for each shard in each run, ordered
by shard, with checksums of both parts. They are looked at before anything of them is used: what a
crash, a full disk or a bad one has made of a spill is a DamagedSpill, and the task is done again.

The directories of all spills as one, by shard: which parts of which spills a shard is made of.

    merge(folder, tasks, shards)     segments.npy, and shard-cells.npy: the cells of each shard

All directories together grow with tasks and shards, and may not fit in memory: they are merged for as
many shards at a time as do.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64, xxh64_intdigest

from scshards.base.errors import StorageError
from scshards.base.files import publish_array, publishing, scratch_writes
from scshards.kernels import members as shard_kernels

_free: list[NDArray[np.uint8]] = []


@contextlib.contextmanager
def borrowed(size: int) -> Iterator[NDArray[np.uint8]]:
    """So many bytes of any content, which are kept for the next who asks.

    A process never keeps more arrays than were borrowed at one time: one that is too small makes way.
    """
    buffer = np.empty(0, np.uint8)
    with contextlib.suppress(IndexError):
        buffer = _free.pop()
    if len(buffer) < size:
        del buffer  # before the new one is made, so that both are never there
        buffer = np.empty(size, np.uint8)
    try:
        yield buffer[:size]
    finally:
        _free.append(buffer)


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
        ("records_sum", "<u8"),
        ("members_sum", "<u8"),
    ]
)
"""A shard's cells in one run: how many, where their records and members are, bytes of members, and the
XXH64 of both."""


class DamagedSpill(StorageError):
    """A spill that is not what its task has written; `task` is its number, -1 for all together."""

    @classmethod
    def of(cls, folder: Path, task: int) -> DamagedSpill:
        name = SEGMENTS if task < 0 else f"{task:06d}.bin"
        return cls("a temporary file is damaged", where=folder / name)

    @property
    def task(self) -> int:
        stem = Path(self.where or "").stem
        return int(stem) if stem.isdigit() else -1


def forget(folder: Path, task: int) -> None:
    """Remove a spill and all that speaks for it, so that its task is done again."""
    names = (f"{task:06d}.json", f"{task:06d}.npy", f"{task:06d}.bin", CELLS, SEGMENTS)
    with scratch_writes(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)


def record_dtype(labels: Sequence[str], arrays: bool = False) -> np.dtype[Any]:
    """What is known of a cell beside its member; `labels` are the kinds of its labels.

    With `arrays`, `size` is that of its two members, and `arrays` that of the second.
    """
    fields = [("key", "<i8"), ("size", "<i8"), ("n_genes", "<i4"), ("total", "<f8")]
    fields += [("arrays", "<i8")] if arrays else []
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
        # Another process may do the same task, after this one was given up.
        self._publishing = publishing(self._path, is_last=False)
        with scratch_writes(self._path):
            self._file = self._publishing.__enter__()
        self._buffers = contextlib.ExitStack()
        self._take_buffers(self._run_bytes)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self._buffers:
            if error is not None:
                self._publishing.__exit__(kind, error, trace)
                return
            with scratch_writes(self._path), contextlib.ExitStack() as stack:
                stack.push(self._publishing)
                self._flush()
        segments = np.concatenate([np.empty(0, SEGMENT), *self._segments])
        order = np.argsort(segments["shard"], kind="stable")
        publish_array(self._path.with_suffix(".npy"), segments[order], is_last=False)

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
        for name, part, cuts in (
            ("records_sum", records, first[1:]),
            ("members_sum", self._grouped[:n], ends[first[1:]]),
        ):
            segments[name] = [xxh64_intdigest(some.data) for some in np.split(part, cuts)]
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

    Raises
    ------
    DamagedSpill
        When they are not those that were written.
    """
    records = np.empty(int(segments["cells"].sum()), dtype)
    p = 0
    for f, s in _opened(folder, segments):
        n = int(s["cells"])
        some = records[p : p + n].view(np.uint8)
        if (
            not _filled(f, int(s["records_at"]), some)
            or xxh64_intdigest(some.data) != s["records_sum"]
        ):
            raise DamagedSpill.of(folder, int(s["task"]))
        p += n
    return records


def read_members(
    folder: Path, segments: NDArray[Any], sizes: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """The members of the same cells, some at a time: (which cells, their members one after another).

    `sizes` are those of the cells' members. The bytes are good until the next are asked for. A
    DamagedSpill may come after the bytes that it is about, so none is to be sealed before the last.
    """
    ends = np.cumsum(sizes)
    with borrowed(int(max(PIECE_BYTES, sizes.max(initial=0)))) as buffer:
        first = 0
        for f, s in _opened(folder, segments):
            last = first + int(s["cells"])
            start = base = int(ends[first] - sizes[first])
            found = xxh64()
            while first < last:
                # As many of the segment's cells as fit.
                stop = min(int(np.searchsorted(ends, start + len(buffer), side="right")), last)
                members = buffer[: int(ends[stop - 1]) - start]
                if not _filled(f, int(s["members_at"]) + start - base, members):
                    raise DamagedSpill.of(folder, int(s["task"]))
                found.update(members.data)
                yield slice(first, stop), members
                first, start = stop, int(ends[stop - 1])
            if found.intdigest() != s["members_sum"]:
                raise DamagedSpill.of(folder, int(s["task"]))


def _opened(folder: Path, segments: NDArray[Any]) -> Iterator[tuple[Any, Any]]:
    """Each segment with its spill file, each file opened once."""
    for task, group in itertools.groupby(segments, key=lambda s: int(s["task"])):
        try:
            file = (folder / f"{task:06d}.bin").open("rb", buffering=0)
        except FileNotFoundError:
            raise DamagedSpill.of(folder, task) from None
        with file:
            for s in group:
                yield file, s


def _filled(f: Any, at: int, out: NDArray[np.uint8]) -> bool:
    """Fill an array from a place of a file; False when the file ends before."""
    f.seek(at)
    view = out.data
    while len(view):
        n = f.readinto(view)
        if not n:
            return False
        view = view[n:]
    return True


SEGMENTS, CELLS = "segments.npy", "shard-cells.npy"

GROUP_ROWS = 3 << 19
"""About so many rows are sorted in memory at once: 94 MB."""


def merge(folder: Path, n_tasks: int, n_shards: int) -> NDArray[np.int64]:
    """Write segments.npy, the rows of all directories by shard and task; the cells of each shard.

    What is written appears whole or not at all; when it is there already, it is not made again.

    Raises
    ------
    DamagedSpill
        When a directory is not what its task has written, or the two files here do not agree.
    """
    with scratch_writes(folder):
        if (folder / CELLS).exists():
            return _merged(folder, n_shards)
        parts = [_directory(folder, number, n_shards) for number in range(n_tasks)]
        cells = np.zeros(n_shards, np.int64)
        with publishing(folder / SEGMENTS, is_last=False) as f:
            shape = (sum(map(len, parts)),)
            header = {"descr": SEGMENT.descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            for some in stretches([part["shard"] for part in parts], GROUP_ROWS):
                rows = np.concatenate([part[s] for part, s in zip(parts, some, strict=True)])
                rows = rows[np.argsort(rows["shard"], kind="stable")]
                cells += np.bincount(rows["shard"], rows["cells"], n_shards).astype(np.int64)
                f.write(rows.data)
        # Last: its presence says that the other is whole.
        publish_array(folder / CELLS, cells)
        return cells


def _merged(folder: Path, n_shards: int) -> NDArray[np.int64]:
    """The cells of each shard, of which the rows by shard and task are as many."""
    try:
        cells: NDArray[np.int64] = np.load(folder / CELLS)
        segments = np.load(folder / SEGMENTS, mmap_mode="r")
        found = np.zeros(n_shards, np.int64)
        for start in range(0, len(segments), GROUP_ROWS):
            rows = segments[start : start + GROUP_ROWS]
            found += np.bincount(rows["shard"], rows["cells"], n_shards).astype(np.int64)
        is_whole = np.array_equal(cells, found)
    except (OSError, ValueError, EOFError):
        is_whole = False
    if not is_whole:
        raise DamagedSpill.of(folder, -1)
    return cells


def read_segments(folder: Path, shard: int) -> NDArray[Any]:
    """The rows of one shard, which has some, ordered by task.

    Raises
    ------
    DamagedSpill
        When they are not all rows of this shard.
    """
    try:
        segments = np.load(folder / SEGMENTS, mmap_mode="r")
        a, b = (bisect.bisect_left(segments["shard"], s) for s in (shard, shard + 1))
        mine = np.array(segments[a:b])
        n_cells = int(np.load(folder / CELLS, mmap_mode="r")[shard])
        is_whole = bool((mine["shard"] == shard).all()) and mine["cells"].sum() == n_cells > 0
    except (ValueError, EOFError, IndexError):
        is_whole = False
    if not is_whole:
        raise DamagedSpill.of(folder, -1)
    return mine


def stretches(columns: Sequence[NDArray[Any]], most: int) -> Iterator[list[slice]]:
    """Cut sorted columns alike, so that about `most` values of all of them are in memory at a time.

    Yields
    ------
    A slice of each column. Equal values are in one stretch; those of the next are above them.
    """
    step = max(1, most // (16 * len(columns)))
    samples = np.sort(np.concatenate([column[::step] for column in columns]))
    starts = [0] * len(columns)
    for cut in (*np.unique(samples[:: max(1, most // step)])[1:], None):
        ends = [
            len(column) if cut is None else bisect.bisect_left(column, cut, start)
            for column, start in zip(columns, starts, strict=True)
        ]
        yield list(map(slice, starts, ends))
        starts = ends


def _directory(folder: Path, number: int, n_shards: int) -> NDArray[Any]:
    """The directory of a spill, mapped; rows that nobody wrote are found here, or by their sums."""
    try:
        part: NDArray[Any] = np.load(folder / f"{number:06d}.npy", mmap_mode="r")
        shards = part["shard"]
        is_whole = part.dtype == SEGMENT and bool((np.diff(shards) >= 0).all())
        is_whole = is_whole and (not len(part) or bool(0 <= shards[0] <= shards[-1] < n_shards))
    except (FileNotFoundError, ValueError, EOFError, IndexError):
        is_whole = False  # no array of segments
    if not is_whole:
        raise DamagedSpill.of(folder, number)
    return part

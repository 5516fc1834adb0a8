"""`--unique COL`: of the cells of all inputs that share a value, only the first is kept.

    drop_repeated(folder, surveys, options)     unique.bin of each source -> its split-unique.npy
    load_split(folder, ordinal, options)        what pass 1 goes by

The first is that of the lowest source and row among the cells that are in a split: those that `--where`
keeps, before any is dropped for its genes or counts. Sources are merged by stretches of the hash, so
memory is bounded by `PART_CELLS`, and an eighth of a byte for each row of all inputs. Called by
pack.phases and pack.scatter.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scshards.pack import plan
from scshards.pack.marks import publish_array
from scshards.pack.options import PackOptions
from scshards.pack.sources_matrix import scratch_writes
from scshards.pack.survey import SPLIT, Survey, source_folder
from scshards.pack.unique_hashes import HASHES, RECORD

FINAL_SPLIT = "split-unique.npy"

PART_CELLS = 1 << 21
"""So many cells of all sources are compared at a time: about 150 MB."""


def dropped_reason(options: PackOptions) -> str:
    """How the manifest and messages name why repeated cells are dropped."""
    return f"not unique by {options.unique}"


def load_split(folder: Path | str, ordinal: int, options: PackOptions) -> NDArray[np.int8]:
    """The split code of each row of a source, repeated cells dropped; mapped, not read."""
    name = SPLIT if options.unique is None else FINAL_SPLIT
    codes: NDArray[np.int8] = np.load(source_folder(str(folder), ordinal) / name, mmap_mode="r")
    return codes


def final_splits(
    folder: Path | str, surveys: Sequence[Survey], options: PackOptions
) -> Iterator[NDArray[np.int8]]:
    """The same of all sources, one open at a time."""
    for s in surveys:
        yield load_split(folder, s.ordinal, options)


def drop_repeated(
    folder: Path | str,
    surveys: Sequence[Survey],
    options: PackOptions,
    *,
    before: Sequence[tuple[Path, int]] = (),
    looked_at: Callable[[int], None] | None = None,
) -> tuple[tuple[int, ...], dict[int, int]]:
    """Find the cells that are not the first of their value, and write each source's final split.

    The same comes out however often it is done and whenever it is stopped: it reads what the surveys
    left and leaves it as it is.

    Parameters
    ----------
    folder, surveys
        The pack's scratch folder, and the surveys of all sources by ordinal.
    before
        Folders with the hashes of cells that come before all others, and how many cells each has.
    looked_at
        Called with numbers of cells as they are compared; their sum is that of all cells in a split.

    Returns
    -------
    Cells of each split over all sources, and {ordinal: cells dropped} of the sources that lose any.
    """
    codes = range(len(options.splits))
    if options.unique is None:
        return tuple(sum(s.cells[code] for s in surveys) for code in codes), {}
    own = [source_folder(str(folder), s.ordinal) for s in surveys]
    folders = [f for f, _ in before] + own
    sizes = [n for _, n in before] + [sum(s.cells) for s in surveys]
    n_parts = max(1, -(-sum(sizes) // PART_CELLS))
    bounds = [_bounds(f / HASHES, size, n_parts) for f, size in zip(folders, sizes, strict=True)]
    # One bit for each row.
    n_rows = [n for _, n in before] + [s.n_rows for s in surveys]
    repeated = [np.zeros(-(-n // 8), np.uint8) for n in n_rows]
    for part in range(n_parts):
        n = _mark_repeated(folders, bounds, part, repeated)
        if looked_at is not None:
            looked_at(n)
    cells = np.zeros(len(codes), np.int64)
    dropped = {}
    for s, path, bits in zip(surveys, own, repeated[len(before) :], strict=True):
        split = np.load(path / SPLIT)
        again = np.unpackbits(bits, count=s.n_rows, bitorder="little").astype(np.bool_)
        split[again] = plan.DROPPED
        publish_array(path / FINAL_SPLIT, split)
        # Codes are -1, 0, 1, ...
        cells += np.bincount(split + 1, minlength=len(codes) + 1)[1:]
        if again.any():
            dropped[s.ordinal] = int(again.sum())
    return tuple(cells.tolist()), dropped


def _bounds(path: Path, size: int, n_parts: int) -> list[int]:
    """Where each part's stretch of the hashes begins in a source's file, and the end [parts + 1]."""
    if not size:
        return [0] * (n_parts + 1)
    high = np.memmap(path, RECORD, "r")["high"]
    firsts = [np.uint64((part << 64) // n_parts) for part in range(n_parts)]
    return [*(bisect.bisect_left(high, first) for first in firsts), size]


def _mark_repeated(
    folders: Sequence[Path],
    bounds: Sequence[Sequence[int]],
    part: int,
    repeated: Sequence[NDArray[np.uint8]],
) -> int:
    """Set the bits of one part's repeated cells; how many cells the part has."""
    with scratch_writes(folders[0].parent if folders else Path()):
        found = [
            np.fromfile(
                folder / HASHES, RECORD, b[part + 1] - b[part], offset=b[part] * RECORD.itemsize
            )
            for folder, b in zip(folders, bounds, strict=True)
        ]
    lengths = [len(records) for records in found]
    records = np.concatenate(found) if found else np.empty(0, RECORD)
    del found
    # Stable: equal hashes stay in the order of sources and rows, and the first of them is kept.
    order = np.lexsort((records["low"], records["high"]))
    is_repeated = np.zeros(len(order), np.bool_)
    is_repeated[1:] = True
    for half in ("high", "low"):
        hashes = records[half][order]
        is_repeated[1:] &= hashes[1:] == hashes[:-1]
    dropped = np.sort(order[is_repeated])
    ends = np.cumsum(lengths)
    for ordinal, end in enumerate(ends.tolist()):
        first, last = np.searchsorted(dropped, (end - lengths[ordinal], end))
        rows = records["row"][dropped[first:last]]
        np.bitwise_or.at(repeated[ordinal], rows >> 3, (1 << (rows & 7)).astype(np.uint8))
    return len(records)

"""The arithmetic of reading rows of a SOMA matrix: how many at once, and values in any order to rows.

Called by atlas.soma.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.atlas import kernels

Part = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]
"""Values of a matrix in any order: the ids of their rows, of their columns, and they themselves."""

_ROWS = 8
"""A read is of at most so many times the cells that hold `read_values` on average."""


def stretches(
    ids: NDArray[np.int64],
    n_values: NDArray[np.int64] | None,
    read_values: int,
    mean: float,
    tile: int = 1,
) -> Iterator[tuple[int, int]]:
    """Cut cells into stretches of about as many values, at most twice `read_values` but for one cell.

    They end where tiles of rows do, if that is near: what is inflated for two stretches takes a third
    of the time. And they are even: a small rest would take as long as a whole one.

    Parameters
    ----------
    ids
        soma_joinids, ascending.
    n_values
        How many values each cell has, where it is known, else `mean`.
    tile
        Rows of a tile.
    """
    n, rows = len(ids), max(1, int(read_values / max(mean, 1.0)))
    ends = np.arange(1, n + 1) * mean if n_values is None else np.cumsum(n_values)
    start = 0
    while start < n:
        before = float(ends[start - 1]) if start else 0.0
        left = float(ends[-1]) - before
        step = left / max(1, round(left / read_values))
        # What obs says is not always so: cells that it says hold nothing are not read all at once.
        most = start + _ROWS * rows
        stop = min(max(int(np.searchsorted(ends, before + step, "right")), start + 1), most, n)
        if stop < n and tile > 1:
            later = int(np.searchsorted(ids, -(-int(ids[stop]) // tile) * tile))
            sooner = int(np.searchsorted(ids, int(ids[stop]) // tile * tile))
            if later <= most and float(ends[later - 1]) - before <= 2 * read_values:
                stop = later
            elif sooner > start and float(ends[sooner - 1]) - before >= read_values / 2:
                stop = sooner
        yield start, stop
        start = stop


def by_row(
    ids: NDArray[np.int64], parts: Sequence[Part], dtype: np.dtype[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any], int]:
    """Values in any order -> by rows.

    Parameters
    ----------
    ids
        soma_joinids of the rows, ascending.
    parts
        Values with the soma_joinids of their rows, all of them among `ids`, and of their columns.
    dtype
        Of the values.

    Returns
    -------
    indptr int64 [rows + 1], columns int32, values, and the largest column of all, -1 without values.
    """
    first, table = _places(ids)
    found = [
        (rows if table is not None else np.searchsorted(ids, rows), columns, values)
        for rows, columns, values in parts
    ]
    if table is None:
        first, table = 0, np.arange(len(ids), dtype=np.int32)
    indptr = np.zeros(len(ids) + 1, np.int64)
    for rows, _, _ in found:
        kernels.count_rows(rows, first, table, indptr[1:])
    np.cumsum(indptr, out=indptr)
    at = indptr[:-1].copy()
    out_columns, out_values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], dtype)
    largest = -1
    for rows, columns, values in found:
        seen = kernels.deal_to_rows(
            rows, columns, values, first, table, at, out_columns, out_values
        )
        largest = max(largest, int(seen))
    return indptr, out_columns, out_values, largest


def _places(ids: NDArray[np.int64]) -> tuple[int, NDArray[np.int32] | None]:
    """The first id, and the place of each id from there on; no table where it would be too long."""
    first, stretch = int(ids[0]), int(ids[-1] - ids[0]) + 1
    if stretch > 64 * len(ids) + (1 << 16):
        return first, None
    table = np.zeros(stretch, np.int32)
    table[ids - first] = np.arange(len(ids), dtype=np.int32)
    return first, table

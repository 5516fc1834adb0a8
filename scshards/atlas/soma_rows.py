"""The arithmetic of reading rows of a SOMA matrix: how many at once, and values in any order to rows.

Called by atlas.soma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def places(ids: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], NDArray[np.int32]]:
    """A function from soma_joinids to their places in `ids`, as int32."""
    stretch = int(ids[-1] - ids[0]) + 1
    if stretch == len(ids):
        return lambda found: (found - ids[0]).astype(np.int32)
    if stretch > 64 * len(ids) + (1 << 16):
        return lambda found: np.searchsorted(ids, found).astype(np.int32)
    table = np.zeros(stretch, np.int32)
    table[ids - ids[0]] = np.arange(len(ids), dtype=np.int32)
    return lambda found: table[found - ids[0]]


def by_row(
    rows: list[NDArray[np.int32]],
    columns: list[NDArray[np.int32]],
    values: list[NDArray[Any]],
    n_rows: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """Values in any order, in parts -> (indptr int64, columns, values) by rows."""
    row, column, value = _joined(rows), _joined(columns), _joined(values)
    if (row[1:] >= row[:-1]).all():
        indptr = np.zeros(n_rows + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=n_rows), out=indptr[1:])
        return indptr, column, value
    # scipy deals out in compiled code; said that no place is there twice, it sorts nothing.
    from scipy.sparse import coo_array

    matrix = coo_array((value, (row, column)), shape=(n_rows, np.iinfo(np.int32).max))
    matrix.has_canonical_format = True
    by_rows = matrix.tocsr()
    return by_rows.indptr.astype(np.int64), by_rows.indices, by_rows.data


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

"""The arithmetic of reading rows of a SOMA matrix: how many at once, and values in any order to rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.kernels import rows as kernels

Part = Sequence[NDArray[Any]]
"""Values of a matrix in any order: the ids of their rows, of their columns, and they themselves."""

_ROWS = 8
"""A read is of at most so many times the cells that hold `read_values` on average."""


class Rows(NamedTuple):
    """Some cells' rows of a matrix: indptr from 0; soma_joinids of genes, in any order within a row."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    data: NDArray[Any]


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
    ids: NDArray[np.int64],
    parts: Iterable[Part],
    dtype: np.dtype[Any],
    n_genes: int,
    n_values: NDArray[np.int64] | None = None,
) -> Rows | None:
    """Values in any order -> by rows.

    Parameters
    ----------
    ids
        soma_joinids of the rows, ascending.
    dtype
        Of the values.
    n_genes
        All columns are below it; else ValueError.
    n_values
        How many each row has, where it is said: then no part is held. Else all are until the last one
        has come, 12 bytes a value.

    Returns
    -------
    None where rows have others than `n_values`. Not all parts may have been asked for then.
    """
    first, length = int(ids[0]), int(ids[-1] - ids[0]) + 1
    places = table = np.arange(len(ids), dtype=np.int32)
    if length <= 64 * len(ids) + (1 << 16):
        table = np.full(length, -1, np.int32)
        table[ids - first] = places
    else:  # a table of all ids between them would be too long
        parts, first = ((_searched(ids, r), c, v) for r, c, v in parts), 0
    largest = -1
    if n_values is None:
        held, n_values = [], np.zeros(len(ids), np.int64)
        for rows, columns, values in parts:
            # The copy is for the allocator: with what it leaves, all this takes a third less time.
            rows = table[rows - first].astype(np.int32)
            held.append((rows, columns.astype(np.int32), values))
            n_values += np.bincount(rows, minlength=len(ids))
            largest = max(largest, int(columns.max(initial=-1)))
        parts, first, table = held, 0, places
    indptr = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(n_values, out=indptr[1:])
    at = indptr[:-1].copy()
    indices, data = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], dtype)
    for part in parts:
        seen = kernels.deal_to_rows(*part, first, table, at, indptr[1:], indices, data)
        if seen == kernels.TOO_MANY:
            return None
        largest = max(largest, int(seen))
    if largest >= n_genes:
        raise ValueError(f"the matrix has a value of gene {largest}, and var has {n_genes:,} genes")
    return Rows(indptr, indices, data) if np.array_equal(at, indptr[1:]) else None


def _searched(ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.intp]:
    """The place of each row among the ids, -1 for a row that is not there."""
    places = np.searchsorted(ids, rows)
    return np.where(ids[np.minimum(places, len(ids) - 1)] == rows, places, -1)

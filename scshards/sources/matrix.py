"""Matrices on disk, read by rows in bounded memory: CSR, dense, and CSC by an external transposition.

They see arrays only through slices, `.shape`, `.dtype` and `.chunks`, as h5py and zarr offer them.
Called by sources.anndata, sources.tenx and sources.mtx.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.base.files import Once
from scshards.cells.tokenizer import dense_to_csr
from scshards.kernels import rows as kernels
from scshards.sources.rows import BLOCK_ROWS, BLOCK_VALUES, MAKE_ANEW, Block, kernel_dtype, reading

SLAB_VALUES = 1 << 24
"""Most values of a dense matrix that are read at once, so that a row of its chunks is read whole."""

_SAMPLES = 16


class ByRows:
    """A matrix whose rows can be read as they are."""

    needs_transposing = False

    def transpose(self) -> None:
        """Nothing is to be done."""

    def close(self) -> None:
        """Nothing is to be removed."""


class Csr(ByRows):
    """Compressed rows: as many reads as blocks."""

    def __init__(self, indptr: Any, indices: Any, data: Any, shape: tuple[int, int], where: str):
        self.shape, self._where = shape, where
        self._indptr, self._indices, self._data = indptr, indices, data
        _check_parts(indptr, indices, data, shape[0], where)
        self.n_values = int(data.shape[0])

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        for first in range(start, stop, max_rows):
            with reading(self._where):
                window = self._indptr[first : min(first + max_rows, stop) + 1].astype(np.int64)
            _check_indptr(window, self.n_values, self._where)
            _check_ends(
                window[0] if first == 0 else None,
                window[-1] if first + len(window) - 1 == self.shape[0] else None,
                self.n_values,
                self._where,
            )
            for a, b in row_cuts(window, max_values):
                indptr = window[a : b + 1]
                with reading(self._where):
                    indices = self._indices[indptr[0] : indptr[-1]]
                    data = self._data[indptr[0] : indptr[-1]]
                yield Block(
                    first + a, indptr, _checked_columns(indices, self.shape[1], self._where), data
                )

    def sample(self, n_values: int) -> NDArray[Any]:
        return _sample(self._data, n_values, self._where)


class Dense(ByRows):
    """A plain two-dimensional array, read in slabs of whole chunks where they fit in memory."""

    def __init__(self, data: Any, where: str):
        if len(data.shape) != 2:
            raise SourceError(f"the matrix has {len(data.shape)} dimensions, not 2", where=where)
        _check_dtype(data, where)
        self.shape: tuple[int, int] = (int(data.shape[0]), int(data.shape[1]))
        self.n_values = self.shape[0] * self.shape[1]
        self._data, self._where = data, where

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        columns = max(self.shape[1], 1)
        rows = max(1, min(max_rows, max_values // columns))
        chunk = self._data.chunks[0] if self._data.chunks else 1
        slab = max(1, min(-(-rows // chunk) * chunk, SLAB_VALUES // columns))
        at = start
        while at < stop:
            # Slabs end where chunks do, so that only the first and last chunk are read twice.
            end = min(at + slab - at % chunk if slab % chunk == 0 else at + slab, stop)
            with reading(self._where):
                values = self._data[at:end]
            for a in range(0, end - at, rows):
                yield Block(at + a, *dense_to_csr(values[a : a + rows]))
            at = end

    def sample(self, n_values: int) -> NDArray[Any]:
        rows = max(1, n_values // max(self.shape[1], 1))
        parts = [self._data[:0]]
        with reading(self._where):
            parts += [self._data[a:b] for a, b in spread(self.shape[0], rows)]
        return np.concatenate(parts).reshape(-1)


class Csc:
    """Compressed columns: written out by rows once, then read like compressed rows.

    The rows are cut into buckets of at most BLOCK_VALUES values (a longer row is a bucket of its own).
    Two passes read the columns in pieces of as many values: one counts the values of each row, one
    appends each value to its bucket. A bucket then fits in memory and is sorted there. On disk it takes
    4 + 4 bytes and the value itself for each value; in memory 8 bytes for each row and column.
    """

    def __init__(
        self,
        indptr: Any,
        indices: Any,
        data: Any,
        shape: tuple[int, int],
        where: str,
        scratch: Path | None,
    ):
        self.shape, self._where = shape, where
        self._indptr, self._indices, self._data = indptr, indices, data
        _check_parts(indptr, indices, data, shape[1], where)
        self.n_values = int(data.shape[0])
        self._scratch = Once(scratch)

    needs_transposing = True

    def close(self) -> None:
        self._scratch.close()

    def transpose(self) -> None:
        """Write the buckets, unless they are there already; other processes see all of them or none."""
        self._scratch.made(self._write_buckets)

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        folder = self._scratch.made(self._write_buckets)
        indptr = np.load(folder / "indptr.npy", mmap_mode="r")
        bounds = np.load(folder / "bounds.npy")
        for k in range(len(bounds) - 1):
            first, last = max(start, int(bounds[k])), min(stop, int(bounds[k + 1]))
            if first >= last:
                continue
            ptr = np.array(indptr[bounds[k] : bounds[k + 1] + 1])
            rows, columns, values = (
                np.fromfile(folder / name, dtype, ptr[-1] - ptr[0], offset=dtype.itemsize * ptr[0])
                for name, dtype in self._triplets()
            )
            ptr -= ptr[0]
            out_columns, out_values = np.empty_like(columns), np.empty_like(values)
            kernels.sort_by_row(rows, columns, values, ptr, out_columns, out_values)
            window = ptr[first - bounds[k] : last - bounds[k] + 1]
            for c, d in row_cuts(window, max_values, max_rows):
                p, q = int(window[c]), int(window[d])
                yield Block(first + c, window[c : d + 1], out_columns[p:q], out_values[p:q])

    def sample(self, n_values: int) -> NDArray[Any]:
        return _sample(self._data, n_values, self._where)

    def _columns(self) -> tuple[int, int, Callable[[int, int], NDArray[Any]]]:
        """(the first value, the end of the values, a function that gives the columns of a:b)."""
        with reading(self._where):
            column_ptr = self._indptr[:].astype(np.int64)
        _check_indptr(column_ptr, self.n_values, self._where)
        _check_ends(column_ptr[0], column_ptr[-1], self.n_values, self._where)

        def of_values(a: int, b: int) -> NDArray[Any]:
            inside = np.clip(column_ptr, a, b)
            return np.repeat(np.arange(self.shape[1]), np.diff(inside))

        return int(column_ptr[0]), int(column_ptr[-1]), of_values

    def _write_buckets(self, folder: Path) -> None:
        first, end, columns_of = self._columns()
        counts = np.zeros(self.shape[0], np.int64)
        pieces = [(a, min(a + BLOCK_VALUES, end)) for a in range(first, end, BLOCK_VALUES)]
        for a, b in pieces:
            with reading(self._where):
                rows = _native(self._indices[a:b])
            if not kernels.count_rows(rows, counts):
                raise SourceError(
                    "a row index is outside the matrix", where=self._where, advice=MAKE_ANEW
                )
        indptr = np.zeros(self.shape[0] + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        starts = [a for a, _ in row_cuts(indptr, BLOCK_VALUES, BLOCK_ROWS)]
        bounds = np.array([*starts, self.shape[0]], np.int64)
        bucket_of_row = np.repeat(np.arange(len(starts)), np.diff(bounds)).astype(
            np.uint16 if len(starts) <= 1 << 16 else np.int32
        )
        at = indptr[bounds[:-1]].copy()
        triplets = self._triplets()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((folder / name).open("wb")) for name, _ in triplets]
            for a, b in pieces:
                with reading(self._where):
                    rows, values = _native(self._indices[a:b]), self._data[a:b]
                columns = columns_of(a, b)
                buckets = bucket_of_row[rows]
                order = np.argsort(buckets, kind="stable")
                ends = np.cumsum(np.bincount(buckets, minlength=len(starts)))
                for k in np.unique(buckets).tolist():
                    mine = order[ends[k - 1] if k else 0 : ends[k]]
                    parts = (rows[mine] - bounds[k], columns[mine], values[mine])
                    for file, (_, dtype), part in zip(files, triplets, parts, strict=True):
                        file.seek(int(at[k]) * dtype.itemsize)
                        file.write(np.ascontiguousarray(part, dtype).data)
                    at[k] += len(mine)
        np.save(folder / "indptr.npy", indptr)
        np.save(folder / "bounds.npy", bounds)

    def _triplets(self) -> tuple[tuple[str, np.dtype[Any]], ...]:
        """The files of the buckets: rows within the bucket, columns, values."""
        index = np.dtype(np.int32)
        values = kernel_dtype(self._data.dtype)
        return (("rows.bin", index), ("columns.bin", index), ("values.bin", values))


class Triplets(Csc):
    """Values in any order, each with its row and column, which must be inside the matrix."""

    def __init__(
        self, rows: Any, columns: Any, data: Any, shape: tuple[int, int], where: str, scratch: Path
    ):
        self.shape, self._where = shape, where
        self._indices, self._column_of, self._data = rows, columns, data
        self.n_values = int(data.shape[0])
        self._scratch = Once(scratch)

    def _columns(self) -> tuple[int, int, Callable[[int, int], NDArray[Any]]]:
        return 0, self.n_values, lambda a, b: np.asarray(self._column_of[a:b])


def _native(indices: NDArray[Any]) -> NDArray[Any]:
    """In this machine's byte order, which compiled loops want."""
    return np.ascontiguousarray(indices, indices.dtype.newbyteorder("="))


def _check_parts(indptr: Any, indices: Any, data: Any, n: int, where: str) -> None:
    _check_dtype(data, where)
    if len(indptr.shape) != 1 or indptr.shape[0] != n + 1 or indices.shape != data.shape:
        raise SourceError(
            "the parts of the sparse matrix do not fit together", where=where, advice=MAKE_ANEW
        )

    for name, part in (("indptr", indptr), ("indices", indices)):
        if part.dtype.kind not in "iu":
            raise SourceError(
                f"{name} of dtype {part.dtype} are not whole numbers", where=where, advice=MAKE_ANEW
            )


def _check_dtype(data: Any, where: str) -> None:
    if data.dtype.kind not in "biuf":
        raise SourceError(
            f"values of dtype {data.dtype} are not numbers",
            where=where,
            advice="choose another matrix with --layer or --raw",
        )


def _check_indptr(indptr: NDArray[np.int64], n_values: int, where: str) -> None:
    if len(indptr) and (indptr[0] < 0 or indptr[-1] > n_values or (np.diff(indptr) < 0).any()):
        raise SourceError("the row pointers do not ascend", where=where, advice=MAKE_ANEW)


def _check_ends(first: int | None, last: int | None, n_values: int, where: str) -> None:
    """Values before the first row or after the last one would be left out without a word."""
    if first or (last is not None and last != n_values):
        raise SourceError(
            f"the row pointers do not span the matrix's {n_values:,} values",
            where=where,
            advice=MAKE_ANEW,
        )


def _checked_columns(indices: NDArray[Any], n_columns: int, where: str) -> NDArray[np.int32]:
    columns = np.ascontiguousarray(indices, np.int32)
    wide = indices.dtype.itemsize >= 4 and indices.dtype != np.int32
    if (wide and not np.array_equal(columns, indices)) or not kernels.columns_fit(
        columns, n_columns
    ):
        raise SourceError("a column index is outside the matrix", where=where, advice=MAKE_ANEW)
    return columns


def row_cuts(
    indptr: NDArray[np.int64], max_values: int, max_rows: int = 1 << 62
) -> Iterator[tuple[int, int]]:
    """Cut rows into runs (first, end) of at most so many values and rows, at least one row each."""
    n, a = len(indptr) - 1, 0
    while a < n:
        b = int(np.searchsorted(indptr, indptr[a] + max_values, side="right")) - 1
        b = min(max(b, a + 1), n, a + max_rows)
        yield a, b
        a = b


def spread(n: int, size: int, places: int = _SAMPLES) -> list[tuple[int, int]]:
    """About `size` of n things, as up to so many slices from the first to the last."""
    if n <= size:
        return [(0, n)]
    piece = max(1, size // places)
    starts = np.linspace(0, n - piece, min(places, size)).astype(int)
    return [(int(a), int(a) + piece) for a in starts]


def _sample(data: Any, n_values: int, where: str) -> NDArray[Any]:
    with reading(where):
        return np.concatenate([data[a:b] for a, b in spread(int(data.shape[0]), n_values)])

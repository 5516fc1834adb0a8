"""Matrices on disk, read by rows in bounded memory: CSR, dense, and CSC by an external transposition.

They see arrays only through slices, `.shape`, `.dtype` and `.chunks`, as h5py and zarr offer them. What
is wrong with a matrix is a ValueError here; the source says where, see sources.rows.reading.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.files import Once
from scshards.cells.tokenizer import dense_to_csr
from scshards.kernels import rows as kernels
from scshards.sources.rows import (
    BLOCK_ROWS,
    BLOCK_VALUES,
    Block,
    Matrix,
    guarded,
    kernel_dtype,
    reading,
    spread,
)

SLAB_VALUES = 1 << 24
"""Most values of a dense matrix that are read at once, so that a row of its chunks is read whole."""


class Csr(Matrix):
    """Compressed rows: as many reads as blocks."""

    def __init__(self, indptr: Any, indices: Any, data: Any, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._indptr, self._indices, self._data = indptr, indices, data
        _check_parts(indptr, indices, data, shape[0])
        self.n_values = int(data.shape[0])

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        for first in range(start, stop, max_rows):
            window = self._indptr[first : min(first + max_rows, stop) + 1].astype(np.int64)
            is_last = first + len(window) - 1 == self.shape[0]
            _check_pointers(window, self.n_values, first == 0, is_last)
            for a, b in row_cuts(window, max_values):
                indptr = window[a : b + 1]
                indices = self._indices[indptr[0] : indptr[-1]]
                data = self._data[indptr[0] : indptr[-1]]
                columns = _checked_columns(indices, self.shape[1])
                yield Block(first + a, indptr, columns, data)

    def sample(self, n_values: int) -> NDArray[Any]:
        return _sample(self._data, n_values)


class Dense(Matrix):
    """A plain two-dimensional array, read in slabs of whole chunks where they fit in memory."""

    def __init__(self, data: Any) -> None:
        if len(data.shape) != 2:
            raise ValueError(f"the matrix has {len(data.shape)} dimensions, not 2")
        check_dtype(data)
        self.shape: tuple[int, int] = (int(data.shape[0]), int(data.shape[1]))
        self.n_values = self.shape[0] * self.shape[1]
        self._data = data

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        columns = max(self.shape[1], 1)
        rows = max(1, min(max_rows, max_values // columns))
        chunk = self._data.chunks[0] if self._data.chunks else 1
        slab = max(1, min(-(-rows // chunk) * chunk, SLAB_VALUES // columns))
        at = start
        while at < stop:
            # Slabs end where chunks do, so that only the first and last chunk are read twice.
            end = min(at + slab - at % chunk if slab % chunk == 0 else at + slab, stop)
            values = self._data[at:end]
            for a in range(0, end - at, rows):
                yield Block(at + a, *dense_to_csr(values[a : a + rows]))
            at = end

    def sample(self, n_values: int) -> NDArray[Any]:
        rows = max(1, n_values // max(self.shape[1], 1))
        parts = [self._data[:0]]
        parts += [self._data[a:b] for a, b in spread(self.shape[0], rows)]
        return np.concatenate(parts).reshape(-1)


class Written(Matrix):
    """A matrix that is written out by rows once, by whoever asks first, and then read by rows."""

    needs_transposing = True

    def __init__(
        self, shape: tuple[int, int], n_values: int, where: str, scratch: Path | None
    ) -> None:
        # An error of the disk that is written to is another one than one of the input.
        self.shape, self.n_values, self._where = shape, n_values, where
        self._scratch = Once(scratch)

    @abc.abstractmethod
    def _write(self, folder: Path) -> None:
        """Write the rows; other processes see all of it or nothing."""

    def transpose(self) -> None:
        self._scratch.made(self._write)

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        yield from self._by_rows().blocks(start, stop, max_rows, max_values)

    def sample(self, n_values: int) -> NDArray[Any]:
        return self._by_rows().sample(n_values)

    def close(self) -> None:
        self._scratch.close()

    def _by_rows(self) -> Csr:
        folder = self._scratch.made(self._write)
        indptr = np.load(folder / _INDPTR, mmap_mode="r")
        columns, values = (_Stored(folder, name, int(indptr[-1])) for name in (_COLUMNS, _VALUES))
        return Csr(indptr, columns, values, self.shape)


class Csc(Written):
    """Compressed columns, written out by rows.

    Two passes read the columns in pieces of BLOCK_VALUES values: one counts the values of each row, one
    takes each value to its row; see _write_by_rows. In memory it takes 8 bytes for each row and column.
    """

    def __init__(
        self,
        indptr: Any,
        indices: Any,
        data: Any,
        shape: tuple[int, int],
        where: str,
        scratch: Path | None,
    ) -> None:
        super().__init__(shape, int(data.shape[0]), where, scratch)
        self._indptr, self._indices, self._data = indptr, indices, data
        _check_parts(indptr, indices, data, shape[1])

    def sample(self, n_values: int) -> NDArray[Any]:
        return _sample(self._data, n_values)

    def _write(self, folder: Path) -> None:
        counts = np.zeros(self.shape[0], np.int64)
        with reading(self._where):
            column_ptr = self._indptr[:].astype(np.int64)
            _check_pointers(column_ptr, self.n_values, True, True)
            for a, b in _pieces(self.n_values):
                if not kernels.count_rows(_native(self._indices[a:b]), counts):
                    raise ValueError("a row index is outside the matrix")
        np.save(folder / _DTYPE, np.zeros(0, kernel_dtype(self._data.dtype)))
        _write_by_rows(folder, guarded(self._triplets(column_ptr), self._where), counts)

    def _triplets(self, column_ptr: NDArray[Any]) -> Iterator[Triplets]:
        for a, b in _pieces(self.n_values):
            columns = np.repeat(np.arange(self.shape[1]), np.diff(np.clip(column_ptr, a, b)))
            yield _native(self._indices[a:b]), columns, self._data[a:b]


class Spooled(Written):
    """What is no array on disk, such as text: read once, and sorted by rows if it is in no order."""

    @abc.abstractmethod
    def _triplets(self) -> Iterator[Triplets]:
        """Some values at a time, in any order, all inside the matrix."""

    def _write(self, folder: Path) -> None:
        counts = np.zeros(self.shape[0], np.int64)
        in_order, last = True, 0
        dtype = np.dtype(np.float64)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((folder / n).open("wb")) for n in _TRIPLETS]
            for rows, columns, values in guarded(self._triplets(), self._where):
                in_order &= len(rows) == 0 or bool(rows[0] >= last and (np.diff(rows) >= 0).all())
                last = int(rows[-1]) if len(rows) else last
                counts += np.bincount(rows, minlength=len(counts))
                dtype = values.dtype
                for file, part in zip(files, (rows, columns, values), strict=True):
                    as_stored = part.dtype if part is values else np.int32
                    file.write(np.ascontiguousarray(part, as_stored).data)
        np.save(folder / _DTYPE, np.zeros(0, dtype))
        if in_order:
            (folder / _ROWS).unlink()
            np.save(folder / _INDPTR, np.append(0, np.cumsum(counts)))
            return
        n = int(counts.sum())
        spooled = [_Stored(folder, name, n) for name in _TRIPLETS]
        for one in spooled:
            one.path = one.path.rename(folder / f"spooled-{one.path.name}")
        _write_by_rows(folder, (tuple(p[a:b] for p in spooled) for a, b in _pieces(n)), counts)
        for one in spooled:
            one.path.unlink()


Triplets = tuple[NDArray[Any], ...]
"""(rows, columns, values) of some values."""

_TRIPLETS = (_ROWS, _COLUMNS, _VALUES) = ("rows.bin", "columns.bin", "values.bin")
_INDPTR, _DTYPE = "indptr.npy", "dtype.npy"
"""What is written: columns and values by rows, the row pointers, and the dtype of the values; rows while
it is sorted."""


def _write_by_rows(folder: Path, triplets: Iterator[Triplets], counts: NDArray[np.int64]) -> None:
    """Write values by rows, stably; `counts` says how many each row has.

    The rows are cut into buckets of at most BLOCK_VALUES values (a longer row is one of its own). Each
    value is appended to its bucket, which then fits in memory and is sorted there. On disk it takes
    4 + 4 bytes and the value itself for each value.
    """
    indptr = np.append(0, np.cumsum(counts))
    starts = [a for a, _ in row_cuts(indptr, BLOCK_VALUES, BLOCK_ROWS)]
    bounds = np.array([*starts, len(counts)], np.int64)
    bucket_of_row = np.repeat(np.arange(len(starts)), np.diff(bounds)).astype(
        np.uint16 if len(starts) <= 1 << 16 else np.int32
    )
    dtypes = [_dtype(folder, name) for name in _TRIPLETS]
    at = indptr[bounds[:-1]].copy()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / n).open("w+b", buffering=0)) for n in _TRIPLETS]
        for rows, columns, values in triplets:
            buckets = bucket_of_row[rows]
            order = np.argsort(buckets, kind="stable")
            ends = np.cumsum(np.bincount(buckets, minlength=len(starts)))
            for k in np.unique(buckets).tolist():
                mine = order[ends[k - 1] if k else 0 : ends[k]]
                parts = (rows[mine] - bounds[k], columns[mine], values[mine])
                for file, dtype, part in zip(files, dtypes, parts, strict=True):
                    file.seek(int(at[k]) * dtype.itemsize)
                    file.write(np.ascontiguousarray(part, dtype).data)
                at[k] += len(mine)
        for first, end in itertools.pairwise(bounds.tolist()):
            ptr = indptr[first : end + 1] - indptr[first]
            bucket = []
            for file, dtype in zip(files, dtypes, strict=True):
                file.seek(int(indptr[first]) * dtype.itemsize)
                bucket.append(np.fromfile(file, dtype, int(ptr[-1])))
            by_rows = [np.empty_like(part) for part in bucket[1:]]
            table = np.arange(end - first, dtype=np.int32)
            dealt = kernels.deal_to_rows(*bucket, 0, table, ptr[:-1].copy(), ptr[1:], *by_rows)
            assert dealt != kernels.TOO_MANY, "each row has as many values as were counted"
            for file, part in zip(files[1:], by_rows, strict=True):
                file.seek(int(indptr[first]) * part.itemsize)
                file.write(part.data)
    (folder / _ROWS).unlink()
    np.save(folder / _INDPTR, indptr)


def _dtype(folder: Path, name: str) -> np.dtype[Any]:
    return np.load(folder / _DTYPE).dtype if name == _VALUES else np.dtype(np.int32)


class _Stored:
    """The n numbers of a file, read where they are asked for: mapped, they would count as memory."""

    def __init__(self, folder: Path, name: str, n: int) -> None:
        self.path, self.dtype, self.shape = folder / name, _dtype(folder, name), (n,)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        a, b, _ = part.indices(self.shape[0])
        return np.fromfile(self.path, self.dtype, max(b - a, 0), offset=a * self.dtype.itemsize)


def _pieces(n: int) -> Iterator[tuple[int, int]]:
    yield from ((a, min(a + BLOCK_VALUES, n)) for a in range(0, n, BLOCK_VALUES))


def _native(indices: NDArray[Any]) -> NDArray[Any]:
    """In this machine's byte order, which compiled loops want."""
    return np.ascontiguousarray(indices, indices.dtype.newbyteorder("="))


def _check_parts(indptr: Any, indices: Any, data: Any, n: int) -> None:
    check_dtype(data)
    if len(indptr.shape) != 1 or indptr.shape[0] != n + 1 or indices.shape != data.shape:
        raise ValueError("the parts of the sparse matrix do not fit together")
    for name, part in (("indptr", indptr), ("indices", indices)):
        if part.dtype.kind not in "iu":
            raise ValueError(f"{name} of dtype {part.dtype} are not whole numbers")


def check_dtype(data: Any) -> None:
    """Raise a ValueError when what is in a matrix is not numbers."""
    if data.dtype.kind not in "biuf":
        what = f"values of dtype {data.dtype} are not numbers"
        raise ValueError(f"{what}; --layer and --raw choose another matrix")


def _check_pointers(ptr: NDArray[np.int64], n_values: int, is_first: bool, is_last: bool) -> None:
    if len(ptr) and (ptr[0] < 0 or ptr[-1] > n_values or (np.diff(ptr) < 0).any()):
        raise ValueError("the row pointers do not ascend")
    # Values before the first row or after the last one would be left out without a word.
    if (is_first and ptr[0]) or (is_last and ptr[-1] != n_values):
        raise ValueError(f"the row pointers do not span the matrix's {n_values:,} values")


def _checked_columns(indices: NDArray[Any], n_columns: int) -> NDArray[np.int32]:
    columns = np.ascontiguousarray(indices, np.int32)
    wide = indices.dtype.itemsize >= 4 and indices.dtype != np.int32
    is_same = not wide or np.array_equal(columns, indices)
    if not is_same or (len(columns) and not 0 <= columns.min() <= columns.max() < n_columns):
        raise ValueError("a column index is outside the matrix")
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


def cut_block(block: Block, max_values: int, max_rows: int) -> Iterator[Block]:
    """The same rows in blocks of at most so many values and rows, at least one row each."""
    for a, b in row_cuts(block.indptr, max_values, max_rows):
        ptr = block.indptr[a : b + 1]
        values = slice(ptr[0] - block.indptr[0], ptr[-1] - block.indptr[0])
        yield Block(block.first_row + a, ptr, block.indices[values], block.data[values])


def _sample(data: Any, n_values: int) -> NDArray[Any]:
    return np.concatenate([data[a:b] for a, b in spread(int(data.shape[0]), n_values)])

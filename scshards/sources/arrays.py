"""Arrays beside the genes of an input: an element of obsm, or columns of the matrix of another type.

    Source.lay_beside(obsm, feature_arrays) -> {name: Beside}      then every Block has their rows, too

A Beside says what an array is, and reads its rows where these are not in the matrix. They are read front
to back, in slabs, as the blocks of genes come.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from scshards.shards.arrays import Rows, SparseRows
from scshards.shards.manifest import DENSE_DTYPES, MAX_WIDTH

if TYPE_CHECKING:
    from scshards.sources.matrix import Csr

SLAB_VALUES = 1 << 18
"""About so many values of a dense array are read at once, or a row of its chunks."""

_WIDER = {"bool": "uint8", "uint16": "int32", "uint32": "int64"}
"""What is stored in place of a dtype that few libraries know."""


class Beside(abc.ABC):
    """One array of an input.

    Attributes
    ----------
    kind, width, columns, source
        As of an ArrayInfo.
    dtype
        Of what is stored; "" where the kind of the genes' values decides.
    n_rows
        Cells.
    """

    kind: Literal["dense", "sparse"]
    source: Literal["obsm", "feature_type"] = "obsm"

    def __init__(
        self, dtype: str, shape: tuple[int, int], columns: Sequence[str] | None = None
    ) -> None:
        self.n_rows, width = shape
        if not 1 <= width <= MAX_WIDTH:
            raise ValueError(f"it has {width:,} columns: from 1 to {MAX_WIDTH:,} can be stored")
        self.dtype, self.width = dtype, width
        self.columns = None if columns is None else tuple(columns)

    @abc.abstractmethod
    def rows(self, start: int, stop: int) -> Rows:
        """The rows start:stop."""


class DenseBeside(Beside):
    """A dense array, `data` [cells, width], that h5py or zarr reads slices of."""

    kind = "dense"

    def __init__(self, data: Any, columns: Sequence[str] | None = None) -> None:
        if len(data.shape) != 2:
            raise ValueError(f"it has {len(data.shape)} dimensions, not 2")
        super().__init__(
            stored_dtype(data.dtype), (int(data.shape[0]), int(data.shape[1])), columns
        )
        self._data, self._first, self._slab = data, 0, np.empty((0, self.width), self.dtype)
        chunk = data.chunks[0] if data.chunks else 1
        self._step = -(-max(1, SLAB_VALUES // self.width) // chunk) * chunk

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """See Beside."""
        parts: list[NDArray[Any]] = []
        at = start
        while at < stop or not parts:
            if not self._first <= at < self._first + len(self._slab) and at < stop:
                self._first = at // self._step * self._step
                self._slab = np.asarray(self._data[self._first : self._first + self._step])
            a = at - self._first
            parts.append(self._slab[a : a + stop - at])
            at += len(parts[-1])
            if at < stop and not len(parts[-1]):
                raise ValueError("it has fewer rows than there are cells")
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found.astype(self.dtype, copy=False)


class SparseBeside(Beside):
    """A CSR array."""

    kind = "sparse"

    def __init__(self, matrix: Csr, dtype: np.dtype[Any]) -> None:
        super().__init__(sparse_dtype(dtype), matrix.shape)
        self._matrix = matrix

    def rows(self, start: int, stop: int) -> SparseRows:
        """See Beside."""
        found = list(self._matrix.blocks(start, stop, max(stop - start, 1), 1 << 62))
        if not found:
            return sorted_rows(
                np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0), self.width
            )
        (block,) = found
        return sorted_rows(block.indptr, block.indices, block.data, self.width)


class TypedColumns(Beside):
    """Columns of the matrix that are features of one type; their rows come with those of the genes.

    Attributes
    ----------
    place
        int32 [columns of the file]: the column here of each, or -1.
    """

    kind, source = "sparse", "feature_type"

    def __init__(
        self, taken: NDArray[np.intp], shape: tuple[int, int], names: Sequence[str]
    ) -> None:
        n_rows, n_features = shape
        super().__init__("", (n_rows, len(taken)), names)
        self.place = np.full(n_features, -1, np.int32)
        self.place[taken] = np.arange(len(taken))

    def rows(self, start: int, stop: int) -> SparseRows:
        raise AssertionError("they are in the matrix")

    def of_block(
        self, indptr: NDArray[np.int64], indices: NDArray[np.int32], data: NDArray[Any]
    ) -> SparseRows:
        """Of rows of the whole matrix."""
        columns = self.place[indices]
        is_here = columns >= 0
        ends = np.append(0, np.cumsum(is_here))[indptr - indptr[0]]
        return sorted_rows(ends, columns[is_here], data[is_here], self.width)


class Columns:
    """One-dimensional arrays side by side, as one [cells, columns] that slices are read of."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        lengths = {int(a.shape[0]) for a in arrays}
        if not lengths:
            raise ValueError("it has no columns")
        if len(lengths) != 1 or any(len(a.shape) != 1 for a in arrays):
            raise ValueError("its columns are not all of the same length")
        self._arrays = arrays
        self.shape = (lengths.pop(), len(arrays))
        self.dtype = np.result_type(*(a.dtype for a in arrays))
        self.chunks = arrays[0].chunks

    def __getitem__(self, part: slice) -> NDArray[Any]:
        return np.column_stack([np.asarray(a[part]).astype(self.dtype) for a in self._arrays])


def stored_dtype(dtype: np.dtype[Any]) -> str:
    """The dtype of a dense array by its name, as shards have it."""
    native = np.dtype(dtype).newbyteorder("=").name
    name = _WIDER.get(native, native)
    if name not in DENSE_DTYPES:
        raise ValueError(f"{native} is no type of numbers that can be stored: make it float32")
    return name


def sparse_dtype(dtype: np.dtype[Any]) -> str:
    """The dtype of a sparse array: whole numbers as counts, others in float32."""
    if dtype.kind not in "iuf":
        raise ValueError(f"{dtype} is no type of numbers that can be stored: make it float32")
    return "float32" if dtype.kind == "f" else "int32"


def sorted_rows(
    indptr: NDArray[np.int64], columns: NDArray[np.int32], data: NDArray[Any], width: int
) -> SparseRows:
    """Rows whose columns ascend; values of one column of a row are added up, zeros left out."""
    n = len(indptr) - 1
    sizes = np.diff(indptr)
    at = np.repeat(np.arange(n, dtype=np.int64), sizes) * width + columns
    if len(at) > 1 and not (at[1:] > at[:-1]).all():
        at, inverse = np.unique(at, return_inverse=True)
        summed = np.zeros(len(at), np.float64 if data.dtype.kind == "f" else np.int64)
        np.add.at(summed, inverse, data)
        data = summed
    is_value = data != 0
    at, data = at[is_value], data[is_value]
    counts = np.bincount(at // width, minlength=n) if n else np.zeros(0, np.int64)
    return SparseRows(
        np.append(0, np.cumsum(counts)).astype(np.int64), (at % width).astype(np.int32), data
    )

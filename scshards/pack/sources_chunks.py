"""One-dimensional HDF5 arrays, read with less of HDF5's own machinery in between.

    direct(dataset)     the dataset itself, or an object with the same slices that reads faster

HDF5 inflates with zlib and holds Python's lock meanwhile. Here chunks with gzip are inflated by ISA-L,
in half the time, and arrays in one piece are read by the operating system straight into their place;
both let other threads run. Called by pack.sources_h5ad and sources_10x.
"""

from __future__ import annotations

import os
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5t, h5z
from isal import isal_zlib
from numpy.typing import NDArray

from scshards.pack import kernels

_GZIP, _SHUFFLE = h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE

_IsalError: Any = isal_zlib.error  # a class; its type stub says that it is an instance


def direct(dataset: Any) -> Any:
    """The dataset, or what reads the same values faster; which one, what the dataset is decides.

    Faster are numbers in chunks with gzip, with the shuffle filter before it or not; and those of a
    local file in one piece.
    """
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or not dataset.shape[0]:
        return dataset
    # Equal types: no odd precision and no enum, so that the bytes are numpy's own.
    if dataset.dtype.kind not in "iuf" or not dataset.id.get_type().equal(
        h5t.py_create(dataset.dtype)
    ):
        return dataset
    properties = dataset.id.get_create_plist()
    if properties.get_layout() == h5d.CHUNKED:
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        n_chunks = -(-dataset.shape[0] // dataset.chunks[0])
        # Only HDF5 knows what stands for a chunk that was never written.
        if filters in ([_GZIP], [_SHUFFLE, _GZIP]) and dataset.id.get_num_chunks() == n_chunks:
            return _Gzip(dataset, shuffled=len(filters) == 2)
        return dataset
    is_local = dataset.file.driver == "sec2" and not dataset.external
    is_whole = properties.get_layout() == h5d.CONTIGUOUS and dataset.id.get_offset() is not None
    return _OnePiece(dataset) if is_local and is_whole else dataset


class _Array:
    """The face of a dataset that pack.sources_matrix knows."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.shape, self.dtype, self.chunks = dataset.shape, dataset.dtype, dataset.chunks
        self._dataset = dataset  # keeps its file open

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, step = part.indices(self.shape[0])
        assert step == 1
        out = np.empty(max(stop - start, 0), self.dtype)
        if len(out):
            self._read(start, out)
        return out

    def _read(self, start: int, out: NDArray[Any]) -> None:
        raise NotImplementedError


class _OnePiece(_Array):
    """An array that is stored in one piece."""

    def _read(self, start: int, out: NDArray[Any]) -> None:
        file = self._dataset.file.id.get_vfd_handle()
        at = self._dataset.id.get_offset() + start * self.dtype.itemsize
        left = out.view(np.uint8).data
        while len(left):
            n = os.preadv(file, [left], at)
            if n == 0:
                raise OSError("the file ends within an array")
            at, left = at + n, left[n:]


class _Gzip(_Array):
    """An array in chunks with gzip. The last chunk read is kept: blocks of rows end within chunks."""

    def __init__(self, dataset: h5py.Dataset, *, shuffled: bool) -> None:
        super().__init__(dataset)
        self._shuffled = shuffled
        self._kept: tuple[int, NDArray[Any]] = (-1, np.empty(0, self.dtype))

    def _read(self, start: int, out: NDArray[Any]) -> None:
        size, stop = self.chunks[0], start + len(out)
        for k in range(start // size, -(-stop // size)):
            a, b = max(start, k * size), min(stop, (k + 1) * size)
            if self._kept[0] != k:
                self._kept = (k, self._chunk(k))
            out[a - start : b - start] = self._kept[1][a - k * size : b - k * size]

    def _chunk(self, k: int) -> NDArray[Any]:
        size = self.chunks[0]
        first, end = k * size, min((k + 1) * size, self.shape[0])
        mask, stored = self._dataset.id.read_direct_chunk((first,))
        if mask or end - first < size:
            # A mask names filters that this chunk went without. The cut end of an array may do so, too.
            values: NDArray[Any] = self._dataset[first:end]
            return values
        n_bytes = size * self.dtype.itemsize
        try:
            raw = isal_zlib.decompress(stored, bufsize=n_bytes)
        except _IsalError as e:
            raise OSError(f"chunk {k} can't be inflated: {e}") from None
        if len(raw) != n_bytes:
            raise OSError(f"chunk {k} has {len(raw)} bytes, not {n_bytes}")
        if not self._shuffled:
            return np.frombuffer(raw, self.dtype)
        out = np.empty(size, self.dtype)
        kernels.unshuffle(np.frombuffer(raw, np.uint8), out.view(f"u{self.dtype.itemsize}"))
        return out

"""HDF5 files, local or behind any fsspec URL: what h5ad and 10x files have in common.

One-dimensional HDF5 arrays, read with less of HDF5's own machinery in between.

    direct(dataset)     the dataset itself, or an object with the same slices that reads faster

HDF5 inflates with zlib, copies chunks on their way, and holds Python's lock meanwhile. Here chunks with
gzip are inflated by ISA-L, in half the time, and arrays as they are read by the operating system
straight into their place; both let other threads run.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import os
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5t, h5z
from isal import isal_zlib
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, SourceError
from scshards.base.storage import Storage
from scshards.base.text import text_of
from scshards.sources.rows import attribute, said


def open_hdf5(storage: Storage, name: str, stack: contextlib.ExitStack) -> h5py.File:
    """Open a file for reading; closing `stack` closes it.

    Raises
    ------
    SourceError
        When it is not HDF5, or not all of it.
    StorageError
        When it can't be read at all.
    """
    stream = stack.enter_context(storage.open())
    # A path is read faster than a Python file. No lock: nobody writes through here, and network
    # file systems often can't lock.
    target = storage.local_path or stream
    try:
        return stack.enter_context(h5py.File(target, "r", locking=False))
    except ScshardsError:
        raise
    except (OSError, RuntimeError, ValueError) as e:
        raise SourceError(
            f"this is not a readable h5ad (HDF5) file: {said(e)}",
            where=name,
            advice="check that it is an h5ad file, no archive, and was copied or downloaded completely",
        ) from None


def check_filters(node: Any, where: str) -> None:
    """Refuse a dataset, or a group with one, whose compression HDF5 lacks; hdf5plugin has most of them.

    It is loaded when it is needed and installed. What is no HDF5 passes.
    """
    if isinstance(node, h5py.Group):
        for name, child in node.items():
            check_filters(child, f"{where}/{name}")
    if not isinstance(node, h5py.Dataset):
        return
    properties = node.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, stored_name = properties.get_filter(i)
        if h5z.filter_avail(code):
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module("hdf5plugin")
        if not h5z.filter_avail(code):
            name = stored_name.decode(errors="replace") or "of no known name"
            raise SourceError(
                f"it is compressed by the HDF5 filter {code} ({name}), which is not installed",
                where=where,
                advice="pip install hdf5plugin; or, for a filter that it does not have, install its "
                "plugin, and name the folder in HDF5_PLUGIN_PATH",
            )


def plain_values(node: Any) -> NDArray[Any] | None:
    """A column of text or numbers as anndata reads it, but without anndata, which takes half a second
    to load; None for all other nodes."""
    if not isinstance(node, h5py.Dataset) or node.ndim != 1:
        return None
    kind = attribute(node, "encoding-type")
    if kind == "string-array" and h5py.check_string_dtype(node.dtype) is not None:
        values = np.empty(len(node), object)
        raw = node[:].tolist()
        # All at once is several times as fast; only texts of a fixed size may hold a zero byte.
        texts = b"\0".join(raw).decode().split("\0")
        values[:] = texts if len(texts) == len(raw) else [v.decode() for v in raw]
        return values
    return node[:] if kind == "array" and node.dtype.kind in "biuf" else None


def text(values: Any) -> list[str]:
    """Names as text, by the rule of base.text; "" where one is missing."""
    names = np.asarray(values, object).tolist()
    if set(map(type, names)) <= {str}:  # nearly always, and sooner than loading pandas
        return names
    import pandas as pd

    missing = pd.isna(np.asarray(values, object))
    return ["" if gone else text_of(v) for v, gone in zip(names, missing.tolist(), strict=True)]


_GZIP, _SHUFFLE = h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE

MAX_CHUNKS = 1 << 17
"""Of an array as it is: where each lies is looked up when it is opened, in a tenth of a second."""

_IsalError: Any = isal_zlib.error  # a class; its type stub says that it is an instance


def direct(dataset: Any, *, whole: bool = False) -> Any:
    """The dataset, or what reads the same values faster; which one, what the dataset is decides.

    `whole` is for zarr: a chunk that is not there is known to HDF5.

    Faster are numbers in chunks with gzip, with the shuffle filter before it or not; and numbers as they
    are, in one piece or in chunks, of a local file.
    """
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or not dataset.shape[0]:
        return dataset
    # Equal types: no odd precision and no enum, so that the bytes are numpy's own.
    if dataset.dtype.kind not in "iuf" or not dataset.id.get_type().equal(
        h5t.py_create(dataset.dtype)
    ):
        return dataset
    properties = dataset.id.get_create_plist()
    is_local = dataset.file.driver == "sec2" and not dataset.external
    if properties.get_layout() == h5d.CONTIGUOUS and dataset.id.get_offset() is not None:
        place = np.array([dataset.id.get_offset()])
        return _Pieces(dataset, place, int(dataset.shape[0])) if is_local else dataset
    if properties.get_layout() != h5d.CHUNKED:
        return dataset
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    n_chunks = -(-dataset.shape[0] // dataset.chunks[0])
    if dataset.id.get_num_chunks() < n_chunks:
        return dataset  # only HDF5 knows what stands for a chunk that was never written
    if filters in ([_GZIP], [_SHUFFLE, _GZIP]):
        return _Gzip(dataset, shuffled=len(filters) == 2)
    if not filters and is_local and n_chunks <= MAX_CHUNKS and hasattr(dataset.id, "chunk_iter"):
        return _Pieces(dataset, *_plain_chunks(dataset))
    return dataset


class _Array(abc.ABC):
    """The face of a dataset that sources.matrix knows."""

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

    @abc.abstractmethod
    def _read(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out`, which is not empty, with the values from `start` on."""


class _Pieces(_Array):
    """An array that is stored as it is: pieces of the file, all but the last of `size` values."""

    def __init__(self, dataset: h5py.Dataset, places: NDArray[np.int64], size: int) -> None:
        super().__init__(dataset)
        self._places, self._size = places, size

    def _read(self, start: int, out: NDArray[Any]) -> None:
        file, item = self._dataset.file.id.get_vfd_handle(), self.dtype.itemsize
        stop = start + len(out)
        first, last = start // self._size, (stop - 1) // self._size
        places = self._places[first : last + 1]
        # Pieces that lie one after another, as they nearly always do, are read together.
        gaps = np.flatnonzero(np.diff(places) != self._size * item) + 1
        left = out.view(np.uint8).data
        for a, b in zip([0, *gaps.tolist()], [*gaps.tolist(), len(places)], strict=True):
            low = max(start, (first + a) * self._size)
            high = min(stop, (first + b) * self._size)
            at = int(places[a]) + (low - (first + a) * self._size) * item
            _read_bytes(file, at, left[: (high - low) * item])
            left = left[(high - low) * item :]


def _plain_chunks(dataset: h5py.Dataset) -> tuple[NDArray[np.int64], int]:
    """Where the chunks of a dataset are in its file, and how many values each has."""
    size = int(dataset.chunks[0])
    places = np.empty(-(-dataset.shape[0] // size), np.int64)

    def note(chunk: Any) -> None:
        places[chunk.chunk_offset[0] // size] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    return places, size


def _read_bytes(file: int, at: int, left: memoryview) -> None:
    """Fill `left` with the bytes of an open file from `at` on."""
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
        # What HDF5's shuffle filter did: first the first bytes of all words, then the second ones, ...
        for k, plane in enumerate(np.frombuffer(raw, np.uint8).reshape(-1, size)):
            out.view(np.uint8).reshape(size, -1)[:, k] = plane
        return out

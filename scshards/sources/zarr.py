"""zarr stores: AnnData in zarr 2 or 3, a folder, local or behind any fsspec URL.

In zarr a chunk that is not there stands for zeros, and writers leave chunks of zeros out. A dense matrix
that lost a chunk can't be told from one that never had it. In a sparse matrix a chunk of zeros has no
place, so one that is missing there was lost, and is an error. Called by sources.open.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from scshards.base.errors import ScshardsError, SourceError
from scshards.base.storage import Storage, is_web
from scshards.sources.rows import DAMAGED, ZARR_MARKS, said

_METADATA = (*ZARR_MARKS, ".zarray", ".zattrs", ".zmetadata")


def open_zarr(storage: Storage, name: str) -> zarr.Group:
    """The root group of a store.

    Raises
    ------
    SourceError
        When it is no store of groups, or its metadata are damaged.
    StorageError
        When it can't be read at all.
    """
    try:
        return zarr.open_group(_ReadStore(storage, name), mode="r")
    except ScshardsError:
        raise
    except Exception as e:
        # zarr's errors, json's and numcodecs' have nothing in common.
        raise SourceError(
            f"this is not a readable zarr store: {said(e)}",
            where=name,
            advice="it must be a zarr group that anndata wrote, with its zarr.json or .zgroup",
        ) from None


def direct(array: zarr.Array[Any], *, whole: bool = False) -> _Array:
    """The array as sources.matrix reads it; `whole` is whether a chunk that is not there was lost."""
    if whole:
        cast(_ReadStore, array.store).required.add(array.path)
    return _Vector(array) if array.ndim == 1 else _Array(array)


class _ReadStore(Store):
    """zarr's view of the files; `required` are the paths of arrays that must have all their chunks."""

    supports_writes = supports_deletes = supports_partial_writes = False
    supports_listing = True

    def __init__(self, files: Storage, name: str):
        super().__init__(read_only=True)
        self._files, self._name = files, name
        self.required: set[str] = set()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = Store.__hash__

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[Any]) -> list[Any]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._files.read_if_there, key, 0, 1) is not None

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        if not is_web(self._files.url):
            # What a web server lists is a page for people.
            for names in await asyncio.to_thread(self._files.folder, prefix.strip("/")):
                for name in names:
                    yield name

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise AssertionError("who reads lists one folder at a time")

    def list(self) -> AsyncIterator[str]:
        return self.list_prefix("")

    async def set(self, key: str, value: Any) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def set_partial_values(self, key_start_values: Iterable[Any]) -> None:
        self._check_writable()  # zarr before 3.1 has this method in its contract

    def _read(self, key: str, byte_range: Any) -> bytes | None:
        start, end = 0, None
        if isinstance(byte_range, RangeByteRequest):
            start, end = byte_range.start, byte_range.end
        elif isinstance(byte_range, OffsetByteRequest):
            start = byte_range.offset
        elif isinstance(byte_range, SuffixByteRequest):
            is_there = self._files.read_if_there(key, 0, 1) is not None
            start = max(0, self._files.size(key) - byte_range.suffix) if is_there else 0
        data = self._files.read_if_there(key, start, end)
        is_chunk = key.rpartition("/")[2] not in _METADATA
        if data is None and is_chunk and any(key.startswith(f"{p}/") for p in self.required):
            raise SourceError(
                f"a chunk of the matrix is missing: {key}", where=self._name, advice=DAMAGED
            )
        if data == b"" and is_chunk:
            # Zarr takes a shard of chunks that is read whole and is empty for one of zeros.
            raise OSError(f"{key} is empty")
        return data


class _Array:
    """A zarr array as sources.matrix reads it; whatever a damaged chunk raises becomes an OSError."""

    def __init__(self, array: zarr.Array[Any]):
        self._array = array
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, array.chunks

    def __getitem__(self, part: slice) -> NDArray[Any]:
        try:
            return np.asarray(self._array[part])
        except ScshardsError:
            raise
        except Exception as e:
            # Each codec has errors of its own.
            raise OSError(f"{self._array.path}: {said(e)}") from e


class _Vector(_Array):
    """A one-dimensional array that is read in whole chunks, each once from front to back.

    zarr decodes a chunk anew for each part that is read of it. The chunk that the last read ended in is
    kept: the next read begins there.
    """

    def __init__(self, array: zarr.Array[Any]):
        super().__init__(array)
        self._kept_from, self._kept = 0, np.empty(0, self.dtype)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        n, chunk = self.shape[0], self.chunks[0]
        start, stop, _ = part.indices(n)
        at = start - self._kept_from
        head = self._kept[at : max(stop - self._kept_from, at)] if at >= 0 else self._kept[:0]
        first = start + len(head)
        if first >= stop:
            return head
        # Whole chunks: to the end of the last one, which is kept.
        tail = super().__getitem__(slice(first, min(-(-stop // chunk) * chunk, n)))
        last = max(first, (stop - 1) // chunk * chunk)
        self._kept_from, self._kept = last, tail[last - first :].copy()
        return np.concatenate([head, tail[: stop - first]]) if len(head) else tail[: stop - first]

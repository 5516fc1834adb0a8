"""zarr stores: AnnData in zarr 2 or 3, as a folder or a .zip, local or behind any fsspec URL.

In zarr a chunk that is not there stands for zeros, and writers leave chunks of zeros out. A dense matrix
that lost a chunk can't be told from one that never had it. In a sparse matrix a chunk of zeros has no
place, so one that is missing there was lost, and is an error. Called by sources.open.
"""

from __future__ import annotations

import asyncio
import contextlib
import zipfile
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from scshards.base.errors import ScshardsError, SourceError
from scshards.base.storage import Storage, is_web
from scshards.sources.anndata import AnnDataSource
from scshards.sources.rows import DAMAGED, ZARR_MARKS, said

_METADATA = (*ZARR_MARKS, ".zarray", ".zattrs", ".zmetadata")


class ZarrStore(AnnDataSource):
    """One store; see sources.open.open_source for its arguments."""

    def _dense(self, node: Any) -> Any:
        return _Array(node)

    def _parts(self, node: Any, shape: tuple[int, int], by_rows: bool) -> tuple[Any, Any, Any]:
        indptr, indices, data = node["indptr"], node["indices"], node["data"]
        # Nothing but zeros is possible where there is one column to name, or no value at all.
        required = [data]
        required += [indices] if shape[1 if by_rows else 0] > 1 else []
        required += [indptr] if data.size else []
        for array in required:
            array.store.required.add(array.path)
        return _Vector(indptr), _Vector(indices), _Vector(data)

    def _listed(self, group: Any) -> Sequence[str]:
        known = group.metadata.consolidated_metadata is not None or group.store.supports_listing
        return sorted(group) if known else ()


def open_zarr(storage: Storage, name: str, stack: contextlib.ExitStack) -> zarr.Group:
    """The root group of a store; closing `stack` closes it.

    Raises
    ------
    SourceError
        When it is no store of groups, or its metadata are damaged.
    StorageError
        When it can't be read at all.
    """
    files: _Files = _Folder(storage)
    if storage.url.partition("?")[0].endswith(".zip"):
        files = _Zip(stack, storage, name)
    try:
        return zarr.open_group(_ReadStore(files, name), mode="r")
    except ScshardsError:
        raise
    except Exception as e:
        # zarr's errors, json's and numcodecs' have nothing in common.
        raise SourceError(
            f"this is not a readable zarr store: {said(e)}",
            where=name,
            advice="it must be a zarr group that anndata wrote, with its zarr.json or .zgroup",
        ) from None


class _Files(Protocol):
    """The files of a store."""

    can_list: bool

    def read(self, path: str, start: int, end: int | None) -> bytes | None:
        """The bytes start:end of a file, fewer when it ends early; None when it is not there."""

    def size(self, path: str) -> int:
        """Bytes of a file that is there."""

    def names(self, path: str) -> Iterable[str]:
        """What is right in a folder."""


class _Folder:
    def __init__(self, storage: Storage):
        self._storage = storage
        # What a web server lists is a page for people.
        self.can_list = not is_web(storage.url)

    def read(self, path: str, start: int, end: int | None) -> bytes | None:
        return self._storage.read_if_there(path, start, end)

    def size(self, path: str) -> int:
        return self._storage.size(path)

    def names(self, path: str) -> Iterable[str]:
        folders, files = self._storage.folder(path)
        return [*folders, *files]


class _Zip:
    can_list = True

    def __init__(self, stack: contextlib.ExitStack, storage: Storage, name: str):
        stream = stack.enter_context(storage.open())
        try:
            self._zip = stack.enter_context(zipfile.ZipFile(stream))
        except (zipfile.BadZipFile, RuntimeError, ValueError) as e:
            raise SourceError(
                f"this is not a readable .zip file: {e}", where=name, advice=DAMAGED
            ) from None
        self._paths = [path for path in self._zip.namelist() if not path.endswith("/")]
        # The folder that was zipped may be inside, or only what was in it.
        marks = [p for p in self._paths if p.rpartition("/")[2] in ZARR_MARKS]
        root = min(marks, key=lambda path: path.count("/"), default="")
        self._root = root[: root.rfind("/") + 1]

    def read(self, path: str, start: int, end: int | None) -> bytes | None:
        try:
            with self._zip.open(self._root + path) as f:
                f.seek(start)
                return f.read() if end is None else f.read(end - start)
        except KeyError:
            return None

    def size(self, path: str) -> int:
        return self._zip.getinfo(self._root + path).file_size

    def names(self, path: str) -> Iterable[str]:
        folder = f"{self._root}{path}/" if path else self._root
        inside = (p[len(folder) :] for p in self._paths if p.startswith(folder))
        return {p.partition("/")[0] for p in inside}


class _ReadStore(Store):
    """zarr's view of the files; `required` are the paths of arrays that must have all their chunks."""

    supports_writes = supports_deletes = supports_partial_writes = False

    def __init__(self, files: _Files, name: str):
        super().__init__(read_only=True)
        self._files, self._name = files, name
        self.required: set[str] = set()

    @property
    def supports_listing(self) -> bool:
        return self._files.can_list

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = Store.__hash__

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[Any]) -> list[Any]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._files.read, key, 0, 1) is not None

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in await asyncio.to_thread(self._files.names, prefix.strip("/")):
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
            is_there = self._files.read(key, 0, 1) is not None
            start = max(0, self._files.size(key) - byte_range.suffix) if is_there else 0
        data = self._files.read(key, start, end)
        if data is None and self._is_required(key):
            raise SourceError(
                f"a chunk of the matrix is missing: {key}", where=self._name, advice=DAMAGED
            )
        return data

    def _is_required(self, key: str) -> bool:
        if key.rpartition("/")[2] in _METADATA:
            return False
        return any(key.startswith(f"{path}/") for path in self.required)


class _Array:
    """A zarr array as sources.matrix reads it; whatever a damaged chunk raises becomes an OSError."""

    def __init__(self, array: zarr.Array):
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

    def __init__(self, array: zarr.Array):
        super().__init__(array)
        self._kept_from, self._kept = 0, np.empty(0, self.dtype)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        if len(self.shape) != 1:
            raise ValueError(f"{self._array.path} has {len(self.shape)} dimensions")
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

"""The parts of an AnnData file in HDF5 that is written block by block.

    disk = NewFile(path)
    file = h5py.File(disk, "w")
    data = Growing(file, "data", dtype, VALUES_CHUNK)
    data.add(values); ...; data.finish()
    file.close()
    disk.close()

The encodings are those of anndata's on-disk format (anndata docs, "On-disk format"). Called by
atlas.export_h5ad and atlas.h5ad_writer.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VALUES_CHUNK, CELLS_CHUNK, NAMES_CHUNK = 1 << 17, 1 << 14, 1 << 10
"""Entries of an HDF5 chunk of the matrix, of a column of obs, and of its index."""

LEVEL = 1
"""Of gzip."""

GROUPS = ("layers", "obsm", "obsp", "uns", "varm", "varp")
"""The members of an AnnData file that may be empty."""


class NewFile(io.RawIOBase):
    """A new file for h5py.File, whose writing fails in a way that can be reported.

    HDF5 can't close a file whose disk is full: it fails again and again, and may end the process. So it
    is told that all is well, nothing more is written, and `check` raises what happened.

    Parameters
    ----------
    path
        The file, which is replaced if it is there.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._error: OSError | None = None
        self._file = path.open("w+b", buffering=0)

    def check(self) -> None:
        """Raise the OSError that a write has met."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int | None:
        return self._file.readinto(buffer)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and self._error is None:
                left = left[self._file.write(left) :]
        except OSError as e:
            self._error = e
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            if self._error is None:
                self._file.truncate(size)
        except OSError as e:
            self._error = e
        return self.tell() if size is None else size


class Growing:
    """A dataset of one dimension that grows chunk by chunk.

    Chunks are shuffled and compressed here, by isal, and handed to HDF5 as they are: faster than its own
    gzip, and read by whatever reads that.
    """

    def __init__(
        self, group: Any, name: str, dtype: np.dtype[Any], chunk: int, *encoding: str
    ) -> None:
        self.n, self.dtype = 0, dtype
        self._rest, self._chunk = np.zeros(0, dtype), chunk
        self._dataset = group.create_dataset(
            name, (0,), dtype, maxshape=(None,), chunks=(chunk,),
            shuffle=True, compression="gzip", compression_opts=LEVEL,
        )  # fmt: skip
        if encoding:
            self._dataset.attrs["encoding-type"], self._dataset.attrs["encoding-version"] = encoding

    def add(self, values: NDArray[Any]) -> None:
        """Append values."""
        self.n += len(values)
        if len(self._rest) + len(values) < self._chunk:
            self._rest = np.concatenate([self._rest, values])
            return
        head = self._chunk - len(self._rest)
        self._write(np.concatenate([self._rest, values[:head]]))
        whole = head + (len(values) - head) // self._chunk * self._chunk
        for at in range(head, whole, self._chunk):
            self._write(values[at : at + self._chunk])
        self._rest = values[whole:].copy()

    def finish(self) -> None:
        """Write what does not fill a chunk."""
        if len(self._rest):
            padded = np.zeros(self._chunk, self.dtype)
            padded[: len(self._rest)] = self._rest
            self._write(padded)
        self._dataset.resize((self.n,))

    def _write(self, values: NDArray[Any]) -> None:
        from isal import isal_zlib

        at = self._dataset.shape[0]
        self._dataset.resize((at + self._chunk,))
        planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, self.dtype.itemsize).T
        packed = isal_zlib.compress(np.ascontiguousarray(planes).data, level=LEVEL)
        self._dataset.id.write_direct_chunk((at,), packed)


def new_group(parent: Any, name: str, kind: str, version: str) -> Any:
    """A group with its encoding."""
    group = parent.create_group(name)
    group.attrs.update({"encoding-type": kind, "encoding-version": version})
    return group


def new_index(frame: Any, columns: Sequence[str]) -> Any:
    """A growing dataset for the names of the rows of a frame."""
    import h5py

    name = "_index"
    while name in columns:
        name = f"_{name}"
    frame.attrs["_index"] = name
    dataset = frame.create_dataset(
        name, (0,), h5py.string_dtype(), maxshape=(None,), chunks=(NAMES_CHUNK,)
    )
    dataset.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return dataset


def write_order(frame: Any, columns: Sequence[str]) -> None:
    """The names of a frame's columns, in their order."""
    import h5py

    # An empty list has no type of its own.
    frame.attrs.create("column-order", list(columns), (len(columns),), h5py.string_dtype())


def write_texts(group: Any, name: str, texts: Sequence[str]) -> None:
    """A whole array of texts."""
    import h5py

    data = np.array(list(texts), object)
    dataset = group.create_dataset(name, (len(data),), h5py.string_dtype(), data=data)
    dataset.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})

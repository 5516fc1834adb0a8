"""One shard's tar: members one after another, cut into chunks with a checksum each.

    payloads --build_tar--> tar bytes --seal--> stored bytes + chunk table
    or, in parts: layout(sizes), then write_members for some of the payloads at a time

A chunk is a run of whole members of about CHUNK_BYTES: the unit that is read, checked and, in
`.tar.zst`, compressed (each chunk is one zstd frame, so a chunk can be read alone while the file as a
whole stays an ordinary `.tar.zst`).
"""

from __future__ import annotations

import itertools
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from scshards.base.errors import ChecksumError, FormatError
from scshards.cells.batch import format_key
from scshards.kernels import members as kernels
from scshards.shards import Compression
from scshards.shards.members import ARRAYS_EXTENSION, EXTENSION
from scshards.shards.mending import shard_again

CHUNK_BYTES = 1 << 20
"""A chunk begins with the first member at or after each multiple of this in the uncompressed tar."""

ZSTD_LEVEL = 3
MAX_SOURCES, MAX_ROWS = 10**6, 10**10
_END = 1024
_ZSTD_MOST = 1 << 15
"""A byte of a zstd frame stands for so many at most: a block of 128 KiB takes four."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """The chunk table of a shard: arrays of one entry a chunk.

    Attributes
    ----------
    cells
        int64: cells in each chunk.
    stored
        int64: its bytes in the file.
    raw
        int64: its bytes of uncompressed tar; equal to `stored` in a plain tar.
    sums
        uint64: XXH64 (seed 0) of its stored bytes.
    """

    cells: NDArray[np.int64]
    stored: NDArray[np.int64]
    raw: NDArray[np.int64]
    sums: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.cells)


def build_tar(
    payload: NDArray[np.uint8],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    sources: NDArray[np.integer],
    rows: NDArray[np.integer],
    arrays: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The tar of the members payload[starts[i]:starts[i] + sizes[i]], in this order.

    `arrays` are the starts and sizes of the members that hold the cells' arrays, where there are some.

    Returns
    -------
    The tar (uint8, with its two closing zero blocks) and where each cell's member begins (int64).
    """
    offsets, size = layout(sizes, None if arrays is None else arrays[1])
    out = np.empty(size, np.uint8)
    write_members(out, payload, starts, sizes, sources, rows, offsets)
    if arrays is not None:
        at = arrays_offsets(offsets, sizes)
        write_members(out, payload, *arrays, sources, rows, at, extension=ARRAYS_EXTENSION)
    return out, offsets


def layout(
    sizes: NDArray[np.int64], arrays: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], int]:
    """Where the data of cells' members of these sizes begins in their tar (int64), and the tar's size.

    `arrays` are the sizes of the members behind them that hold their arrays, where there are some.
    """
    padded = _padded(sizes)
    if arrays is not None:
        padded = padded + _padded(arrays)
    ends = np.cumsum(padded)
    return ends - padded + 512, int(ends[-1] if len(ends) else 0) + _END


def arrays_offsets(offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the data of the members begins that come behind cells' members at these places."""
    return offsets + _padded(sizes)


def _padded(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bytes that members take in a tar, each with its header."""
    return (np.asarray(sizes, np.int64) + 511) // 512 * 512 + 512


def write_members(
    tar: NDArray[np.uint8],
    payload: NDArray[np.uint8],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    sources: NDArray[np.integer],
    rows: NDArray[np.integer],
    offsets: NDArray[np.int64],
    extension: str = EXTENSION,
) -> None:
    """Write some of a tar's members where `layout` says that they are, in any order.

    The closing blocks are written every time.
    """
    kernels.write_members(
        kernels.read_only(payload),
        np.ascontiguousarray(starts, np.int64),
        np.ascontiguousarray(sizes, np.int64),
        _template(extension),
        np.ascontiguousarray(sources, np.int64),
        np.ascontiguousarray(rows, np.int64),
        tar,
        np.ascontiguousarray(offsets, np.int64),
    )
    tar[len(tar) - _END :] = 0


def seal(
    tar: NDArray[np.uint8], offsets: NDArray[np.int64], compression: Compression
) -> tuple[NDArray[np.uint8], Chunks]:
    """Cut a tar into chunks, compress them if asked, and sum them.

    Returns
    -------
    The bytes to store (uint8) and the chunk table.
    """
    cells, raw = cut(offsets, len(tar))
    bounds = np.append(0, np.cumsum(raw))
    if compression == "none":
        stored_bytes, stored = tar, raw
    else:
        import zstandard

        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)
        frames = [
            np.frombuffer(compressor.compress(tar[a:b].data), np.uint8)
            for a, b in itertools.pairwise(bounds.tolist())
        ]
        stored_bytes, stored = np.concatenate(frames), np.array([len(f) for f in frames])
    ends = np.cumsum(stored)
    sums = [
        xxh64_intdigest(stored_bytes[e - s : e].data) for s, e in zip(stored, ends, strict=True)
    ]
    table = Chunks(
        cells=cells.astype(np.int64),
        stored=stored.astype(np.int64),
        raw=raw.astype(np.int64),
        sums=np.array(sums, np.uint64),
    )
    return stored_bytes, table


def cut(offsets: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where a tar of `size` bytes is cut, whose members' data begin at `offsets`.

    Returns
    -------
    The cells and the bytes of each chunk (int64 [chunks]).
    """
    heads = np.append(offsets - 512, size)
    # The first member at or after each multiple of CHUNK_BYTES opens a chunk.
    first = np.unique(np.searchsorted(heads[:-1], np.arange(0, size, CHUNK_BYTES)))
    first = first[first < len(offsets)]
    if len(first) == 0:
        first = np.zeros(1, np.int64)
    bounds = np.append(heads[first], size)
    bounds[0] = 0
    return np.diff(np.append(first, len(offsets))), np.diff(bounds)


def open_chunk(
    stored: NDArray[np.uint8],
    raw_size: int,
    checksum: int,
    compression: Compression,
    where: str,
    root: str,
) -> NDArray[np.uint8]:
    """The uncompressed bytes of one chunk, after its checksum was found right.

    Parameters
    ----------
    stored, raw_size, checksum, compression
        Its bytes, and what the manifest says of them.
    where, root
        The chunk and its shard set, for messages.

    Raises
    ------
    ChecksumError
        When the bytes are not those that were packed.
    FormatError
        When a right checksum covers bytes that are not one zstd frame of `raw_size` bytes, and no more.
    """
    if xxh64_intdigest(stored.data) != checksum:
        raise ChecksumError(
            "the bytes of a chunk are not those that were packed",
            where=where,
            advice=shard_again(root),
        )
    if compression == "none":
        return stored
    import zstandard

    try:
        # The frame's own word for its size is what the decompressor allocates: check it first.
        size = zstandard.frame_content_size(stored.data)
        # One that says 0 is not even looked into by the decompressor.
        if size != raw_size or not 0 < size <= len(stored) * _ZSTD_MOST:
            raise FormatError(f"a chunk has {size} bytes instead of {raw_size}", where=where)
        raw = zstandard.ZstdDecompressor().decompress(stored.data, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise FormatError(f"a chunk can't be decompressed: {e}", where=where) from None
    return np.frombuffer(raw, np.uint8)


def _template(extension: str) -> NDArray[np.uint8]:
    """A ustar header with zeros for key, size and checksum; no time, no owner: the same everywhere."""
    info: Any = tarfile.TarInfo(f"{format_key(0, 0)}.{extension}")
    info.mode, info.mtime = 0o644, 0
    return np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8).copy()

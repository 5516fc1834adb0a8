"""Reading cells of a shard in order: the chunks that hold them, checked, and members decoded in blocks.

    index, places --read_chunks--> raw bytes of some chunks at a time --decode_block--> TokenRows

A few chunks are in memory at a time. Called by sources.shardset and exporting.cells; the stream,
which reads cells at random, has a reader of its own (stream.fetch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.base.storage import Storage
from scshards.cells.batch import format_key
from scshards.cells.tokenizer import TokenRows, ValueKind
from scshards.kernels import members as kernels
from scshards.shards import Compression
from scshards.shards.manifest import ShardInfo
from scshards.shards.members import check_status, decode_rows
from scshards.shards.tar import open_chunk

READ_BYTES = 1 << 22
"""About so many bytes of chunks are read at a time."""


def read_chunks(
    storage: Storage,
    shard: ShardInfo,
    compression: Compression,
    index: Mapping[str, NDArray[Any]],
    taken: NDArray[np.intp],
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.uint8], int]]:
    """The chunks that hold some cells, a few at a time.

    Parameters
    ----------
    storage, shard, compression
        The shard.
    index
        Its index, with `offset`, `size`, `source` and `row` at least.
    taken
        The places of the cells in the shard, ascending.

    Yields
    ------
    (places of the cells, the raw bytes of their chunks, where those begin in the uncompressed tar).
    Every chunk's checksum was found right, and every member lies in its chunk.

    Raises
    ------
    ChecksumError, FormatError, StorageError
        When the shard is not what its index and the manifest say, or can't be read.
    """
    for cells in chunk_runs(shard, index, taken, storage.at(shard.path)):
        yield cells, *read_run(storage, shard, compression, cells)


def chunk_runs(
    shard: ShardInfo, index: Mapping[str, NDArray[Any]], taken: NDArray[np.intp], where: str
) -> Iterator[NDArray[np.intp]]:
    """The same cells in groups, each of neighbouring chunks that `read_run` reads at once.

    Raises
    ------
    FormatError
        When a member does not lie in its chunk.
    """
    chunks = shard.chunks
    chunk_of = np.repeat(np.arange(len(chunks)), chunks.cells)[taken]
    raw_ends = np.cumsum(chunks.raw)
    offset, size = index["offset"][taken], index["size"][taken]
    inside = (size >= 0) & (offset >= raw_ends[chunk_of] - chunks.raw[chunk_of])
    inside &= offset + size <= raw_ends[chunk_of]
    if not inside.all():
        bad = int(taken[np.flatnonzero(~inside)[0]])
        key = format_key(int(index["source"][bad]), int(index["row"][bad]))
        raise FormatError("its offset and size are not those of a member", where=f"{where}: {key}")
    for first, last in _runs(np.unique(chunk_of), chunks.stored):
        yield taken[(chunk_of >= first) & (chunk_of <= last)]


def read_run(
    storage: Storage, shard: ShardInfo, compression: Compression, cells: NDArray[np.intp]
) -> tuple[NDArray[np.uint8], int]:
    """The raw bytes of the chunks from that of the first cell to that of the last, and where they begin.

    Raises
    ------
    ChecksumError, FormatError, StorageError
        When they are not what the manifest says, or can't be read.
    """
    chunks, where = shard.chunks, storage.at(shard.path)
    first, last = np.searchsorted(np.cumsum(chunks.cells), cells[[0, -1]], side="right").tolist()
    ends = np.cumsum(chunks.stored[: last + 1]).tolist()
    at = ends[first] - int(chunks.stored[first])
    stored = np.frombuffer(storage.read(shard.path, at, ends[-1]), np.uint8)
    parts = []
    for i in range(first, last + 1):
        piece = stored[ends[i] - at - int(chunks.stored[i]) : ends[i] - at]
        parts.append(open_chunk(piece, int(chunks.raw[i]), int(chunks.sums[i]), compression, where))
    raw = stored if compression == "none" else np.concatenate(parts)
    raw.setflags(write=False)  # as `stored` is: the kernels are compiled once
    return raw, int(chunks.raw[:first].sum())


def decode_block(
    src: NDArray[np.uint8],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    n_tokens: int,
    kind: ValueKind,
    where: Callable[[int], str],
) -> TokenRows:
    """The genes and values of the members src[starts[i]:starts[i] + sizes[i]].

    Parameters
    ----------
    n_tokens
        Gene ids are below this.
    kind
        "counts" or "float".
    where
        What an error calls member i.

    Raises
    ------
    FormatError
        When one of them is not a cell of format 1.
    """
    rows, _, status = decode_rows(src, starts, sizes, n_tokens, kind)
    bad = np.flatnonzero(status != kernels.OK)
    if len(bad):
        check_status(int(status[bad[0]]), where(int(bad[0])))
    return rows


def _runs(wanted: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Neighbouring chunks of together about READ_BYTES: (first, last)."""
    first = last = -1
    for i in wanted.tolist():
        if first >= 0 and i == last + 1 and int(sizes[first : i + 1].sum()) <= READ_BYTES:
            last = i
            continue
        if first >= 0:
            yield first, last
        first = last = i
    if first >= 0:
        yield first, last

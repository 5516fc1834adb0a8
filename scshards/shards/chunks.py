"""Reading cells of a shard in order: the chunks that hold them, checked, and members decoded in blocks.

    index, places --chunk_runs--> groups of places --read_cells--> genes and values

A few chunks are in memory at a time. Called by shards.shardset, sources.shardset and through it by pack
and export; the stream, which reads cells at random, has a reader of its own (streaming.read.fetch).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.base.storage import Storage
from scshards.cells.batch import format_key
from scshards.cells.tokenizer import TokenRows, ValueKind
from scshards.kernels import members as kernels
from scshards.shards import Compression
from scshards.shards.arrays import ArrayReader, Rows, check_arrays
from scshards.shards.manifest import ShardInfo
from scshards.shards.members import check_status, decode_rows
from scshards.shards.tar import open_chunk

READ_BYTES = 1 << 22
"""About so many bytes of chunks are read at a time."""


def chunk_runs(
    shard: ShardInfo, taken: NDArray[np.intp], most: int = READ_BYTES
) -> Iterator[NDArray[np.intp]]:
    """Cells in groups, each of neighbouring chunks that `read_cells` reads at once.

    Parameters
    ----------
    shard, taken
        The shard, and places in it, ascending.
    most
        The bytes of the chunks of a group, about; one chunk alone may have more.
    """
    chunks = shard.chunks
    chunk_of = np.searchsorted(np.cumsum(chunks.cells), taken, side="right")
    stretch = np.cumsum(chunks.stored)[chunk_of] // most
    is_cut = (np.diff(chunk_of) > 1) | (np.diff(stretch) > 0)
    groups = np.split(taken, np.flatnonzero(is_cut) + 1)
    return (cells for cells in groups if len(cells))


def read_cells(
    storage: Storage,
    shard: ShardInfo,
    compression: Compression,
    index: Mapping[str, NDArray[Any]],
    taken: NDArray[np.intp],
    n_tokens: int,
    kind: ValueKind,
    arrays: ArrayReader | None = None,
) -> Iterator[tuple[NDArray[np.intp], TokenRows, dict[str, Rows]]]:
    """Genes and values of some cells, those of a few chunks at a time; and their arrays.

    Parameters
    ----------
    storage, shard, compression
        The shard.
    index
        Its index, with `offset`, `size`, `n_genes`, `source` and `row` at least, for arrays
        ARRAY_COLUMNS, too.
    taken
        The places of the cells in the shard, ascending.
    n_tokens, kind
        Gene ids are below this; "counts" or "float".
    arrays
        Of the set, where some of them are asked for.

    Yields
    ------
    (places of the cells, genes and values, {array: its rows}).

    Raises
    ------
    ChecksumError, FormatError, StorageError
        When the shard is not what its index and the manifest say, or can't be read.
    """
    where, chunks = storage.at(shard.path), shard.chunks

    def named(cell: int) -> str:
        return f"{where}: {format_key(int(index['source'][cell]), int(index['row'][cell]))}"

    for run in chunk_runs(shard, taken):
        raw, starts = read_run(storage, shard, compression, run)
        chunk_of = np.searchsorted(np.cumsum(chunks.cells), run, side="right")
        offset, size = index["offset"][run] - int(starts[0]), index["size"][run]
        begins = starts - starts[0]
        first, last = (begins[chunk_of - chunk_of[0] + i] for i in (0, 1))
        places = [(offset, size)]
        if arrays is not None:
            at = index["arrays_offset"][run] - int(starts[0])
            places.append((at, index["arrays_size"][run]))
        for at, n_bytes in places:
            # Of numbers that are not known to be small, no sum: it might wrap around.
            inside = (n_bytes >= 0) & (at >= first) & (at <= last) & (n_bytes <= last - at)
            if not inside.all():
                what = "its offset and size are not those of a member"
                raise FormatError(what, where=named(run[np.argmin(inside)]))
        rows, _, status = decode_rows(raw, offset, size, n_tokens, kind)
        is_zero = np.searchsorted(rows.indptr, np.flatnonzero(rows.values == 0), side="right") - 1
        wrong = np.diff(rows.indptr) != index["n_genes"][run]
        wrong[is_zero] = True
        status[wrong & (status == kernels.OK)] = kernels.BAD_COUNT
        for i in np.flatnonzero(status)[:1]:
            check_status(int(status[i]), named(run[i]))
        beside: dict[str, Rows] = {}
        if arrays is not None:
            beside, status = arrays.read(raw, *places[1])
            status[places[1][1] == 0] = kernels.BAD_STRUCTURE
            check_arrays(status, lambda i: named(run[i]))  # noqa: B023
        yield run, rows, beside


def read_run(
    storage: Storage, shard: ShardInfo, compression: Compression, cells: NDArray[np.intp]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The raw bytes of the chunks from that of the first cell to that of the last, and where each begins
    in the uncompressed tar, and the last ends."""
    chunks, where = shard.chunks, storage.at(shard.path)
    first, last = np.searchsorted(np.cumsum(chunks.cells), cells[[0, -1]], side="right").tolist()
    ends = np.cumsum(chunks.stored[: last + 1]).tolist()
    at = ends[first] - int(chunks.stored[first])
    stored = np.frombuffer(storage.read(shard.path, at, ends[-1]), np.uint8)
    parts = []
    for i in range(first, last + 1):
        piece = stored[ends[i] - at - int(chunks.stored[i]) : ends[i] - at]
        size, checksum = int(chunks.raw[i]), int(chunks.sums[i])
        parts.append(open_chunk(piece, size, checksum, compression, where, storage.at("")))
    raw = stored if compression == "none" else np.concatenate(parts)
    raw.setflags(write=False)  # as `stored` is: the kernels are compiled once
    return raw, np.append(0, np.cumsum(chunks.raw))[first : last + 2]

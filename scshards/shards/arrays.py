"""The arrays of a cell <-> bytes: the payload of its second tar member (format 1.1).

    {name: Rows} --encode_arrays--> payloads        decode_arrays(bytes, infos, places) -> {name: Rows}

Rows of a dense array are numbers [cells, width], those of a sparse one compressed sparse rows. A payload
is the msgpack map {name: bin} in the manifest's order: a dense row as it is, a sparse one as a member of
shards.members without labels, whose genes are columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.kernels import members as kernels
from scshards.shards.manifest import ArrayInfo

ARRAYS_STATUS = {
    kernels.BAD_STRUCTURE: "the member is not that of the arrays which the manifest names",
    kernels.BAD_VARINT: "a varint of an array is cut short or overlong",
    kernels.BAD_ORDER: "the columns of an array do not ascend",
    kernels.ID_TOO_LARGE: "a column is outside its array",
    kernels.BAD_COUNT: "an array has another size than it should have",
    kernels.BAD_VALUE: "a value of a sparse array is 0, or too large for its type",
}
"""What a status means where arrays are read."""

_LARGEST = (1 << 31) - 1


class SparseRows(NamedTuple):
    """Rows of a sparse array: those of cell i are [indptr[i]:indptr[i + 1]].

    Attributes
    ----------
    indptr
        int64 [cells + 1].
    columns
        int32 [values]: they ascend in a row.
    values
        int32 or float32 [values].
    """

    indptr: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: NDArray[Any]

    def take(self, rows: NDArray[np.integer]) -> SparseRows:
        """Some of the rows, in this order."""
        sizes = np.diff(self.indptr)[rows]
        indptr = np.append(0, np.cumsum(sizes))
        at = np.repeat(self.indptr[:-1][rows] - indptr[:-1], sizes) + np.arange(indptr[-1])
        return SparseRows(indptr, self.columns[at], self.values[at])


Rows = NDArray[Any] | SparseRows
"""[cells, width] of a dense array, SparseRows of a sparse one."""


def rows_of(rows: Rows, which: NDArray[np.integer]) -> Rows:
    """Some rows of either kind, in this order."""
    return rows.take(which) if isinstance(rows, SparseRows) else rows[which]


def encode_arrays(
    infos: Mapping[str, ArrayInfo], rows: Mapping[str, Rows], n: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The payloads of n cells, one after another, and the size of each (int64).

    Rows are of the arrays' dtypes, and those of sparse arrays have no zeros.
    """
    head = msgpack.Packer().pack_map_header(len(infos))
    out = np.tile(np.frombuffer(head, np.uint8), n)
    sizes = np.full(n, len(head), np.int64)
    for name, info in infos.items():
        piece, piece_sizes = _pieces(name, info, rows[name], n)
        joined = np.empty(len(out) + len(piece), np.uint8)
        kernels.interleave(out, sizes, piece, piece_sizes, joined, 0)
        out, sizes = joined, sizes + piece_sizes
    return out, sizes


def _pieces(
    name: str, info: ArrayInfo, rows: Rows, n: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The name and the bin of one array for each cell, and their sizes."""
    key = msgpack.packb(name)
    if not isinstance(rows, SparseRows):
        stored = np.ascontiguousarray(rows, np.dtype(info.dtype).newbyteorder("<"))
        data = stored.view(np.uint8).reshape(n, info.row_bytes)
        head = np.frombuffer(key + _bin_head(info.row_bytes), np.uint8)
        whole = np.empty((n, len(head) + info.row_bytes), np.uint8)
        whole[:, : len(head)], whole[:, len(head) :] = head, data
        return whole.reshape(-1), np.full(n, whole.shape[1], np.int64)
    values = rows.values.astype(np.uint64 if info.dtype == "int32" else np.float32)
    members = np.empty(15 * len(values) + n * kernels.MEMBER_BOUND, np.uint8)
    ends = np.empty(n, np.int64)
    columns = np.ascontiguousarray(rows.columns, np.int32)
    size = kernels.encode_members(
        rows.indptr, columns, values, np.zeros(0, np.uint8), np.zeros(n, np.int64), members, ends
    )
    sizes = np.diff(ends, prepend=0)
    heads = [key + _bin_head(s) for s in sizes.tolist()]
    head_sizes = np.array([len(h) for h in heads], np.int64)
    joined = np.empty(size + int(head_sizes.sum()), np.uint8)
    flat = np.frombuffer(bytearray(b"".join(heads)), np.uint8)
    kernels.interleave(flat, head_sizes, members[:size], sizes, joined, 0)
    return joined, sizes + head_sizes


def _bin_head(size: int) -> bytes:
    head: bytes = msgpack.packb(bytes(size))[: -size or None]
    return head


class ArrayReader:
    """Reads arrays of members.

    Parameters
    ----------
    infos
        `arrays` of the manifest: what every member has.
    names
        Those that are read; None: all of them.
    """

    def __init__(self, infos: Mapping[str, ArrayInfo], names: Iterable[str] | None = None) -> None:
        self.infos = dict(infos)
        self.names = tuple(infos if names is None else names)
        self._place = {name: k for k, name in enumerate(infos)}
        keys = [msgpack.packb(name) for name in infos]
        self._keys = np.frombuffer(b"".join(keys), np.uint8)
        self._key_ends = np.cumsum([len(k) for k in keys], dtype=np.int64)
        self._row_bytes = np.array(
            [i.row_bytes if i.kind == "dense" else -1 for i in infos.values()], np.int64
        )

    def read(
        self, src: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> tuple[dict[str, Rows], NDArray[np.int64]]:
        """The arrays in the payloads src[starts[i]:starts[i] + sizes[i]], by name.

        A cell of size 0 has zeros.

        Returns
        -------
        The rows, and for each cell OK or a key of ARRAYS_STATUS; then its rows mean nothing.
        """
        n, src = len(starts), kernels.read_only(src)
        places = np.full((n, len(self.infos), 2), -1, np.int64)
        status = np.zeros(n, np.int64)
        kernels.find_arrays(
            src, np.ascontiguousarray(starts, np.int64), np.ascontiguousarray(sizes, np.int64),
            self._keys, self._key_ends, self._row_bytes, places, status,
        )  # fmt: skip
        places[status != kernels.OK] = -1
        rows: dict[str, Rows] = {}
        for name in self.names:
            info, at = self.infos[name], places[:, self._place[name]]
            if info.kind == "dense":
                data = np.empty((n, info.row_bytes), np.uint8)
                kernels.gather_rows(src, at[:, 0], data)
                rows[name] = data.view(np.dtype(info.dtype).newbyteorder("<"))
            else:
                rows[name] = _sparse(src, at, info, status)
        return rows, status


def _sparse(
    src: NDArray[np.uint8], at: NDArray[np.int64], info: ArrayInfo, status: NDArray[np.int64]
) -> SparseRows:
    """The rows of a sparse array at these places; `status` becomes what is wrong with a cell."""
    n, is_there = len(at), at[:, 0] >= 0
    fields, found = np.zeros((n, kernels.MEMBER_FIELDS), np.int64), np.zeros(n, np.int64)
    starts, sizes = np.ascontiguousarray(at[:, 0]), at[:, 1] - at[:, 0]
    kernels.measure_members(src, starts, sizes, fields, found)
    found[~is_there] = kernels.OK
    is_whole = info.dtype == "int32"
    wrong = fields[:, 5] != -1  # labels have no place here
    if not is_whole:
        wrong |= fields[:, 4] - fields[:, 3] != 4 * fields[:, 0]
    found[is_there & (found == kernels.OK) & wrong] = kernels.BAD_COUNT
    fields[~is_there | (found != kernels.OK)] = 0
    indptr = np.append(0, np.cumsum(fields[:, 0]))
    columns = np.zeros(int(indptr[-1]), np.int32)
    whole = np.zeros(len(columns) if is_whole else 0, np.uint64)
    # What is not there has no columns to decode: it must not be looked at either.
    looked = np.where(is_there, found, kernels.BAD_STRUCTURE)
    kernels.decode_members(src, fields, indptr, info.width, columns, whole, looked)
    found[is_there] = looked[is_there]
    if is_whole:
        bad = whole > _LARGEST
        values: NDArray[Any] = whole.astype(np.int32)
    else:
        stored = np.empty(4 * len(columns), np.uint8)
        kernels.gather_slices(src, fields[:, 3], 4 * fields[:, 0], np.arange(n), stored)
        values = stored.view("<f4").astype(np.float32, copy=False)
        bad = values == 0
    cells = np.searchsorted(indptr, np.flatnonzero(bad), side="right") - 1
    found[cells[found[cells] == kernels.OK]] = kernels.BAD_VALUE
    status[status == kernels.OK] = found[status == kernels.OK]
    return SparseRows(indptr, columns, values)


def check_arrays(status: NDArray[np.int64], named: Callable[[int], object]) -> None:
    """FormatError for the first cell whose arrays are not right; `named(i)` says which cell it is."""
    for i in np.flatnonzero(status)[:1].tolist():
        raise FormatError(
            ARRAYS_STATUS[int(status[i])],
            where=named(i),
            advice="run scshards verify on the shard set",
        )


def decode_arrays(
    payload: bytes, infos: Mapping[str, ArrayInfo], *, where: object = None
) -> dict[str, Any]:
    """The arrays in a member's bytes, each [width] of its dtype; zeros of sparse ones included.

    Parameters
    ----------
    payload
        The bytes of one `*.arrays.mp` member.
    infos
        `arrays` of the manifest.
    where
        Named in an error: the shard and key.

    Raises
    ------
    FormatError
        When the bytes are not such arrays.
    """
    src = np.frombuffer(payload, np.uint8)
    rows, status = ArrayReader(infos).read(src, np.zeros(1, np.int64), np.array([len(src)]))
    if not payload:
        status[:] = kernels.BAD_STRUCTURE
    check_arrays(status, lambda _: where)
    return {name: dense_rows(found, infos[name])[0] for name, found in rows.items()}


def dense_rows(rows: Rows, info: ArrayInfo) -> NDArray[Any]:
    """Rows of either kind as numbers [cells, width] of the array's dtype."""
    if not isinstance(rows, SparseRows):
        return rows.astype(info.dtype, copy=False)
    out = np.zeros((len(rows.indptr) - 1, info.width), info.dtype)
    out[np.repeat(np.arange(len(out)), np.diff(rows.indptr)), rows.columns] = rows.values
    return out

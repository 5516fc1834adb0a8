"""Cell <-> bytes: the payload of one tar member (format 1, docs/reference/format.md).

A member is the msgpack map {"n", "genes", "values"[, "labels"]} in this order, every item in its
shortest form. `pack_block` makes members of rows of a matrix, by the kernel that pack has, `encode_rows`
of tokens, for verify, which compares. `decode_cell` reads one for people and tests. The stream reads
members with `kernels.members` directly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.cells.tokenizer import (
    LARGEST,
    GeneMatch,
    TokenRows,
    ValueKind,
    Workspace,
    kernel_values,
    value_error,
)
from scshards.kernels import members as kernels
from scshards.kernels import rows as row_kernels

if TYPE_CHECKING:
    from scshards.shards.manifest import LabelInfo

Labels = Mapping[str, NDArray[Any]]
"""Of a block of cells: {obs column: category codes (-1 missing), or float64 numbers (NaN missing)}."""

EXTENSION = "cell.mp"
"""Of a member's name; `mp` is how webdataset's own `.decode()` knows msgpack."""

ARRAYS_EXTENSION = "arrays.mp"
"""Of the name of the member behind it that holds the cell's arrays; see shards.arrays."""

MAX_TOKENS = MAX_CODES = 1 << 31
"""Token ids and category codes are below this, so that an int32 holds them."""

STATUS = {
    kernels.BAD_STRUCTURE: "the member is not a cell of format 1",
    kernels.BAD_VARINT: "a varint is cut short or overlong",
    kernels.BAD_ORDER: "gene ids do not ascend",
    kernels.ID_TOO_LARGE: "a gene id is outside the vocabulary",
    kernels.BAD_COUNT: "the number of genes or values differs from n",
    kernels.BAD_VALUE: "a value is 0, negative, infinite or not a number",
}
"""What a kernel's status code means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One decoded cell.

    Attributes
    ----------
    genes
        int32 [n]: token ids, ascending.
    values
        uint64 [n] counts, or float32 [n].
    labels
        {column: category code, or number}; empty when the shard set keeps none. Where categories were
        given, their text in place of codes, and None where it is missing.
    """

    genes: NDArray[np.int32]
    values: NDArray[Any]
    labels: Mapping[str, Any] = field(default_factory=dict)


def pack_block(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    data: NDArray[Any],
    match: GeneMatch,
    kind: ValueKind,
    *,
    rows: NDArray[np.int64] | None = None,
    labels: Labels = MappingProxyType({}),
    first_row: int = 0,
    where: object = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The members of a block of CSR rows, as pack makes them.

    Parameters
    ----------
    indptr, indices, data, match
        The block, whose columns may be unsorted and repeated, and how they match.
    kind
        "counts" wants whole numbers and adds up columns that share a token; "float" keeps float32.
    rows, labels
        Those of its rows that are made members of, all without it; and their labels.
    first_row, where
        Row number of the block's first row and name of the matrix, for messages.

    Returns
    -------
    As of `encode_rows`.

    Raises
    ------
    ValueKindError
        For a negative, NaN or infinite value, a fraction under "counts", or, under "float", two
        values of one cell for one token. Values in unmatched columns are checked too.
    SourceError
        When a value is in a column that there is not.
    """
    work, numbers = Workspace(match, kind), kernel_values(data, where=where)
    rows = np.arange(len(indptr) - 1) if rows is None else rows
    label_bytes, label_ends = encode_labels(labels, len(rows))
    n = len(rows)
    # Varints take five and ten bytes at the most.
    out = np.empty(15 * len(data) + n * kernels.MEMBER_BOUND + len(label_bytes), np.uint8)
    sizes, n_genes = np.zeros(n, np.int64), np.zeros(n, np.int64)
    status, stop, at, end, _ = row_kernels.pack_rows(
        indptr, np.ascontiguousarray(indices, np.int32), numbers, LARGEST[numbers.dtype.kind], rows, 0,
        work.slots, kind == "counts", (0, 1 << 62, 0.0), label_bytes, label_ends, work.scratch,
        work.bits, work.tokens, np.empty(len(work.tokens), work.scratch.dtype), out, 0, sizes, n_genes,
        np.zeros(n, np.float64), np.zeros(n, np.int8),
    )  # fmt: skip
    if status:
        row = first_row + int(rows[stop])
        raise value_error(status, data, indices, at, row=row, where=where)
    return out[:end], np.cumsum(sizes)


def encode_rows(
    rows: TokenRows, labels: Labels = MappingProxyType({})
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The members of a block of cells.

    Parameters
    ----------
    rows
        Tokenized cells, counts (uint64) or float32.
    labels
        {column: codes (-1 missing), or numbers (NaN missing)}, as many as there are cells.

    Returns
    -------
    payload uint8, and ends int64 [cells]: cell i is payload[ends[i - 1]:ends[i]].
    """
    n = len(rows.indptr) - 1
    label_bytes, label_ends = encode_labels(labels, n)
    # Varints take five and ten bytes at the most.
    bound = 15 * len(rows.genes) + n * kernels.MEMBER_BOUND + len(label_bytes)
    payload = np.empty(bound, np.uint8)
    ends = np.empty(n, np.int64)
    values = np.ascontiguousarray(rows.values, rows.values.dtype.newbyteorder("="))
    size = kernels.encode_members(
        rows.indptr, rows.genes, values, label_bytes, label_ends, payload, ends
    )
    assert size <= bound
    return payload[:size], ends


def decode_rows(
    src: NDArray[np.uint8],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    n_tokens: int,
    kind: ValueKind,
) -> tuple[TokenRows, NDArray[np.int64], NDArray[np.int64]]:
    """The genes and values of the members src[starts[i]:starts[i] + sizes[i]].

    Returns
    -------
    rows
        The cells: uint64 counts or float32 values, gene ids below `n_tokens`.
    fields
        int64 [cells, MEMBER_FIELDS]: where the parts of each member are, as the kernel says.
    status
        int64 [cells]: OK or a key of STATUS; then the cell's genes and values mean nothing.
    """
    n = len(starts)
    src = kernels.read_only(src)
    fields = np.zeros((n, kernels.MEMBER_FIELDS), np.int64)
    status = np.zeros(n, np.int64)
    kernels.measure_members(src, starts, sizes, fields, status)
    if kind == "float":
        uneven = fields[:, 4] - fields[:, 3] != 4 * fields[:, 0]
        status[(status == kernels.OK) & uneven] = kernels.BAD_COUNT
    fields[status != kernels.OK] = 0
    indptr = np.append(0, np.cumsum(fields[:, 0]))
    genes = np.zeros(int(indptr[-1]), np.int32)
    counts = np.zeros(len(genes) if kind == "counts" else 0, np.uint64)
    kernels.decode_members(src, fields, indptr, n_tokens, genes, counts, status)
    values: NDArray[Any] = counts
    if kind == "float":
        stored = np.empty(4 * len(genes), np.uint8)
        kernels.gather_slices(src, fields[:, 3], 4 * fields[:, 0], np.arange(n), stored)
        values = stored.view("<f4").astype(np.float32, copy=False)
        wrong = np.flatnonzero(~((values > 0) & (values < np.inf)))
        cells = np.searchsorted(indptr, wrong, side="right") - 1
        status[cells[status[cells] == kernels.OK]] = kernels.BAD_VALUE
    rows = TokenRows(indptr, genes, values)
    return rows, fields, status


def encode_labels(labels: Labels, n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The labels of n cells as they stand in their members: payload and ends, as of `encode_rows`."""
    assert all(len(values) == n for values in labels.values())
    if not labels:
        return np.zeros(0, np.uint8), np.zeros(n, np.int64)
    codes = np.full((n, len(labels)), -1, np.int64)
    numbers = np.zeros((n, len(labels)), np.uint64)
    is_number = np.array([values.dtype.kind == "f" for values in labels.values()], np.bool_)
    for j, values in enumerate(labels.values()):
        if is_number[j]:
            numbers[:, j] = np.ascontiguousarray(values, np.float64).view(np.uint64)
        else:
            codes[:, j] = values
    names = [msgpack.packb(name) for name in labels]
    name_ends = np.cumsum([len(b) for b in names], dtype=np.int64)
    flat = np.frombuffer(b"".join(names), np.uint8)
    out = np.empty(n * (3 + len(flat) + 9 * len(labels)), np.uint8)
    ends = np.empty(n, np.int64)
    size = kernels.encode_labels(flat, name_ends, codes, numbers, is_number, out, ends)
    return out[:size], ends


def decode_cell(
    payload: bytes,
    *,
    kind: ValueKind = "counts",
    labels: Mapping[str, LabelInfo] | None = None,
    where: object = None,
) -> Cell:
    """The cell in a member's bytes.

    Parameters
    ----------
    payload
        The bytes of one `*.cell.mp` member.
    kind
        "counts" or "float", as the manifest's `values.kind` says.
    labels
        `labels` of the manifest, for texts in place of codes.
    where
        Named in an error: the shard and key.

    Raises
    ------
    FormatError
        When the bytes are not a cell of format 1, or its labels are not those of `labels`.
    """
    src = np.frombuffer(payload, np.uint8)
    fields = np.zeros(kernels.MEMBER_FIELDS, np.int64)
    check_status(kernels.parse_member(src, 0, len(src), fields), where)
    n, g0, g1, v0, v1, labels_at = (int(x) for x in fields)
    genes = np.empty(n, np.int32)
    check_status(kernels.decode_genes(src, g0, g1, n, MAX_TOKENS, genes), where)
    values: NDArray[Any]
    if kind == "counts":
        values = np.empty(n, np.uint64)
        check_status(kernels.decode_counts(src, v0, v1, n, values), where)
    else:
        check_status(kernels.OK if v1 - v0 == 4 * n else kernels.BAD_COUNT, where)
        values = np.frombuffer(payload, "<f4", n, v0).astype(np.float32)
        is_right = bool(((values > 0) & (values < np.inf)).all())
        check_status(kernels.OK if is_right else kernels.BAD_VALUE, where)
    found: Mapping[str, Any] = _labels(payload, labels_at, where)
    if labels is not None:
        found = _named(found, labels, where)
    return Cell(genes=genes, values=values, labels=found)


def decode_labels(payload: bytes, *, where: object = None) -> dict[str, int | float]:
    """The labels alone of a member, as `decode_cell` has them."""
    src = np.frombuffer(payload, np.uint8)
    fields = np.zeros(kernels.MEMBER_FIELDS, np.int64)
    check_status(kernels.parse_member(src, 0, len(src), fields), where)
    return _labels(payload, int(fields[-1]), where)


def check_status(status: int, where: object) -> None:
    """Raise the FormatError that a kernel's status stands for."""
    if status != kernels.OK:
        advice = "run scshards verify on the shard set"
        raise FormatError(STATUS[status], where=where, advice=advice)


def _labels(payload: bytes, at: int, where: object) -> dict[str, int | float]:
    """The labels that begin at a member's byte `at`; none when that is below 0."""
    if at < 0:
        return {}
    labels: Any = None
    with contextlib.suppress(msgpack.UnpackException, ValueError):
        # Labels are flat: with these limits, hostile bytes can't ask for memory.
        labels = msgpack.unpackb(payload[at:], max_array_len=0, max_ext_len=0)
    is_right = isinstance(labels, dict) and all(
        isinstance(name, str) and _is_label(v) for name, v in labels.items()
    )
    check_status(kernels.OK if is_right else kernels.BAD_STRUCTURE, where)
    return labels


def _named(
    found: Mapping[str, int | float], labels: Mapping[str, LabelInfo], where: object
) -> dict[str, Any]:
    """Labels with texts in place of codes, None in place of -1."""
    named: dict[str, Any] = {}
    for name, value in found.items():
        info = labels.get(name)
        is_number = info is not None and info.kind == "number"
        if info is None or is_number != isinstance(value, float):
            raise FormatError(f"the manifest has no such label as {name!r}", where=where)
        if isinstance(value, int) and value >= len(info.categories):
            raise FormatError(f"the cell has no such category of {name!r}: {value}", where=where)
        named[name] = info.named(value)
    return named


def _is_label(value: object) -> bool:
    """A category code, -1 when missing, or a number, NaN when missing."""
    return isinstance(value, float) or (type(value) is int and -1 <= value < MAX_CODES)

"""What becomes of the rows of a count matrix: genes matched to tokens, kinds and faults of values.

    columns --match_genes--> GeneMatch --Workspace--> what the kernels that make members of rows need

They walk each row once: values are put at their token in a dense scratch row and read back along a bit
set, so ids come out ascending and columns that share a token are added up, without sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, SourceError, ValueKindError
from scshards.cells.vocab import Vocab
from scshards.kernels import rows as kernels

ValueKind = Literal["counts", "float"]

_DAMAGED = "the file is damaged: restore it from a good copy"
LARGEST = {"i": np.int64(2**63 - 1), "f": np.nextafter(np.float64(2**63), 0)}
"""The largest count of integers and of floats: below 2^63."""

_FAULTS = {
    kernels.NEGATIVE: "is negative",
    kernels.NAN: "is not a number (NaN)",
    kernels.INFINITE: "is infinite",
    kernels.FRACTION: "is not a whole number",
    kernels.HUGE: "is too large for a count (2^63 or more)",
    kernels.UNFIT: "is too large or too small for a float32",
}
"""What a kernel's fault says of a value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneMatch:
    """How the gene columns of one matrix map to a vocabulary.

    Attributes
    ----------
    tokens
        int32 [columns]: the token id of each column, -1 when it is not in the vocabulary.
    n_tokens
        Size of the vocabulary.
    """

    tokens: NDArray[np.int32]
    n_tokens: int

    @property
    def matched(self) -> int:
        """Columns with a token."""
        return int(np.count_nonzero(self.tokens >= 0))

    @property
    def unmatched(self) -> int:
        """Columns without one."""
        return len(self.tokens) - self.matched

    @property
    def merged(self) -> int:
        """Of the matched columns, those whose token an earlier column has already."""
        known = self.tokens[self.tokens >= 0]
        return len(known) - int(np.count_nonzero(np.bincount(known)))


class TokenRows(NamedTuple):
    """Tokenized cells, CSR-like: row i is the slice indptr[i]:indptr[i + 1].

    Attributes
    ----------
    indptr
        int64 [rows + 1].
    genes
        int32 [values]: token ids, ascending within a row.
    values
        uint64 (counts) or float32 (float) [values], never zero.
    """

    indptr: NDArray[np.int64]
    genes: NDArray[np.int32]
    values: NDArray[Any]


def match_genes(names: Sequence[str], vocab: Vocab) -> GeneMatch:
    """Look every column's gene up in the vocabulary."""
    return GeneMatch(tokens=vocab.ids(names), n_tokens=len(vocab))


class Workspace:
    """What the kernels need beside the rows, for one match; see kernels.rows.pack_rows.

    Attributes
    ----------
    slots
        uint32 [columns].
    scratch
        uint64 (counts) or float32 (float) [largest slot + 1].
    bits
        uint64, a bit for each slot.
    tokens
        uint32 [tokens and a few more].
    """

    def __init__(self, match: GeneMatch, kind: ValueKind) -> None:
        words = -(-match.n_tokens // 64)
        self.slots = np.where(match.tokens < 0, 64 * words, match.tokens).astype(np.uint32)
        self.scratch = np.zeros(64 * words + 1, np.uint64 if kind == "counts" else np.float32)
        self.bits = np.zeros(words + 1, np.uint64)
        self.tokens = np.empty(64 * words + kernels.SLACK, np.uint32)


def kernel_values(data: NDArray[Any], *, where: object = None) -> NDArray[Any]:
    """The values as one of four dtypes, so that four kernels are compiled and not twelve.

    Counts of 2^63 or more come out negative: `value_error` knows it by the dtype that was given.

    Raises
    ------
    ValueKindError
        When they are no numbers.
    """
    kind, size = data.dtype.kind, data.dtype.itemsize
    if kind == "b" or (kind in "iu" and size < 4):
        return np.ascontiguousarray(data, np.int32)
    if kind == "u" and size == 8 and data.dtype.isnative:
        return np.ascontiguousarray(data).view(np.int64)
    if kind == "u":
        return np.ascontiguousarray(data, np.int64)
    if kind == "f" and size == 2:
        return np.ascontiguousarray(data, np.float32)
    if kind in "if" and size <= 8:
        # A native, contiguous copy only where the stored one is not.
        return np.ascontiguousarray(data, data.dtype.newbyteorder("="))
    raise ValueKindError(
        f"values of dtype {data.dtype} are not numbers", where=where, advice="choose another matrix"
    )


def round_values(data: NDArray[Any], within: float) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The values, those made whole numbers that are off one by at most `within`; and which they are."""
    if data.dtype.kind != "f":
        return data, np.zeros(len(data), np.bool_)
    whole = np.rint(data)
    with np.errstate(invalid="ignore"):  # of two infinities, and of NaN
        is_off = (whole != data) & (np.abs(data - whole) <= within)
    return np.where(is_off, whole, data), is_off


def value_error(
    fault: int,
    data: NDArray[Any],
    indices: NDArray[np.integer],
    at: int,
    *,
    row: int,
    where: object,
) -> ScshardsError:
    """The error for a fault that a kernel found at place `at` of `data`, the values as given."""
    column = int(indices[at])
    if fault == kernels.NO_COLUMN:
        return SourceError(
            f"a value lies in column {column}, which the matrix does not have",
            where=f"{where}: row {row}",
            advice=_DAMAGED,
        )
    if fault == kernels.REPEATED:
        return ValueKindError(
            "two columns of one cell share a token, and only counts can be added up",
            where=f"{where}: row {row}",
            advice="make the gene names unique, or pack the counts instead",
        )
    if fault == kernels.NEGATIVE and data.dtype.kind == "u":
        fault = kernels.HUGE
    return ValueKindError(
        f"the value {data[at]} {_FAULTS[fault]}",
        where=f"{where}: row {row}, column {column}",
        advice="choose the matrix that holds counts with --layer NAME or --raw, or repair it; fractions "
        "are kept with --values float",
    )


def dense_to_csr(
    block: NDArray[Any],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """indptr int64, indices int32 and data of a dense block [rows, columns]; NaN is non-zero."""
    rows, columns = np.nonzero(block)
    indptr = np.zeros(block.shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=block.shape[0]), out=indptr[1:])
    return indptr, columns.astype(np.int32), block[rows, columns]

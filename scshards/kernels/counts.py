"""Members -> rows of counts, for objective="counts"; and how often a gene has each count.

Called by streaming.collate.counts and streaming.variable; `cells.read_cells` makes tokens of members.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.cache import inlined, kernel
from scshards.kernels.members import BAD_COUNT, ID_TOO_LARGE, OK, decode_counts, decode_genes
from scshards.kernels.vectors import trailing_zeros

TALLIED = 32
"""`tally` has a place for each count below it."""

_U64 = np.uint64


def new_scratch(n_tokens: int, n_columns: int) -> tuple[NDArray[Any], ...]:
    """Work space of one thread for `read_counts`."""
    return (
        np.zeros(n_tokens + 128, np.int32),
        np.zeros(n_tokens + 128, np.uint16),
        np.zeros(n_columns, np.uint16),
        np.zeros((n_columns + 63) // 64, np.uint64),
    )


@kernel
def read_counts(src, fields, rules, columns, scratch, genes, counts, ends, library):
    """The counts of each cell in the columns that it has, ascending, one cell behind another.

    Parameters
    ----------
    src, fields
        The members, and what `members.measure_members` found [cells, MEMBER_FIELDS].
    rules
        (tokens, first, is_sorted): gene ids are below `tokens`. With `first` of 0 or more, token
        first + c has column c, and there are no others; else `columns` says it. `is_sorted`: whether
        columns ascend with the tokens.
    columns
        int32 [tokens]: the column of each token, -1 for none.
    scratch
        `new_scratch`'s: genes and counts of a cell, and counts by column with a zeroed bit set of these.
    genes, counts
        Filled: columns (uint16 or int32) and counts (uint16), with room for all genes of all cells.
    ends, library
        Filled, int64 [cells]: where each cell ends, and the sum of all its counts, those without a
        column too.

    Returns
    -------
    (status, cell) of the first bad one; LARGE for a count above 65,535, which has no place here.
    """
    n_tokens, base, is_sorted = rules
    ids, small, dense, bits = scratch
    at = np.int64(0)
    for b in range(len(fields)):
        n = fields[b, 0]
        status = np.int64(BAD_COUNT)
        if n <= n_tokens:
            status = decode_genes(src, fields[b, 1], fields[b, 2], n, n_tokens, ids)
        if status != OK:
            return status, b
        whole = base >= 0
        held = counts[at : at + n] if whole else small[:n]
        status = decode_counts(src, fields[b, 3], fields[b, 4], n, held)
        if status != OK:
            return status, b
        total = _U64(0)
        for j in range(n):
            total += _U64(held[j])
        library[b] = total
        if whole:
            if n > 0 and ids[0] < base:
                return ID_TOO_LARGE, b
            # Slices: numba adds a test for negative places otherwise, and that costs the vectors.
            to, first = genes[at : at + n], np.int32(base)
            for j in range(n):
                to[j] = ids[j] - first
            at += n
        elif is_sorted:
            at = _keep(n, ids, small, columns, genes, counts, at)
        else:
            at = _sort(n, ids, small, columns, dense, bits, genes, counts, at)
        ends[b] = at
    return OK, np.int64(-1)


@kernel
def tally(indptr, genes, counts, is_mine, table, large_genes, large_counts):
    """table[gene, count] += 1 (uint32) for the counts below TALLIED of the rows that `is_mine` names.

    The others go to `large_genes` and `large_counts` (int64); how many these are comes back.
    """
    n = np.int64(0)
    for row in range(len(is_mine)):
        if not is_mine[row]:
            continue
        for j in range(indptr[row], indptr[row + 1]):
            gene, count = np.int64(genes[j]), np.int64(counts[j])
            if count < TALLIED:
                table[gene, count] += np.uint32(1)
            else:
                large_genes[n], large_counts[n] = gene, count
                n += 1
    return n


@inlined
def _keep(n, ids, small, columns, genes, counts, at):
    """Those that have a column, in the order of their tokens; where they end comes back."""
    k = _U64(at)
    for j in range(_U64(n)):
        column = columns[np.uint32(ids[j])]
        # Written in any case, and then over: no branch is guessed wrong. There is room for all.
        genes[k] = column
        counts[k] = small[j]
        k += _U64(column >= 0)
    return np.int64(k)


@inlined
def _sort(n, ids, small, columns, dense, bits, genes, counts, at):
    """Those that have a column, in the order of these; where they end comes back."""
    for j in range(n):
        column = columns[ids[j]]
        if column >= 0:
            dense[column] = small[j]
            bits[column >> 6] |= _U64(1) << _U64(column & 63)
    for w in range(len(bits)):
        word = bits[w]
        bits[w] = 0
        while word:
            column = (w << 6) + trailing_zeros(word)
            word &= word - _U64(1)
            genes[at], counts[at] = column, dense[column]
            at += 1
    return at

"""The compiled loops of pack: rows to members, and counting, sorting and copying.

A row becomes tokens in two steps: its values are put at their tokens in a dense scratch row, where a bit
set marks them (`_spread`); then the bit set is read, which gives the tokens in ascending order
(`_list_tokens`).
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.cache import inner, kernel
from scshards.kernels.members import MEMBER_BOUND, write_member
from scshards.kernels.vectors import count_ones, trailing_zeros

NEGATIVE, NAN, INFINITE, FRACTION, HUGE, UNFIT, NO_COLUMN, REPEATED = 1, 2, 3, 4, 5, 6, 7, 8
"""Faults of a value; NO_COLUMN of its place, REPEATED of a float whose token is there already."""

SLACK = 4
"""`_list_tokens` writes up to so many tokens behind the last."""

_PLAIN = 1 << 24
"""Below it a float32 holds every whole number, and sums of a row fit a float64."""

FULL = -1
"""`pack_rows` stopped before a row for which there may be no room; faults are above 0."""

KEPT, FEW_GENES, MANY_GENES, FEW_COUNTS = 0, 1, 2, 3
"""What became of a cell."""


@kernel
def pack_rows(
    indptr, indices, data, largest, rows, first, slots, counts, limits, labels, label_ends,
    scratch, bits, tokens, values, out, at, sizes, n_genes, totals, fates,
):  # fmt: skip
    """The members of rows[first:] of a block, one after another into out[at:].

    Parameters
    ----------
    indptr, indices, data
        A block of CSR rows; `rows` [cells] are those to pack.
    largest
        The largest count, a float for floats: compared so, it is exact.
    slots, counts
        `slots` [columns] is the token of each column, and for one without, the first multiple of 64 that
        is no token; and whether values are counts.
    scratch, bits, tokens, values
        Work space: `scratch` [of the values' dtype, largest slot + 1], `bits` (a zeroed bit set of as
        many), `tokens` [tokens + SLACK], and `values` [as many] of scratch's dtype.
    limits
        Least and most genes of a cell, and the least sum of its values; others are left out.
    labels, label_ends
        Of `rows`, as shards.members.encode_labels gives them.
    sizes, n_genes, totals, fates
        Filled for each of `rows`: bytes of its member, its genes, the sum of its values in the order of
        the genes (float64), and KEPT or why it is not.

    Returns
    -------
    0, FULL or a fault; the place in `rows` where it stopped, and in `data` for a fault; the end of what
    was written; and the values that lay in unmatched columns.
    """
    start = indptr[0]
    unmatched = 0
    for i in range(first, len(rows)):
        a, b = indptr[rows[i]] - start, indptr[rows[i] + 1] - start
        label_start = label_ends[i - 1] if i else 0
        if at + member_bound(b - a, label_ends[i] - label_start) > len(out):
            return FULL, i, 0, at, unmatched
        plain = counts and _is_plain(indices[a:b], data[a:b], len(slots))
        n = 0
        total = 0.0
        if plain:
            lost = _spread_plain(indices[a:b], data[a:b], slots, scratch, bits)
            n = _list_tokens(bits, tokens)
            # Fewer tokens than values: some share one, and are to be added up.
            plain = n + lost == b - a
        if plain:
            # Small whole numbers: their sum is exact in any order.
            whole = np.int64(0)
            for j in range(n):
                values[j] = scratch[tokens[j]]
                whole += np.int64(values[j])
            total += whole
        else:
            fault, place, lost = _spread(
                indices[a:b], data[a:b], largest, slots, counts, scratch, bits
            )
            if fault:
                return fault, i, a + place, at, unmatched
            n = _list_tokens(bits, tokens)
            for j in range(n):
                values[j] = scratch[tokens[j]]
                total += values[j]
        unmatched += lost
        n_genes[i] = n
        totals[i] = total
        fates[i] = _fate(n, total, limits)
        if fates[i] != KEPT:
            continue
        p = write_member(out, at, tokens[:n], values[:n], labels[label_start : label_ends[i]])
        sizes[i] = p - at
        at = p
    return 0, len(rows), 0, at, unmatched


@kernel
def member_bound(n_values, label_bytes):
    """A member of so many values and bytes of labels takes no more than this."""
    return MEMBER_BOUND + label_bytes + 15 * n_values


@inner
def _fate(n, total, limits):
    least_genes, most_genes, least_sum = limits
    if n < least_genes:
        return FEW_GENES
    if n > most_genes:
        return MANY_GENES
    if total < least_sum:
        return FEW_COUNTS
    return KEPT


@kernel
def count_rows(rows, counts):
    """counts[r] += 1 for each r of `rows`; False when one is out of range."""
    for i in range(len(rows)):
        r = rows[i]
        if r < 0 or r >= len(counts):
            return False
        counts[r] += 1
    return True


@kernel
def row_totals(indptr, values, out):
    """out[i] = the sum of row i's values, in order, in float64: the same for any blocking."""
    for i in range(len(indptr) - 1):
        total = 0.0
        for j in range(indptr[i], indptr[i + 1]):
            total += values[j]
        out[i] = total


@kernel
def count_cells(indptr, indices, data, tokens, first_row, last_row, cells):
    """cells[t] += 1 for each row with a non-zero value of token t; last_row[t] is work space."""
    start = indptr[0]
    for row in range(len(indptr) - 1):
        for i in range(indptr[row] - start, indptr[row + 1] - start):
            t = tokens[indices[i]]
            if t >= 0 and data[i] != 0 and last_row[t] != first_row + row:
                last_row[t] = first_row + row
                cells[t] += 1


@kernel
def slices_differ(a, a_starts, b, b_ends, sizes, differs):
    """differs[i] = whether slice i of `a` is not slice i of `b`, whose slices lie end to end."""
    start = 0
    for i in range(len(sizes)):
        differs[i] = b_ends[i] - start != sizes[i]
        if not differs[i]:
            for k in range(sizes[i]):
                if a[a_starts[i] + k] != b[start + k]:
                    differs[i] = True
                    break
        start = b_ends[i]


TOO_MANY = -2
"""What deal_to_rows returns in place of a column."""


@kernel
def deal_to_rows(rows, columns, values, first, table, at, ends, out_columns, out_values):
    """Put each value to its row, at the place `at` that moves on; the largest column comes back.

    `table` says which row the id `first + i` is, -1 for none. TOO_MANY comes back where a row would
    go beyond its end, or an id has no row.
    """
    largest = np.int64(-1)
    for i in range(len(rows)):
        place = rows[i] - first
        if place < 0 or place >= len(table) or table[place] < 0:
            return np.int64(TOO_MANY)
        row = table[place]
        place = at[row]
        if place >= ends[row]:
            return np.int64(TOO_MANY)
        at[row] = place + 1
        out_columns[place] = np.int32(columns[i])
        out_values[place] = values[i]
        largest = max(largest, np.int64(columns[i]))
    return largest


@inner
def _is_plain(indices, data, n_columns):
    """Whether all values of a row are counts from 1 to 2^24 - 1 in columns that exist.

    Nearly every row is. The loop has no branch, so that it is compiled to vector instructions.
    """
    n_columns = np.uint32(n_columns)
    low, high = data.dtype.type(1), data.dtype.type(_PLAIN)
    n = np.int32(0)
    for i in range(len(data)):
        v = data[i]
        inside = np.uint32(indices[i]) < n_columns
        n += np.int32((v >= low) & (v < high) & (np.trunc(v) == v) & inside)
    return n == len(data)


@inner
def _spread(indices, data, largest, slots, counts, scratch, bits):
    """Put the values of a row at their tokens: counts that share one are added up, zeros left out.

    Returns a fault (0: none) with its place in the row, and the number of values in unmatched columns.
    """
    none = np.uint32((len(bits) - 1) << 6)
    unmatched = 0
    repeated = -1
    for i in range(len(data)):
        v = data[i]
        if v == 0:
            continue
        # What is nearly always so, in as few tests as will do: NaN fails every comparison.
        if counts:
            fits = v > 0 and v <= largest and np.int64(v) == v
        else:
            fits = np.float32(v) > 0 and np.float32(v) < np.inf
        if not fits:
            return _fault(v, largest, counts), i, unmatched
        # A damaged file may point anywhere, and this loop reads without bounds checks.
        column = indices[i]
        if column < 0 or column >= len(slots):
            return NO_COLUMN, i, unmatched
        t = slots[column]
        if t == none:
            unmatched += 1
            continue
        bit = np.uint64(1) << np.uint64(t & np.uint32(63))
        word = bits[t >> np.uint32(6)]
        if word & bit:
            repeated = i
            scratch[t] += scratch.dtype.type(v)
        else:
            bits[t >> np.uint32(6)] = word | bit
            scratch[t] = scratch.dtype.type(v)
    if repeated >= 0 and not counts:
        return REPEATED, repeated, unmatched
    return 0, 0, unmatched


@inner
def _spread_plain(indices, data, slots, scratch, bits):
    """As `_spread`, for a row that `_is_plain`; of counts that share a token only the last is kept.

    Returns the number of values in unmatched columns.
    """
    # All unsigned: numba adds a test for negative places otherwise.
    none = np.uint32((len(bits) - 1) << 6)
    unmatched = np.uint32(0)
    for i in range(len(data)):
        t = slots[np.uint32(indices[i])]
        bits[t >> np.uint32(6)] |= np.uint64(1) << np.uint64(t & np.uint32(63))
        scratch[t] = scratch.dtype.type(data[i])
        unmatched += np.uint32(t == none)
    return np.int64(unmatched)


@inner
def _list_tokens(bits, tokens):
    """The tokens of a bit set in ascending order, which clears it; how many they are comes back.

    The last word of the set is that of unmatched columns. Tokens are read four at a time: words hold
    different numbers of them, and guessing each number wrong would take longer than the reading.
    """
    n = np.int64(0)
    for w in range(len(bits) - 1):
        word = bits[w]
        bits[w] = 0
        first = np.uint32(w << 6)
        end = n + count_ones(word)
        while n < end:
            for k in range(SLACK):
                tokens[n + k] = first + np.uint32(trailing_zeros(word))
                word &= word - np.uint64(1)
            n += SLACK
        n = end
    return n


@inner
def _fault(v, largest, counts):
    """What is wrong with a value that is not zero and does not fit."""
    if v != v:
        return NAN
    if v < 0:
        return NEGATIVE
    if v == np.inf:
        return INFINITE
    if not counts:
        return UNFIT
    return HUGE if v > largest else FRACTION

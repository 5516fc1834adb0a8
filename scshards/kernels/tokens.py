"""The compiled loops from CSR rows to tokens, as kernels.rows uses them.

A row goes in two steps: its values are put at their tokens in a dense scratch row, where a bit set
marks them (`spread`); then the bit set is read, which gives the tokens in ascending order
(`list_tokens`).
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.bits import count_ones, trailing_zeros
from scshards.kernels.cache import inner

NEGATIVE, NAN, INFINITE, FRACTION, HUGE, UNFIT, NO_COLUMN, REPEATED = 1, 2, 3, 4, 5, 6, 7, 8
"""Faults of a value; NO_COLUMN of its place, REPEATED of a float whose token is there already."""

SLACK = 4
"""`list_tokens` writes up to so many tokens behind the last."""

_PLAIN = 1 << 24
"""Below it a float32 holds every whole number, and sums of a row fit a float64."""


@inner
def is_plain(indices, data, n_columns):
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
def spread(indices, data, largest, slots, counts, scratch, bits):
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
def spread_plain(indices, data, slots, scratch, bits):
    """As `spread`, for a row that `is_plain`; of counts that share a token only the last is kept.

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
def list_tokens(bits, tokens):
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

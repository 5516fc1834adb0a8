"""The compiled loop behind cells.tokenizer: CSR rows to token rows. It releases the GIL."""

from __future__ import annotations

import numba as nb
import numpy as np

NEGATIVE, NAN, INFINITE, FRACTION, HUGE, UNFIT, NO_COLUMN = 1, 2, 3, 4, 5, 6, 7
"""Faults of a value; NO_COLUMN of its place."""


@nb.njit(nogil=True, cache=True)
def tokenize(indptr, indices, data, tokens, counts, scratch, bits, out_indptr, genes, values):
    """Rows of CSR to token rows; see tokenizer.tokenize_rows.

    `scratch` [tokens] of the output's dtype and `bits` (a zeroed bit set of the tokens) are work
    space. Returns a fault (0: none) with its row and its place in `data`, the number of values in
    unmatched columns, and the last row in which a token repeats (-1: none).
    """
    start = indptr[0]
    n = 0
    unmatched = 0
    repeated_row = -1
    out_indptr[0] = 0
    for row in range(len(indptr) - 1):
        for i in range(indptr[row] - start, indptr[row + 1] - start):
            v = data[i]
            if v == 0:
                continue
            if v != v:
                return NAN, row, i, unmatched, repeated_row
            if v < 0:
                return NEGATIVE, row, i, unmatched, repeated_row
            if v == np.inf:
                return INFINITE, row, i, unmatched, repeated_row
            if counts:
                if v >= 9.223372036854775e18:
                    return HUGE, row, i, unmatched, repeated_row
                if np.int64(v) != v:
                    return FRACTION, row, i, unmatched, repeated_row
            elif np.float32(v) == 0 or np.float32(v) == np.inf:
                return UNFIT, row, i, unmatched, repeated_row
            # A damaged file may point anywhere, and this loop reads without bounds checks.
            column = indices[i]
            if column < 0 or column >= len(tokens):
                return NO_COLUMN, row, i, unmatched, repeated_row
            t = tokens[column]
            if t < 0:
                unmatched += 1
                continue
            bit = np.uint64(1) << np.uint64(t & 63)
            word = bits[t >> 6]
            if word & bit:
                repeated_row = row
                scratch[t] += scratch.dtype.type(v)
            else:
                bits[t >> 6] = word | bit
                scratch[t] = scratch.dtype.type(v)
        for w in range(len(bits)):
            word = bits[w]
            if word == 0:
                continue
            bits[w] = 0
            base = w << 6
            while word:
                low = word & (~word + np.uint64(1))
                # Trailing zeros of `word`: the exponent of its lowest bit.
                t = base + exponent(low)
                genes[n] = t
                values[n] = scratch[t]
                n += 1
                word ^= low
        out_indptr[row + 1] = n
    return 0, 0, 0, unmatched, repeated_row


@nb.njit(nogil=True, inline="always")
def exponent(power):
    """log2 of a power of two, by counting the ones below it."""
    x = power - np.uint64(1)
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))

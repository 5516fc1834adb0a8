"""The compiled loop behind cells.tokenizer: CSR rows to token rows. It releases the GIL."""

from __future__ import annotations

import numba as nb
import numba.extending
import numpy as np

NEGATIVE, NAN, INFINITE, FRACTION, HUGE, UNFIT, NO_COLUMN = 1, 2, 3, 4, 5, 6, 7
"""Faults of a value; NO_COLUMN of its place."""


@nb.njit(nogil=True, cache=True)
def tokenize(
    indptr, indices, data, largest, tokens, counts, scratch, bits, out_indptr, genes, values
):
    """Rows of CSR to token rows; see tokenizer.tokenize_rows.

    `largest` is the largest count, a float for floats: compared so, it is exact. `scratch` [tokens] of
    the output's dtype and `bits` (a zeroed bit set of the tokens) are work space. Returns a fault (0:
    none) with its row and its place in `data`, the number of values in unmatched columns, and the last
    row in which a token repeats (-1: none).
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
            # What is nearly always so, in as few tests as will do: NaN fails every comparison.
            if counts:
                fits = v > 0 and v <= largest and np.int64(v) == v
            else:
                fits = np.float32(v) > 0 and np.float32(v) < np.inf
            if not fits:
                return _fault(v, largest, counts), row, i, unmatched, repeated_row
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
                t = base + trailing_zeros(word)
                genes[n] = t
                values[n] = scratch[t]
                n += 1
                word &= word - np.uint64(1)
        out_indptr[row + 1] = n
    return 0, 0, 0, unmatched, repeated_row


@nb.njit(nogil=True)
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


@nb.extending.intrinsic
def trailing_zeros(typing_context, word):
    """The place of the lowest set bit of a uint64, as int64; 64 when there is none.

    One instruction of the processor, which numba gives no other way to.
    """

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], context.get_constant(nb.types.boolean, 0))

    return nb.types.int64(nb.types.uint64), generate

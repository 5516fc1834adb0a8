"""Plain rows to members: counts from 1 to 2^24 - 1 in columns that exist, no two of one token.

Nearly every row is plain. Its counts are put at their tokens in a row of bytes, where 0 is no count and
LARGE stands for one of 128 or more, kept elsewhere; 64 of these bytes at a time become what a member
stores, gaps between tokens and counts. Called by kernels.rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.cache import inner
from scshards.kernels.members import GENES, VALUES
from scshards.kernels.tokens import count_ones, trailing_zeros
from scshards.kernels.vectors import LANES, can_take, clear, leading_zeros, marks, take
from scshards.kernels.writing import begin_member, write_bytes, write_head

LARGE = 128
_U64 = np.uint64


class PlainRow(NamedTuple):
    """Work space for one row at a time.

    Attributes
    ----------
    small
        uint8 [slots, a multiple of 64]: each token's count, or LARGE, between the two steps; else 0.
    wide
        int32 [slots]: counts of which `small` says LARGE.
    gaps, counts
        uint8: the row's gaps as varints, and a byte of each count.
    large
        int64 [tokens, 2]: the place in the row and the count, for each of 128 or more.
    """

    small: NDArray[np.uint8]
    wide: NDArray[np.int32]
    gaps: NDArray[np.uint8]
    counts: NDArray[np.uint8]
    large: NDArray[np.int64]


def plain_row(n_words: int) -> PlainRow:
    """Work space for tokens below 64 * n_words; the slot behind them is that of unmatched columns."""
    n = LANES * n_words
    return PlainRow(
        small=np.zeros(n + LANES, np.uint8),
        wide=np.zeros(n + LANES, np.int32),
        # A gap of 2^7 or more takes more bytes than one, but leaves out as many tokens.
        gaps=np.empty(n + 2 * LANES, np.uint8),
        counts=np.empty(n + 2 * LANES, np.uint8),
        large=np.empty((n, 2), np.int64),
    )


@inner
def spread_small(indices, data, slots, row):
    """Put the counts of a plain row at their tokens; how many are in unmatched columns comes back.

    Of counts that share a token only the last is kept.
    """
    small, wide = row.small, row.wide
    # All unsigned: numba adds a test for negative places otherwise.
    none = np.uint32(len(small) - LANES)
    unmatched = np.uint32(0)
    for i in range(len(data)):
        t = slots[np.uint32(indices[i])]
        count = np.int32(data[i])
        if count >= LARGE:
            wide[t] = count
            count = np.int32(LARGE)
        small[t] = np.uint8(count)
        unmatched += np.uint32(t == none)
    small[none] = 0
    return np.int64(unmatched)


@inner
def list_small(row):
    """Fill `gaps`, `counts` and `large` from `small`, which is cleared.

    Returns how many tokens there are, the bytes of their gaps, and how many counts are large.
    """
    small, gaps, counts, large = row.small, row.gaps, row.counts, row.large
    n = g = n_large = last = np.int64(0)
    for word in range((len(small) - LANES) // LANES):
        at = np.int64(word * LANES)
        mask, large_ones = marks(small, at)
        if mask == _U64(0):
            continue
        here = count_ones(mask)
        if can_take():
            take(small, at, mask, gaps, g, counts, n)
        else:
            _take_singly(small, at, mask, gaps, g, counts, n)
        # All gaps but the first are less than 64.
        gap = at + trailing_zeros(mask) - last
        last = at + np.int64(LANES - 1) - leading_zeros(mask)
        if gap < 128:
            gaps[g] = np.uint8(gap)
        else:
            more = _varint_bytes(gap) - 1
            for k in range(g + here - 1, g, -1):
                gaps[k + more] = gaps[k]
            g = _write_varint(gaps, g, gap) - 1
        g += here
        while large_ones:
            k = trailing_zeros(large_ones)
            before = mask & ((_U64(1) << _U64(k)) - _U64(1))
            large[n_large, 0], large[n_large, 1] = n + count_ones(before), row.wide[at + k]
            n_large += 1
            large_ones &= large_ones - _U64(1)
        clear(small, at)
        n += here
    return n, g, n_large


@inner
def sum_small(row, n, n_large):
    """The sum of the counts that `list_small` left, an exact whole number."""
    total = np.uint32(0)
    for i in range(n):
        total += np.uint32(row.counts[i])
    whole = np.int64(total)
    for k in range(n_large):
        whole += row.large[k, 1] - LARGE
    return whole


@inner
def write_small(out, p, row, n, n_gap_bytes, n_large, has_labels):
    """A member of what `list_small` left, without its labels; where it ends comes back."""
    size = n
    for k in range(n_large):
        size += _varint_bytes(row.large[k, 1]) - 1
    p = begin_member(out, p, n, has_labels)
    p = write_bytes(out, write_head(out, p, GENES, n_gap_bytes), row.gaps, 0, n_gap_bytes)
    p = write_head(out, p, VALUES, size)
    done = np.int64(0)
    for k in range(n_large):
        place = row.large[k, 0]
        p = write_bytes(out, p, row.counts, done, place)
        p = _write_varint(out, p, row.large[k, 1])
        done = place + 1
    return write_bytes(out, p, row.counts, done, n)


@inner
def _take_singly(small, at, mask, gaps, g, counts, n):
    """As `take`, for any processor; at most three bytes too many are written."""
    last = np.int64(0)
    end = n + count_ones(mask)
    while n < end:
        # Four at a time: guessing each number of them wrong would take longer than three too many.
        for k in range(4):
            place = trailing_zeros(mask) & np.int64(LANES - 1)
            gaps[g + k] = np.uint8(place - last)
            counts[n + k] = small[at + place]
            last = place
            mask &= mask - _U64(1)
        g += 4
        n += 4


@inner
def _varint_bytes(x):
    """Of a varint below 2^28."""
    return 1 if x < 1 << 7 else 2 if x < 1 << 14 else 3 if x < 1 << 21 else 4


@inner
def _write_varint(out, p, x):
    while x >= 128:
        out[p] = np.uint8(x & 127 | 128)
        p += 1
        x >>= 7
    out[p] = np.uint8(x)
    return p + 1

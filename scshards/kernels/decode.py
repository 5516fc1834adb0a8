"""Members -> arrays, many bytes at a time. Compiled; they release the GIL.

Nearly every varint of a cell is one byte long, so a vector of bytes without a continuation bit is as
many values; where there is one, it goes on byte by byte, as kernels.members does. Bounds and faults are
the same. Called by kernels.cells.
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.cache import inner
from scshards.kernels.members import BAD_COUNT, BAD_VARINT, ID_TOO_LARGE, OK, next_gene
from scshards.kernels.tokens import trailing_zeros
from scshards.kernels.vectors import COUNTS, GENES, sum_up, widen

LARGE = 100
"""Not a fault: a count that does not fit in 16 bits."""

_U64 = np.uint64


@inner
def read_genes(src, start, end, n, limit, out):
    """Delta LEB128 ids of src[start:end] into out[:n]; exactly n, ascending, below `limit`.

    What is behind out[:n] may be written to as well.
    """
    p, j = np.int64(start), np.int64(0)
    total = np.int64(0)
    while j < n:
        if p + GENES <= end and 0 < j <= len(out) - GENES:
            odd, last = sum_up(src, p, out, j, total)
            if odd == 0 and j + GENES <= n:
                total = last
                if total >= limit:
                    return ID_TOO_LARGE
                p += GENES
                j += GENES
                continue
            plain = min(trailing_zeros(_U64(odd)), min(n - j, GENES))
            if plain > 0:
                p += plain
                j += plain
                total = np.int64(out[j - 1])
                if total >= limit:
                    return ID_TOO_LARGE
                if j == n:
                    break
        total, p = next_gene(src, p, end, total, j == 0, limit)
        if p < 0:
            return -p
        out[j] = total
        j += 1
    return OK if p == end else BAD_COUNT


@inner
def read_small_counts(src, start, end, n, out):
    """LEB128 counts of src[start:end] into out[:n] (uint16); LARGE when one does not fit.

    What is behind out[:n] may be written to as well.
    """
    p, j = np.int64(start), np.int64(0)
    while j < n:
        if p + COUNTS <= end and j + COUNTS <= len(out):
            odd = widen(src, p, out, j)
            plain = COUNTS if odd == 0 else trailing_zeros(_U64(odd))
            if j + plain >= n:
                p += n - j
                break
            p += plain
            j += plain
            if odd == 0:
                continue
        if p >= end:
            return BAD_VARINT
        c = np.int64(src[p])
        p += 1
        if c >= 128:
            c &= 127
            shift = 7
            while True:
                if p >= end:
                    return BAD_VARINT
                if shift > 14:
                    return LARGE
                e = np.int64(src[p])
                p += 1
                c |= (e & 127) << shift
                shift += 7
                if e < 128:
                    break
            if c > 65535:
                return LARGE
        out[j] = c
        j += 1
    return OK if p == end else BAD_COUNT

"""Members -> arrays, eight bytes at a time, and the draws of the stream. Compiled; they release the GIL.

Nearly every varint of a cell is one byte long, so eight bytes without a continuation bit are eight
values; where there is one, it goes on byte by byte, as shards.kernels does. Bounds and faults are the
same. Called by stream.kernels.
"""

from __future__ import annotations

import numba as nb
import numba.extending
import numpy as np

from scshards.cells.kernels import count_ones, trailing_zeros
from scshards.shards.kernels import BAD_COUNT, BAD_VARINT, ID_TOO_LARGE, OK, next_gene

LARGE = 100
"""Not a fault: a count that does not fit in 16 bits."""

_U64, _U32 = np.uint64, np.uint32
_HIGH, _LOW = _U64(0x8080808080808080), _U64(0x0101010101010101)


@nb.extending.intrinsic
def load64(typing_context, array, at):
    """Eight bytes of a uint8 array from any place, little-endian, as a uint64; not checked."""

    def generate(context, builder, signature, arguments):
        from llvmlite import ir
        from numba.np.arrayobj import make_array

        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        loaded = builder.load(place)
        loaded.align = 1
        return loaded

    return nb.types.uint64(array, nb.types.int64), generate


@nb.njit(nogil=True, inline="always")
def mix32(x):
    """A 32-bit finalizer of low bias; the twin of base.seeds.mix32."""
    x = _U32(x)
    x = _U32(_U32(x ^ (x >> _U32(16))) * _U32(0x21F0AAAD))
    x = _U32(_U32(x ^ (x >> _U32(15))) * _U32(0xD35A2D97))
    return _U32(x ^ (x >> _U32(15)))


@nb.njit(nogil=True, inline="always")
def draw32(low, high, counter):
    """32 random bits of a key's two halves and a counter; the twin of base.seeds.draws32."""
    return mix32(_U32(mix32(_U32(_U32(counter) + low)) ^ high))


@nb.njit(nogil=True)
def read_genes(src, start, end, n, limit, out):
    """Delta LEB128 ids of src[start:end] into out[:n]; exactly n, ascending, below `limit`."""
    p, j = np.int64(start), np.int64(0)
    total = np.int64(0)
    while j < n:
        if p + 8 <= end and j > 0 and j + 8 <= n:
            word = load64(src, p)
            # No continuation bit, and no zero among the eight deltas.
            if (word & _HIGH) == 0 and ((word - _LOW) & _HIGH) == 0:
                for k in range(8):
                    total += np.int64(word & _U64(255))
                    word >>= _U64(8)
                    out[j + k] = total
                if total >= limit:
                    return ID_TOO_LARGE
                p += 8
                j += 8
                continue
        total, p = next_gene(src, p, end, total, j == 0, limit)
        if p < 0:
            return -p
        out[j] = total
        j += 1
    return OK if p == end else BAD_COUNT


@nb.njit(nogil=True)
def read_small_counts(src, start, end, n, out):
    """LEB128 counts of src[start:end] into out[:n] (uint16); LARGE when one does not fit."""
    p, j = np.int64(start), np.int64(0)
    while j < n:
        if p + 8 <= end and j + 8 <= n and (load64(src, p) & _HIGH) == 0:
            for k in range(8):
                out[j + k] = src[p + k]
            p += 8
            j += 8
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


@nb.njit(nogil=True)
def choose(n, k, key, bits, hits):
    """Mark k of n positions in the bit set `bits`, each set of k with the same chance; k < n.

    Every position is taken by a draw of its own with the chance k/n; then positions drawn at random
    are given back, or taken, until there are k. Given how many the first draws took, each set of as many
    was as likely, and stays so. `hits` (uint8) has room for n rounded up to 64.
    """
    low, high = _U32(key & _U64(0xFFFFFFFF)), _U32(key >> _U64(32))
    limit = _U32((_U64(k) << _U64(32)) // _U64(n))
    for j in range(n):
        hits[j] = draw32(low, high, j) < limit
    words = (n + 63) >> 6
    hits[n : words << 6] = 0
    count = np.int64(0)
    for w in range(words):
        word = _U64(0)
        for t in range(8):
            # Eight bytes of 0 or 1 to eight bits, by a multiplication that puts each in its place.
            eight = (load64(hits, (w << 6) + 8 * t) * _U64(0x0102040810204080)) >> _U64(56)
            word |= eight << _U64(8 * t)
        bits[w] = word
        count += count_ones(word)
    i = np.int64(n)
    while count != k:
        r = np.int64((_U64(draw32(low, high, i)) * _U64(n)) >> _U64(32))
        i += 1
        bit = _U64(1) << _U64(r & 63)
        is_taken = (bits[r >> 6] & bit) != 0
        if is_taken == (count > k):
            bits[r >> 6] ^= bit
            count += -1 if is_taken else 1


@nb.njit(nogil=True)
def take(bits, n, out):
    """The marked positions in order into `out`; how many."""
    k = 0
    for w in range((n + 63) >> 6):
        word = bits[w]
        while word:
            out[k] = (w << 6) + trailing_zeros(word)
            k += 1
            word &= word - _U64(1)
    return k

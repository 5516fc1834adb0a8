"""Members -> arrays, many bytes at a time. Compiled; they release the GIL.

Nearly every varint of a cell is one byte long, so a vector of bytes without a continuation bit is as
many values; where there is one, it goes on byte by byte, as shards.kernels does. Bounds and faults are
the same. numba has no vectors, so `sum_up` and `widen` are written in the compiler's own terms (LLVM),
which fit any processor. Called by stream.kernels.
"""

from __future__ import annotations

import numba as nb
import numba.extending
import numpy as np

from scshards.cells.kernels import trailing_zeros
from scshards.shards.kernels import BAD_COUNT, BAD_VARINT, ID_TOO_LARGE, OK, next_gene

LARGE = 100
"""Not a fault: a count that does not fit in 16 bits."""

GENES, COUNTS = 16, 32
"""Bytes that `sum_up` and `widen` take at a time."""

_U64 = np.uint64


@nb.njit(nogil=True)
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


@nb.njit(nogil=True)
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


@nb.extending.intrinsic
def sum_up(typing_context, src, p, out, j, total):
    """total + src[p], + src[p + 1], ... into out[j:j + GENES] (int32); nothing is checked.

    Returns a bit for each byte that is 0 or has a continuation bit, and the last sum. The sums are right
    up to the first such byte.
    """

    def generate(context, builder, signature, arguments):
        from llvmlite import ir

        src, p, out, j, total = arguments
        bytes_ = _load(context, builder, signature.args[0], src, p, GENES)
        zeros = ir.Constant(bytes_.type, [0] * GENES)
        odd = builder.or_(
            builder.icmp_signed("<", bytes_, zeros), builder.icmp_signed("==", bytes_, zeros)
        )
        wide = ir.VectorType(ir.IntType(32), GENES)
        none = ir.Constant(wide, [0] * GENES)
        sums = builder.zext(bytes_, wide)
        step = 1
        while step < GENES:
            # Each lane adds what the lane `step` before it holds; the first ones add a zero.
            lanes = [i - step if i >= step else GENES for i in range(GENES)]
            shifted = builder.shuffle_vector(sums, none, _lanes(lanes))
            sums = builder.add(sums, shifted)
            step *= 2
        # The next call waits for this sum alone, not for the vector that is stored.
        own = builder.extract_element(sums, ir.Constant(ir.IntType(32), GENES - 1))
        last = builder.add(total, builder.zext(own, ir.IntType(64)))
        first = builder.insert_element(
            none, builder.trunc(total, ir.IntType(32)), ir.Constant(ir.IntType(32), 0)
        )
        sums = builder.add(sums, builder.shuffle_vector(first, none, _lanes([0] * GENES)))
        _store(context, builder, signature.args[2], out, j, sums)
        found = [_mask(builder, odd, GENES), last]
        return context.make_tuple(builder, signature.return_type, found)

    pair = nb.types.UniTuple(nb.types.int64, 2)
    return pair(src, nb.types.int64, out, nb.types.int64, nb.types.int64), generate


@nb.extending.intrinsic
def widen(typing_context, src, p, out, j):
    """src[p:p + COUNTS] into out[j:j + COUNTS] (uint16); a bit for each byte with a continuation bit."""

    def generate(context, builder, signature, arguments):
        from llvmlite import ir

        src, p, out, j = arguments
        bytes_ = _load(context, builder, signature.args[0], src, p, COUNTS)
        odd = builder.icmp_signed("<", bytes_, ir.Constant(bytes_.type, [0] * COUNTS))
        wide = builder.zext(bytes_, ir.VectorType(ir.IntType(16), COUNTS))
        _store(context, builder, signature.args[2], out, j, wide)
        return _mask(builder, odd, COUNTS)

    return nb.types.int64(src, nb.types.int64, out, nb.types.int64), generate


def _load(context, builder, kind, array, at, lanes):
    """`lanes` bytes of a uint8 array from a place on."""
    from llvmlite import ir

    return _unaligned(builder.load(_place(context, builder, kind, array, at, ir.IntType(8), lanes)))


def _store(context, builder, kind, array, at, values):
    """Put a vector into an array from a place on."""
    place = _place(context, builder, kind, array, at, values.type.element, values.type.count)
    _unaligned(builder.store(values, place))


def _place(context, builder, kind, array, at, element, lanes):
    from llvmlite import ir
    from numba.np.arrayobj import make_array

    data = make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), ir.VectorType(element, lanes).as_pointer())


def _unaligned(instruction):
    instruction.align = 1
    return instruction


def _lanes(places):
    from llvmlite import ir

    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)


def _mask(builder, flags, lanes):
    from llvmlite import ir

    return builder.zext(builder.bitcast(flags, ir.IntType(lanes)), ir.IntType(64))

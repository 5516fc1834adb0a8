"""Compiled loops that read shard bytes: varints, members. They release the GIL.

Called by shards.members, shards.tar and shards.chunks (which turn status codes into errors), by stream's
and pack's kernels, shards.spill, packing.verify.shard and exporting.order. What writes these bytes is
in kernels.writing. Every reader here takes explicit bounds and returns a status instead of reading past
them, so that hostile bytes end in an error code. Format 1 is specified in docs/format.md.
"""

from __future__ import annotations

import numba as nb
import numba.extending
import numpy as np
from numba.core import cgutils
from numpy.typing import NDArray

from scshards.kernels.bits import trailing_zeros
from scshards.kernels.cache import inlined, inner, kernel
from scshards.kernels.vectors import SUMMED, sum_up

OK = 0
BAD_STRUCTURE = 1
BAD_VARINT = 2
BAD_ORDER = 3
ID_TOO_LARGE = 4
BAD_COUNT = 5
BAD_VALUE = 6
LARGE = 100
"""Not a fault: a count that does not fit where it was to go."""

MEMBER_FIELDS = 6
"""What `parse_member` fills: n, genes start and end, values start and end, labels start (or -1)."""

_BLOCK = 64
_U8, _U64 = np.uint8, np.uint64

# The field names of a member as msgpack strings.
N = np.frombuffer(b"\xa1n", np.uint8)
GENES = np.frombuffer(b"\xa5genes", np.uint8)
VALUES = np.frombuffer(b"\xa6values", np.uint8)
LABELS = np.frombuffer(b"\xa6labels", np.uint8)


def read_only(src: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A view that can't be written to: kernels are compiled for such, and once again for others."""
    view = src.view()
    view.flags.writeable = False
    return view


@kernel
def parse_member(src, start, end, out):
    """Find the fields of a member in src[start:end] and put them in `out`; returns a status."""
    p = start
    if end > len(src) or start < 0 or p + 3 > end:
        return BAD_STRUCTURE
    head = src[p]
    if head != 0x83 and head != 0x84:
        return BAD_STRUCTURE
    p = _match(src, p + 1, end, N)
    if p < 0:
        return BAD_STRUCTURE
    n, p = _read_uint(src, p, end)
    if p < 0:
        return BAD_STRUCTURE
    out[0] = n
    p = _match(src, p, end, GENES)
    if p < 0:
        return BAD_STRUCTURE
    a, b = _read_bin(src, p, end)
    if a < 0:
        return BAD_STRUCTURE
    out[1], out[2] = a, b
    p = _match(src, b, end, VALUES)
    if p < 0:
        return BAD_STRUCTURE
    a, b = _read_bin(src, p, end)
    if a < 0:
        return BAD_STRUCTURE
    out[3], out[4] = a, b
    out[5] = -1
    if head == 0x84:
        p = _match(src, b, end, LABELS)
        if p < 0:
            return BAD_STRUCTURE
        out[5] = p
    elif b != end:
        return BAD_STRUCTURE
    # Each gene takes a byte or more, so this bounds n before anything is allocated for it.
    if n > out[2] - out[1]:
        return BAD_COUNT
    return OK


@kernel
def decode_genes(src, start, end, n, limit, out):
    """Delta LEB128 ids of src[start:end] into out[:n] (int32); exactly n, ascending, below `limit`.

    Nearly every varint is one byte long, so a vector of bytes without a continuation bit is as many ids.
    What is behind out[:n] may be written to as well.
    """
    p, total, j = np.int64(start), np.int64(0), np.int64(0)
    while j < n:
        if p + SUMMED <= end and 0 < j <= len(out) - SUMMED:
            odd, last = sum_up(src, p, out, j, total)
            plain = np.int64(SUMMED)
            if odd != 0 or j + SUMMED > n:
                plain = min(trailing_zeros(_U64(odd)), SUMMED, n - j)
                last = np.int64(np.uint32(out[j + plain - 1]))
            p += plain
            j += plain
            if plain > 0:
                total = last
            if total >= limit:
                return ID_TOO_LARGE
            if plain == SUMMED or j == n:
                continue
        gap, p = _read_varint(src, p, end, 28)
        if p < 0:
            return BAD_VARINT
        if gap == 0 and j > 0:
            return BAD_ORDER
        total += np.int64(gap)
        if total >= limit:
            return ID_TOO_LARGE
        out[j] = total
        j += 1
    return OK if p == end else BAD_COUNT


@kernel
def decode_counts(src, start, end, n, out):
    """LEB128 counts of src[start:end] into out[:n], exactly n; LARGE when one does not fit its dtype.

    Blocks that hold a byte each are copied by vector instructions, which a loop without branches
    is compiled to.
    """
    p, j = np.int64(start), np.int64(0)
    while j < n:
        if n - j >= _BLOCK and end - p >= _BLOCK:
            # The uppermost bit says that there is more than a byte, or (of byte - 1) that it is a zero.
            odd, q, o = _U8(0), _U64(p), _U64(j)
            for k in range(_BLOCK):
                byte = src[q + _U64(k)]
                odd = _U8(odd | byte | _U8(byte - _U8(1)))
                out[o + _U64(k)] = byte
            if odd < _U8(128):
                p += _BLOCK
                j += _BLOCK
                continue
        # On to the next count that is longer, or to as many as were looked at.
        for _ in range(_BLOCK):
            if j == n or p >= end:
                break
            byte = src[_U64(p)]
            if _U8(byte - _U8(1)) >= _U8(127):
                break
            out[_U64(j)] = byte
            p += 1
            j += 1
        else:
            continue
        if j == n:
            break
        c, p = _read_varint(src, p, end, 63)
        if p < 0:
            return BAD_VARINT
        if c == 0:
            return BAD_VALUE
        out[j] = c
        if _U64(out[j]) != c:
            return LARGE
        j += 1
    return OK if p == end else BAD_COUNT


@inlined
def _read_varint(src, p, end, most):
    """The number at src[p] (uint64), and where it ends: -1 if it is cut short, overlong or too long.

    Its last seven bits are shifted by `most` at most.
    """
    if p >= end:
        return _U64(0), np.int64(-1)
    value = _U64(src[p])
    p += 1
    if value >= 128:
        value &= _U64(127)
        shift = 7
        while True:
            if p >= end or shift > most:
                return _U64(0), np.int64(-1)
            byte = _U64(src[p])
            p += 1
            if shift == 63 and byte > 1:
                return _U64(0), np.int64(-1)
            value |= (byte & _U64(127)) << _U64(shift)
            shift += 7
            if byte < 128:
                break
        if byte == 0:
            return _U64(0), np.int64(-1)
    return value, np.int64(p)


@kernel
def measure_members(src, starts, sizes, fields, status):
    """Parse the members at src[starts[i]:starts[i] + sizes[i]] into fields [cells, 6] and status."""
    for i in range(len(starts)):
        status[i] = parse_member(src, starts[i], starts[i] + sizes[i], fields[i])


@kernel
def decode_members(src, fields, indptr, n_tokens, genes, counts, status):
    """The genes, and the counts unless that is empty, of members whose status is 0."""
    for i in range(len(fields)):
        if status[i] != 0:
            continue
        f = fields[i]
        a, b = indptr[i], indptr[i + 1]
        status[i] = decode_genes(src, f[1], f[2], f[0], n_tokens, genes[a:b])
        if status[i] == 0 and len(counts) > 0:
            status[i] = decode_counts(src, f[3], f[4], f[0], counts[a:b])


@nb.extending.intrinsic
def copy_bytes(typing_context, src, start, size, out, at):
    """Copy `size` bytes from byte `start` of one contiguous array to byte `at` of another.

    They may be one array and overlap; nothing is checked here. Of slices of 600 bytes, two to three
    times as fast as a loop by words; and what numba makes of views would load half of its compiler
    with a kept kernel.
    """

    def generate(context, builder, signature, arguments):
        from numba.np.arrayobj import make_array

        src, start, size, out, at = arguments
        places = []
        for kind, array, place in ((signature.args[0], src, start), (signature.args[3], out, at)):
            first = make_array(kind)(context, builder, array).data
            first = builder.bitcast(first, cgutils.voidptr_t)
            places.append(cgutils.pointer_add(builder, first, place))
        cgutils.raw_memmove(builder, places[1], places[0], size, itemsize=1)
        return context.get_dummy_value()

    place = nb.types.intp
    return nb.types.void(src, place, place, out, place), generate


@kernel
def gather_slices(src, starts, sizes, order, out):
    """Copy the slices src[starts[i]:starts[i] + sizes[i]] one after another, in `order`."""
    p = 0
    for k in range(len(order)):
        i = order[k]
        copy_bytes(src, starts[i], sizes[i], out, p)
        p += sizes[i]
    return p


@inner
def _read_uint(src, p, end):
    """A msgpack unsigned integer in its shortest form; (value, next) or (0, -1)."""
    if p >= end:
        return np.int64(0), np.int64(-1)
    head = src[p]
    if head < 128:
        return np.int64(head), np.int64(p + 1)
    width = 0
    if head == 0xCC:
        width = 1
    elif head == 0xCD:
        width = 2
    elif head == 0xCE:
        width = 4
    if width == 0 or p + 1 + width > end:
        return np.int64(0), np.int64(-1)
    value = np.int64(0)
    for k in range(width):
        value = (value << 8) | np.int64(src[p + 1 + k])
    if value < 128 or (width > 1 and value >> (4 * width) == 0):
        return np.int64(0), np.int64(-1)
    return value, np.int64(p + 1 + width)


@inner
def _match(src, p, end, name):
    """Step over an expected field name; -1 when something else stands there."""
    if p + len(name) > end:
        return np.int64(-1)
    for k in range(len(name)):
        if src[p + k] != name[k]:
            return np.int64(-1)
    return np.int64(p + len(name))


@inner
def _read_bin(src, p, end):
    """Bounds of the bytes of a msgpack bin whose head is as short as can be, or (-1, -1)."""
    if p >= end:
        return np.int64(-1), np.int64(-1)
    width = 0
    if src[p] == 0xC4:
        width = 1
    elif src[p] == 0xC5:
        width = 2
    elif src[p] == 0xC6:
        width = 4
    if width == 0 or p + 1 + width > end:
        return np.int64(-1), np.int64(-1)
    size = np.int64(0)
    for k in range(width):
        size = (size << 8) | np.int64(src[p + 1 + k])
    a = p + 1 + width
    if a + size > end or (width > 1 and size >> (4 * width) == 0):
        return np.int64(-1), np.int64(-1)
    return np.int64(a), np.int64(a + size)

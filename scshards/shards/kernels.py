"""Compiled loops over shard bytes: varints, members, tar headers. They release the GIL.

Called by shards.codec and shards.tar (which turn status codes into errors) and by stream's kernels.
Every reader here takes explicit bounds and returns a status instead of reading past them, so that
hostile bytes end in an error code. Format 1 is specified in docs/format.md.
"""

from __future__ import annotations

import numba as nb
import numpy as np

OK = 0
BAD_STRUCTURE = 1
BAD_VARINT = 2
BAD_ORDER = 3
ID_TOO_LARGE = 4
BAD_COUNT = 5

MEMBER_FIELDS = 6
"""What `parse_member` fills: n, genes start and end, values start and end, labels start (or -1)."""

_U64 = np.uint64
_GOLDEN = _U64(0x9E3779B97F4A7C15)

# The field names of a member as msgpack strings.
_N = np.frombuffer(b"\xa1n", np.uint8)
_GENES = np.frombuffer(b"\xa5genes", np.uint8)
_VALUES = np.frombuffer(b"\xa6values", np.uint8)
_LABELS = np.frombuffer(b"\xa6labels", np.uint8)


@nb.njit(nogil=True, inline="always")
def mix64(x):
    """The SplitMix64 finalizer; the twin of base.seeds.mix64."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


@nb.njit(nogil=True, inline="always")
def draw(key, counter):
    """64 random bits; the twin of base.seeds.draws."""
    return mix64(key + (_U64(counter) + _U64(1)) * _GOLDEN)


@nb.njit(nogil=True, cache=True)
def parse_member(src, start, end, out):
    """Find the fields of a member in src[start:end] and put them in `out`; returns a status."""
    p = start
    if end > len(src) or start < 0 or p + 3 > end:
        return BAD_STRUCTURE
    head = src[p]
    if head != 0x83 and head != 0x84:
        return BAD_STRUCTURE
    p = _match(src, p + 1, end, _N)
    if p < 0:
        return BAD_STRUCTURE
    n, p = _read_uint(src, p, end)
    if p < 0:
        return BAD_STRUCTURE
    out[0] = n
    p = _match(src, p, end, _GENES)
    if p < 0:
        return BAD_STRUCTURE
    a, b = _read_bin(src, p, end)
    if a < 0:
        return BAD_STRUCTURE
    out[1], out[2] = a, b
    p = _match(src, b, end, _VALUES)
    if p < 0:
        return BAD_STRUCTURE
    a, b = _read_bin(src, p, end)
    if a < 0:
        return BAD_STRUCTURE
    out[3], out[4] = a, b
    out[5] = -1
    if head == 0x84:
        p = _match(src, b, end, _LABELS)
        if p < 0:
            return BAD_STRUCTURE
        out[5] = p
    elif b != end:
        return BAD_STRUCTURE
    # Each gene takes a byte or more, so this bounds n before anything is allocated for it.
    if n > out[2] - out[1]:
        return BAD_COUNT
    return OK


@nb.njit(nogil=True, cache=True)
def decode_genes(src, start, end, n, limit, out):
    """Delta LEB128 ids of src[start:end] into out[:n]; exactly n, ascending, below `limit`."""
    p = start
    total = np.int64(-1)
    for j in range(n):
        if p >= end:
            return BAD_VARINT
        c = np.int64(src[p])
        p += 1
        if c >= 128:
            c &= 127
            shift = 7
            while True:
                if p >= end or shift > 28:
                    return BAD_VARINT
                e = np.int64(src[p])
                p += 1
                c |= (e & 127) << shift
                shift += 7
                if e < 128:
                    break
        if j == 0:
            total = c
        else:
            if c == 0:
                return BAD_ORDER
            total += c
        if total >= limit:
            return ID_TOO_LARGE
        out[j] = total
    return OK if p == end else BAD_COUNT


@nb.njit(nogil=True, cache=True)
def decode_counts(src, start, end, n, out):
    """LEB128 counts of src[start:end] into out[:n] (any numeric dtype); exactly n."""
    p = start
    for j in range(n):
        if p >= end:
            return BAD_VARINT
        c = _U64(src[p])
        p += 1
        if c >= 128:
            c &= _U64(127)
            shift = 7
            while True:
                if p >= end or shift > 63:
                    return BAD_VARINT
                e = _U64(src[p])
                p += 1
                if shift == 63 and e > 1:
                    return BAD_VARINT
                c |= (e & _U64(127)) << _U64(shift)
                shift += 7
                if e < 128:
                    break
        out[j] = c
    return OK if p == end else BAD_COUNT


@nb.njit(nogil=True, cache=True)
def encode_members(
    indptr, genes, counts, raw, label_names, name_ends, codes, numbers, is_number, out, ends
):
    """Write one member per row into `out`; ends[i] is where row i ends. Returns the bytes written.

    Values come from `counts` (uint64, LEB128) or, when that is empty, from `raw` (uint8, four bytes a
    value, as they are to be stored). `label_names` holds the columns' names as msgpack strings.
    """
    p = 0
    n_labels = len(name_ends)
    as_counts = len(counts) > 0
    for row in range(len(indptr) - 1):
        a, b = indptr[row], indptr[row + 1]
        out[p] = 0x84 if n_labels else 0x83
        p = _write_name(out, p + 1, _N)
        p = _write_uint(out, p, _U64(b - a))
        size = 0
        previous = np.int64(0)
        for j in range(a, b):
            size += _varint_size(_U64(genes[j] - previous))
            previous = genes[j]
        p = _write_name(out, p, _GENES)
        p = _write_bin_head(out, p, size)
        previous = np.int64(0)
        for j in range(a, b):
            p = _write_varint(out, p, _U64(genes[j] - previous))
            previous = genes[j]
        p = _write_name(out, p, _VALUES)
        if as_counts:
            size = 0
            for j in range(a, b):
                size += _varint_size(counts[j])
            p = _write_bin_head(out, p, size)
            for j in range(a, b):
                p = _write_varint(out, p, counts[j])
        else:
            p = _write_bin_head(out, p, 4 * (b - a))
            for j in range(4 * a, 4 * b):
                out[p] = raw[j]
                p += 1
        if n_labels:
            p = _write_name(out, p, _LABELS)
            if n_labels < 16:
                out[p] = 0x80 | n_labels
                p += 1
            else:
                out[p] = 0xDE
                out[p + 1] = n_labels >> 8
                out[p + 2] = n_labels & 255
                p += 3
            q = 0
            for c in range(n_labels):
                while q < name_ends[c]:
                    out[p] = label_names[q]
                    p += 1
                    q += 1
                if is_number[c]:
                    # Eight bytes, most significant first, of the float64's bit pattern.
                    out[p] = 0xCB
                    bitsof = numbers[row, c]
                    for k in range(8):
                        out[p + 1 + k] = (bitsof >> _U64(56 - 8 * k)) & _U64(255)
                    p += 9
                elif codes[row, c] < 0:
                    out[p] = 0xFF  # -1, a missing value
                    p += 1
                else:
                    p = _write_uint(out, p, _U64(codes[row, c]))
        ends[row] = p
    return p


@nb.njit(nogil=True, cache=True)
def write_tar(payload, starts, sizes, template, digits_at, sources, rows, out, offsets):
    """Tar members for the payloads payload[starts[i]:starts[i] + sizes[i]], in order, into `out`.

    `template` is a 512-byte header with zero digits in the name (from `digits_at`), size and
    checksum fields. offsets[i] becomes where the data of member i begins. Returns the bytes written.
    """
    p = 0
    for i in range(len(starts)):
        head = p
        out[head : head + 512] = template
        _write_digits(out, head + digits_at, 6, sources[i], 10)
        _write_digits(out, head + digits_at + 7, 10, rows[i], 10)
        _write_digits(out, head + 124, 11, sizes[i], 8)
        total = 0
        for k in range(512):
            total += out[head + k]
        # The checksum is over the header with eight spaces in the checksum field.
        for k in range(148, 156):
            total += 32 - np.int64(out[head + k])
        _write_digits(out, head + 148, 6, total, 8)
        out[head + 154] = 0
        out[head + 155] = 32
        p += 512
        offsets[i] = p
        copy_bytes(payload, starts[i], sizes[i], out, p)
        p += sizes[i]
        while p % 512:
            out[p] = 0
            p += 1
    return p


@nb.njit(nogil=True)
def copy_bytes(src, start, size, out, at):
    """out[at:at + size] = src[start:start + size]; in one array, `at` may not lie after `start`.

    Eight bytes at a time: measured, three times as fast as numba's own copy of a slice.
    """
    words = size >> 3
    wide_src = src[start : start + 8 * words].view(np.uint64)
    wide_out = out[at : at + 8 * words].view(np.uint64)
    for k in range(words):
        wide_out[k] = wide_src[k]
    for k in range(8 * words, size):
        out[at + k] = src[start + k]


@nb.njit(nogil=True)
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
    return value, np.int64(p + 1 + width)


@nb.njit(nogil=True)
def _match(src, p, end, name):
    """Step over an expected field name; -1 when something else stands there."""
    if p + len(name) > end:
        return np.int64(-1)
    for k in range(len(name)):
        if src[p + k] != name[k]:
            return np.int64(-1)
    return np.int64(p + len(name))


@nb.njit(nogil=True)
def _read_bin(src, p, end):
    """Bounds of a msgpack bin's bytes, or (-1, -1)."""
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
    if a + size > end:
        return np.int64(-1), np.int64(-1)
    return np.int64(a), np.int64(a + size)


@nb.njit(nogil=True, inline="always")
def _varint_size(x):
    size = 1
    while x >= 128:
        x >>= _U64(7)
        size += 1
    return size


@nb.njit(nogil=True, inline="always")
def _write_varint(out, p, x):
    while x >= 128:
        out[p] = np.uint8(x & _U64(127)) | np.uint8(128)
        p += 1
        x >>= _U64(7)
    out[p] = np.uint8(x)
    return p + 1


@nb.njit(nogil=True)
def _write_uint(out, p, x):
    """A msgpack unsigned integer in its shortest form."""
    if x < 128:
        out[p] = x
        return p + 1
    width = 1 if x < 256 else 2 if x < 65536 else 4 if x < 4294967296 else 8
    out[p] = 0xCC if width == 1 else 0xCD if width == 2 else 0xCE if width == 4 else 0xCF
    for k in range(width):
        out[p + 1 + k] = (x >> _U64(8 * (width - 1 - k))) & _U64(255)
    return p + 1 + width


@nb.njit(nogil=True)
def _write_bin_head(out, p, size):
    width = 1 if size < 256 else 2 if size < 65536 else 4
    out[p] = 0xC4 if width == 1 else 0xC5 if width == 2 else 0xC6
    for k in range(width):
        out[p + 1 + k] = (size >> (8 * (width - 1 - k))) & 255
    return p + 1 + width


@nb.njit(nogil=True)
def _write_name(out, p, name):
    for k in range(len(name)):
        out[p + k] = name[k]
    return p + len(name)


@nb.njit(nogil=True)
def _write_digits(out, p, width, value, base):
    for k in range(width - 1, -1, -1):
        out[p + k] = 48 + value % base
        value //= base

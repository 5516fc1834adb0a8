"""Compiled loops that write shard bytes: members, their labels, tar headers. They release the GIL.

Called by shards.members, shards.tar and kernels.rows. Format 1 is specified in docs/format.md.
"""

from __future__ import annotations

import numba as nb
import numba.extending
import numpy as np

from scshards.kernels.cache import inner, kernel
from scshards.kernels.members import GENES, LABELS, VALUES, N, copy_bytes

MEMBER_BOUND = 64
"""A member takes less than this beside its labels, genes (5 bytes each) and values (10 bytes each)."""

SOURCE_DIGITS, ROW_DIGITS = 6, 10
"""Of a cell's key, as cells.batch.format_key spells it; a dash is between them."""

_CHUNK = 64
_U64 = np.uint64


@kernel
def encode_members(indptr, genes, values, labels, label_ends, out, ends):
    """Write one member per row into `out`; ends[i] is where row i ends. Returns the bytes written.

    `labels` holds the rows' labels one after another, as `encode_labels` writes them.
    """
    p = np.int64(0)
    start = 0
    for row in range(len(indptr) - 1):
        a, b = indptr[row], indptr[row + 1]
        p = begin_member(out, p, b - a, label_ends[row] > start)
        p = write_genes(out, p, genes[a:b])
        p = write_values(out, p, values[a:b])
        p = write_labels(out, p, labels[start : label_ends[row]])
        ends[row] = p
        start = label_ends[row]
    return p


@kernel
def encode_labels(names, name_ends, codes, numbers, is_number, out, ends):
    """The labels of each row as a msgpack map into `out`; ends[i] is where row i's map ends.

    `names` holds the columns' names as msgpack strings, `numbers` the bit patterns of float64.
    """
    p = np.int64(0)
    n_labels = codes.shape[1]
    for row in range(len(codes)):
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
            p = _write_name(out, p, names[q : name_ends[c]])
            q = name_ends[c]
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


@inner
def begin_member(out, p, n, has_labels):
    """The head of a member of n genes; where it ends comes back, as from all writers here."""
    out[p] = 0x84 if has_labels else 0x83
    p = _write_name(out, p + 1, N)
    return _write_uint(out, p, _U64(n))


@inner
def write_genes(out, p, genes):
    """The field of the ids, ascending integers."""
    p = _write_name(out, p, GENES)
    # How long the head is depends on the bytes behind it: written for the fewest, and once again
    # where they are more.
    size, width = len(genes), _bin_head(len(genes))
    while True:
        q = _U64(p + width)
        previous = np.uint32(0)
        for j in range(len(genes)):
            delta = np.uint32(genes[j]) - previous
            previous = np.uint32(genes[j])
            while delta >= np.uint32(128):
                out[q] = np.uint8(delta) | np.uint8(128)
                q += _U64(1)
                delta >>= np.uint32(7)
            out[q] = np.uint8(delta)
            q += _U64(1)
        size = np.int64(q) - (p + width)
        if _bin_head(size) == width:
            break
        width = _bin_head(size)
    _write_bin_head(out, p, size)
    return p + width + size


@inner
def write_values(out, p, values):
    """The field of the values: counts (uint64) as varints, float32 as they are."""
    p = _write_name(out, p, VALUES)
    size, width = len(values), _bin_head(len(values))
    while True:
        q = p + width
        for j in range(0, len(values), _CHUNK):
            q = write_chunk(out, q, values[j : j + _CHUNK])
        size = q - (p + width)
        if _bin_head(size) == width:
            break
        width = _bin_head(size)
    _write_bin_head(out, p, size)
    return p + width + size


@inner
def write_labels(out, p, labels):
    """The field of labels that `encode_labels` wrote; nothing where there are none."""
    if len(labels) == 0:
        return p
    p = _write_name(out, p, LABELS)
    copy_bytes(labels, 0, len(labels), out, p)
    return p + len(labels)


def write_chunk(out, p, values):
    """Some values as they are stored: counts (uint64) as varints, float32 little-endian."""
    return (_write_floats if values.dtype.kind == "f" else _write_counts)(out, p, values)


@nb.extending.overload(write_chunk)
def _write_chunk(out, p, values):
    return _write_floats if isinstance(values.dtype, nb.types.Float) else _write_counts


def _write_floats(out, p, values):
    copy_bytes(values, 0, 4 * len(values), out, p)
    return p + 4 * len(values)


def _write_counts(out, p, values):
    bits = _U64(0)
    for k in range(len(values)):
        bits |= values[k]
    if bits < _U64(128):
        # A byte each, as nearly always: loops without branches are compiled to vector instructions.
        bytes_ = out[p : p + len(values)]
        for k in range(len(values)):
            bytes_[k] = np.uint8(values[k])
        return p + len(values)
    q = _U64(p)
    for k in range(len(values)):
        value = values[k]
        while value >= _U64(128):
            out[q] = np.uint8(value) | np.uint8(128)
            q += _U64(1)
            value >>= _U64(7)
        out[q] = np.uint8(value)
        q += _U64(1)
    return np.int64(q)


@kernel
def write_members(payload, starts, sizes, template, sources, rows, out, offsets):
    """Tar members of the payloads payload[starts[i]:starts[i] + sizes[i]], data at offsets[i] of `out`.

    `template` is a 512-byte header with zero digits in the name, size and checksum fields. Headers and
    the zeros after the data are written too.
    """
    # The checksum is over the header with eight spaces in the checksum field; a digit adds its value.
    base = np.int64(0)
    for k in range(512):
        base += 32 if 148 <= k < 156 else np.int64(template[k])
    for i in range(len(starts)):
        p = offsets[i] - 512
        copy_bytes(template, 0, 512, out, p)
        total = base + _write_digits(out, p, SOURCE_DIGITS, sources[i], 10)
        total += _write_digits(out, p + SOURCE_DIGITS + 1, ROW_DIGITS, rows[i], 10)
        total += _write_digits(out, p + 124, 11, sizes[i], 8)
        _write_digits(out, p + 148, 6, total, 8)
        out[p + 154] = 0
        out[p + 155] = 32
        copy_bytes(payload, starts[i], sizes[i], out, offsets[i])
        for k in range(offsets[i] + sizes[i], offsets[i] + (sizes[i] + 511) // 512 * 512):
            out[k] = 0


@kernel
def write_keys(sources, rows, out):
    """out[i] [6 digits, a dash, 10 digits] becomes the key of a cell; the dash is there already."""
    for i in range(len(rows)):
        _write_digits(out[i], 0, SOURCE_DIGITS, sources[i], 10)
        _write_digits(out[i], SOURCE_DIGITS + 1, ROW_DIGITS, rows[i], 10)


@inner
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


@inner
def _write_bin_head(out, p, size):
    width = _bin_head(size) - 1
    out[p] = 0xC4 if width == 1 else 0xC5 if width == 2 else 0xC6
    for k in range(width):
        out[p + 1 + k] = (size >> (8 * (width - 1 - k))) & 255


@inner
def _bin_head(size):
    """The bytes of the head of a msgpack bin of so many bytes."""
    return 2 if size < 256 else 3 if size < 65536 else 5


@inner
def _write_name(out, p, name):
    for k in range(len(name)):
        out[p + k] = name[k]
    return p + len(name)


@inner
def _write_digits(out, p, width, value, base):
    """Write a number with leading zeros; the sum of its digits comes back."""
    total = np.int64(0)
    for k in range(width - 1, -1, -1):
        digit = value % base
        out[p + k] = 48 + digit
        total += digit
        value //= base
    return total

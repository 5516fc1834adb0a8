"""Compiled loops of shard bytes: members read and written, their labels, tar headers; format 1.

Called by shards, packing, exporting and other kernels; they release the GIL. Format 1 is told in
docs/reference/format.md. Every reader takes explicit bounds and returns a status instead of reading
past them, so that hostile bytes end in an error code, which shards.members makes an error of.
"""

from __future__ import annotations

import numba as nb
import numba.extending
import numpy as np
from numpy.typing import NDArray

from scshards.kernels.cache import inlined, inner, kernel
from scshards.kernels.vectors import SUMMED, copy_bytes, sum_up, trailing_zeros

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

MEMBER_BOUND = 64
"""A member takes less than this beside its labels, genes (5 bytes each) and values (10 bytes each)."""

SOURCE_DIGITS, ROW_DIGITS = 6, 10
"""Of a cell's key, as cells.batch.format_key spells it; a dash is between them."""

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
    if end > len(src) or start < 0 or start >= end or (src[start] != 0x83 and src[start] != 0x84):
        return BAD_STRUCTURE
    # What is not there is at -1, and so is all that should come behind it.
    n, p = _read_number(src, _match(src, start + 1, end, N), end, 0xCC, 128)
    gene_bytes, genes = _read_number(src, _match(src, p, end, GENES), end, 0xC4, 0)
    value_bytes, values = _read_number(
        src, _match(src, genes + gene_bytes, end, VALUES), end, 0xC4, 0
    )
    p, labels = values + value_bytes, np.int64(-1)
    if src[start] == 0x84:
        labels = _match(src, p, end, LABELS)
        if labels < 0:
            return BAD_STRUCTURE
    elif p != end:
        return BAD_STRUCTURE
    out[0], out[1], out[2] = n, genes, genes + gene_bytes
    out[3], out[4], out[5] = values, p, labels
    # Each gene takes a byte or more, so this bounds n before anything is allocated for it; and where
    # there are none, nobody decodes what stands in the values' place.
    return BAD_COUNT if n > gene_bytes or (n == 0 and value_bytes > 0) else OK


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


@kernel
def gather_slices(src, starts, sizes, order, out):
    """Copy the slices src[starts[i]:starts[i] + sizes[i]] one after another, in `order`."""
    p = 0
    for k in range(len(order)):
        i = order[k]
        copy_bytes(src, starts[i], sizes[i], out, p)
        p += sizes[i]
    return p


@kernel
def interleave(first, first_sizes, second, second_sizes, out, at):
    """Copy one piece of `first` and one of `second` in turns into out[at:]; where the last ends."""
    a, b, p = np.int64(0), np.int64(0), np.int64(at)
    for i in range(len(first_sizes)):
        copy_bytes(first, a, first_sizes[i], out, p)
        p += first_sizes[i]
        a += first_sizes[i]
        copy_bytes(second, b, second_sizes[i], out, p)
        p += second_sizes[i]
        b += second_sizes[i]
    return p


@kernel
def find_arrays(src, starts, sizes, names, name_ends, row_bytes, places, status):
    """Where the arrays are in the members at src[starts[i]:starts[i] + sizes[i]].

    Parameters
    ----------
    names, name_ends
        The arrays' names as msgpack strings, one after another, in the order that members have.
    row_bytes
        int64 [arrays]: the bytes of each, -1 where they differ from cell to cell.
    places
        int64 [cells, arrays, 2]: filled with the start and end of each one's bytes.
    status
        int64 [cells]: OK, or BAD_STRUCTURE, or BAD_COUNT for an array of another size. A cell of size 0
        is left as it is.
    """
    n = len(name_ends)
    for i in range(len(starts)):
        if sizes[i] == 0:
            continue
        status[i] = BAD_STRUCTURE
        start, end = starts[i], starts[i] + sizes[i]
        if start < 0 or end > len(src) or start >= end:
            continue
        p = np.int64(-1)
        if n < 16:
            if src[start] == 0x80 | n:
                p = np.int64(start + 1)
        elif (
            end - start >= 3
            and src[start] == 0xDE
            and np.int64(src[start + 1]) << 8 | np.int64(src[start + 2]) == n
        ):
            p = np.int64(start + 3)
        first, fits = np.int64(0), True
        for k in range(n):
            size, p = _read_number(
                src, _match(src, p, end, names[first : name_ends[k]]), end, 0xC4, 0
            )
            first = name_ends[k]
            if p < 0 or size > end - p:
                p = np.int64(-1)
                break
            fits &= row_bytes[k] < 0 or row_bytes[k] == size
            places[i, k, 0], places[i, k, 1] = p, p + size
            p += size
        if p == end:
            status[i] = OK if fits else BAD_COUNT


@kernel
def gather_rows(src, starts, out):
    """Copy the row of bytes src[starts[i]:] to out[i]; zeros where starts[i] is -1."""
    for i in range(len(starts)):
        if starts[i] < 0:
            out[i, :] = 0
        else:
            row = out[i]
            copy_bytes(src, starts[i], len(row), row, 0)


@inner
def _match(src, p, end, name):
    """Step over an expected field name; -1 when something else stands there, or p is -1."""
    if p < 0 or p + len(name) > end:
        return np.int64(-1)
    for k in range(len(name)):
        if src[p + k] != name[k]:
            return np.int64(-1)
    return np.int64(p + len(name))


@inner
def _read_number(src, p, end, head, least):
    """A number in its shortest form, as `_write_number` writes it; (number, next), or (0, -1)."""
    if p < 0 or p >= end:
        return np.int64(0), np.int64(-1)
    if src[p] < least:
        return np.int64(src[p]), np.int64(p + 1)
    kind = np.int64(src[p]) - head
    if kind < 0 or kind > 2 or p + 1 + (1 << kind) > end:
        return np.int64(0), np.int64(-1)
    value, width = np.int64(0), 1 << kind
    for k in range(width):
        value = (value << 8) | np.int64(src[p + 1 + k])
    if value < least or (width > 1 and value >> (4 * width) == 0):
        return np.int64(0), np.int64(-1)
    return value, np.int64(p + 1 + width)


@kernel
def encode_members(indptr, genes, values, labels, label_ends, out, ends):
    """Write one member per row into `out`; ends[i] is where row i ends. Returns the bytes written.

    `labels` holds the rows' labels one after another, as `encode_labels` writes them.
    """
    p, start = np.int64(0), np.int64(0)
    for row in range(len(indptr) - 1):
        a, b = indptr[row], indptr[row + 1]
        p = write_member(out, p, genes[a:b], values[a:b], labels[start : label_ends[row]])
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
            p = _write_bytes(out, p, 0xDE, 2, _U64(n_labels))
        q = 0
        for c in range(n_labels):
            p = _write_name(out, p, names[q : name_ends[c]])
            q = name_ends[c]
            if is_number[c]:
                p = _write_bytes(out, p, 0xCB, 8, numbers[row, c])
            elif codes[row, c] < 0:
                out[p] = 0xFF  # -1, a missing value
                p += 1
            else:
                p = _write_number(out, p, 0xCC, 128, codes[row, c])
        ends[row] = p
    return p


@inner
def write_member(out, p, genes, values, labels):
    """One member: ascending ids, counts (uint64) or float32, and labels as of `encode_labels` or none.

    Where it ends comes back, as from all writers here.
    """
    out[p] = 0x84 if len(labels) > 0 else 0x83
    p = _write_number(out, _write_name(out, p + 1, N), 0xCC, 128, np.int64(len(genes)))
    # How long the head of a bin is depends on the bytes behind it: first as if they were the fewest.
    p = _write_name(out, p, GENES)
    begin = p + _bin_head(len(genes))
    q = _U64(begin)
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
    p = _write_name(out, _close_bin(out, p, begin, np.int64(q)), VALUES)
    begin = end = p + _bin_head(len(values))
    for j in range(0, len(values), _BLOCK):
        end = _write_block(out, end, values[j : j + _BLOCK])
    p = _close_bin(out, p, begin, end)
    if len(labels) > 0:
        p = _write_name(out, p, LABELS)
        copy_bytes(labels, 0, len(labels), out, p)
    return p + len(labels)


def _write_block(out, p, values):
    """Some values as they are stored: counts (uint64) as varints, float32 little-endian."""


@nb.extending.overload(_write_block)
def _block_writer(out, p, values):
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
def _write_number(out, p, head, least, x):
    """A number in msgpack's shortest form: below `least`, a byte alone.

    Else 1, 2, 4 or 8 bytes behind a byte: `head`, or up to three above it.
    """
    if x < least:
        out[p] = x
        return p + 1
    kind = 0 if x < 256 else 1 if x < 65536 else 2 if x < 4294967296 else 3
    return _write_bytes(out, p, head + kind, 1 << kind, _U64(x))


@inner
def _write_bytes(out, p, head, width, x):
    """A byte, and behind it x in `width` bytes, most significant first."""
    out[p] = head
    for k in range(width):
        out[p + 1 + k] = (x >> _U64(8 * (width - 1 - k))) & _U64(255)
    return p + 1 + width


@inner
def _bin_head(size):
    """The bytes of the head of a msgpack bin of so many bytes."""
    return 2 if size < 256 else 3 if size < 65536 else 5


@inner
def _close_bin(out, p, begin, end):
    """Put the head of a bin at p; the bytes out[begin:end] are moved to where it ends."""
    size = end - begin
    if p + _bin_head(size) != begin:
        copy_bytes(out, begin, size, out, p + _bin_head(size))
    return _write_number(out, p, 0xC4, 0, size) + size


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

"""What the bytes of format 1 say, in plain Python: by its document, and by the kernels as they are written.

    read_member(data, kind), read_arrays(data, infos)      by docs/reference/format.md; None: it is none
    plain_kernels()                                        the loops of kernels.members, not compiled

The first share no code with scshards. The second are what coverage-guided fuzzing looks into, as nobody
can see which branch a compiled loop takes. Used by fuzz_targets.py.
"""

from __future__ import annotations

import inspect
import math
import struct
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from scshards.kernels import members as compiled

LARGEST_ID = 1 << 31


class NotOne(Exception):
    """The bytes are not what they should be."""


def need(is_so: bool) -> None:
    if not is_so:
        raise NotOne


def read_member(
    data: bytes, kind: str, limit: int = LARGEST_ID, *, labels: bool = True
) -> tuple[list[int], list[float], bytes | None] | None:
    """Genes, values and the bytes of the labels of a member; None where it is none of format 1."""
    try:
        need(len(data) > 0 and data[0] in ((0x83, 0x84) if labels else (0x83,)))
        n, at = _number(data, _name(data, 1, b"\xa1n"), 0xCC, 128)
        genes, at = _bin(data, _name(data, at, b"\xa5genes"))
        values, at = _bin(data, _name(data, at, b"\xa6values"))
        tail = None
        if data[0] == 0x84:
            tail, at = data[_name(data, at, b"\xa6labels") :], len(data)
        need(at == len(data) and n <= len(genes))
        ids, number = [], 0
        for i, gap in enumerate(_varints(genes, 32)):
            number += gap
            need((gap > 0 or i == 0) and number < limit)
            ids.append(number)
        counts: list[float]
        if kind == "counts":
            counts = [*_varints(values, 64)]
            need(0 not in counts)
        else:
            need(len(values) % 4 == 0)
            counts = [*struct.unpack(f"<{len(values) // 4}f", values)]
            need(all(0 < x < math.inf for x in counts))
        need(n == len(ids) == len(counts))
    except NotOne:
        return None
    return ids, counts, tail


def read_arrays(data: bytes, infos: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """The arrays of a member: bytes of a dense row, [columns, values] of a sparse one; None: it is none."""
    found: dict[str, list[Any]] = {}
    try:
        need(len(infos) < 16 and data[:1] == bytes([0x80 | len(infos)]))
        at = 1
        for name, info in infos.items():
            raw = name.encode()
            need(len(raw) < 32)
            row, at = _bin(data, _name(data, at, bytes([0xA0 | len(raw)]) + raw))
            if info.kind == "dense":
                need(len(row) == info.row_bytes)
                found[name] = [row]
                continue
            is_whole = info.dtype == "int32"
            inner = _sparse(row, is_whole, info.width)
            found[name] = [*inner]
        need(at == len(data))
    except NotOne:
        return None
    return found


def _sparse(row: bytes, is_whole: bool, width: int) -> tuple[list[int], Any]:
    if is_whole:
        read = read_member(row, "counts", width, labels=False)
        need(read is not None and all(x < LARGEST_ID for x in read[1]))
        assert read is not None
        return read[0], read[1]
    # Numbers of any kind but 0: the head and the columns are those of a member.
    n, at = _number(row, _name(row, 1, b"\xa1n"), 0xCC, 128)
    need(row[:1] == b"\x83")
    _, at = _bin(row, _name(row, at, b"\xa5genes"))
    values, at = _bin(row, _name(row, at, b"\xa6values"))
    need(at == len(row) and len(values) == 4 * n)
    ones = struct.pack(f"<{n}f", *[1.0] * n)
    again = row[: len(row) - len(values)] + ones
    read = read_member(again, "float", width, labels=False)
    need(read is not None)
    assert read is not None
    numbers = np.frombuffer(values, "<f4")
    need(not (numbers == 0).any())
    return read[0], numbers


def _name(data: bytes, at: int, name: bytes) -> int:
    need(data[at : at + len(name)] == name)
    return at + len(name)


def _number(data: bytes, at: int, head: int, least: int) -> tuple[int, int]:
    """A msgpack number in its shortest form."""
    need(at < len(data))
    if data[at] < least:
        return data[at], at + 1
    width = {head: 1, head + 1: 2, head + 2: 4}.get(data[at], 0)
    need(width > 0 and at + 1 + width <= len(data))
    number = int.from_bytes(data[at + 1 : at + 1 + width], "big")
    need(number >= least and (width == 1 or number >= 1 << (4 * width)))
    return number, at + 1 + width


def _bin(data: bytes, at: int) -> tuple[bytes, int]:
    size, at = _number(data, at, 0xC4, 0)
    need(at + size <= len(data))
    return data[at : at + size], at + size


def _varints(data: bytes, bits: int) -> list[int]:
    out, number, shift = [], 0, 0
    for byte in data:
        number |= (byte & 127) << shift
        if byte < 128:
            need(number < 1 << bits and (byte > 0 or shift == 0))
            out.append(number)
            number, shift = 0, 0
        else:
            shift += 7
            need(shift < 70)
    need(shift == 0)
    return out


def plain_kernels() -> types.ModuleType:
    """kernels.members without a compiler: its decorators do nothing, its vectors are loops."""
    source = inspect.getsource(compiled)
    for old, new in (
        (
            "from scshards.kernels.cache import inlined, inner, kernel",
            "inlined = inner = kernel = lambda function: function",
        ),
        (
            "from scshards.kernels.vectors import SUMMED, copy_bytes, sum_up, trailing_zeros",
            "from fuzz_plain import SUMMED, copy_bytes, sum_up, trailing_zeros",
        ),
    ):
        assert source.count(old) == 1, f"kernels.members no longer has the line {old!r}"
        source = source.replace(old, new)
    module = types.ModuleType("fuzz_plain_members")
    exec(compile(source, "fuzz_plain_members.py", "exec"), module.__dict__)
    return module


SUMMED = 16


def sum_up(src: Any, p: int, out: Any, j: int, total: int) -> tuple[int, int]:
    """kernels.vectors.sum_up as a loop."""
    odd, p, j = 0, int(p), int(j)
    total = int(total)
    for k in range(SUMMED):
        byte = int(_at(src, p + k))
        odd |= (byte == 0 or byte > 127) << k
        total += byte
        _at(out, j + k)
        out[j + k] = np.uint32(total & 0xFFFFFFFF).astype(np.int32)
    return odd, total


def trailing_zeros(word: Any) -> int:
    """kernels.vectors.trailing_zeros."""
    number = int(word)
    return (number & -number).bit_length() - 1 if number else 64


def copy_bytes(src: Any, start: int, size: int, out: Any, at: int) -> None:
    """kernels.vectors.copy_bytes, within bounds."""
    if size:
        _at(src, start), _at(src, start + size - 1), _at(out, at), _at(out, at + size - 1)
        out[at : at + size] = src[start : start + size].copy()


def _at(array: Any, i: int) -> Any:
    """An element; from the end is beyond an array, too."""
    if not 0 <= i < len(array):
        raise IndexError(f"{i} of {len(array)}")
    return array[i]

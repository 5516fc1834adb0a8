"""The second member of a cell: arrays <-> bytes, and what hostile bytes end in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_reader import leb128

from scshards.base.errors import FormatError
from scshards.shards.arrays import (
    ArrayReader,
    Rows,
    SparseRows,
    decode_arrays,
    dense_rows,
    encode_arrays,
    rows_of,
)
from scshards.shards.index import ARRAY_COLUMNS
from scshards.shards.manifest import DENSE_DTYPES, ArrayInfo

DOC = (Path(__file__).parents[2] / "docs" / "reference" / "format.md").read_text()


def info_of(kind: Any, dtype: str, width: int) -> ArrayInfo:
    return ArrayInfo(kind=kind, dtype=dtype, width=width, source="obsm")


def numbers_of(rng: np.random.Generator, info: ArrayInfo, n: int) -> Any:
    """[n, width] of any bits for a dense array, about a third not 0 for a sparse one."""
    dtype = np.dtype(info.dtype)
    if info.kind == "dense":
        raw = rng.integers(0, 256, n * info.row_bytes, np.uint8)
        return raw.view(dtype).reshape(n, info.width)
    some = rng.integers(1, 1 << rng.integers(1, 31), (n, info.width))
    values = some.astype(np.int32) if dtype.kind == "i" else rng.normal(size=some.shape)
    return np.where(rng.random(some.shape) < 0.3, values, 0).astype(dtype)


def rows_from(info: ArrayInfo, numbers: Any) -> Rows:
    if info.kind == "dense":
        return np.asarray(numbers)
    csr = sp.csr_matrix(numbers)
    return SparseRows(csr.indptr.astype(np.int64), csr.indices.astype(np.int32), csr.data)


@st.composite
def sets_of_arrays(draw: Any) -> tuple[dict[str, ArrayInfo], dict[str, Any], int]:
    names = draw(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=20, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    n = draw(st.integers(1, 6))
    infos, numbers = {}, {}
    for name in names:
        kind = draw(st.sampled_from(["dense", "sparse"]))
        dtypes = DENSE_DTYPES if kind == "dense" else ("int32", "float32")
        info = info_of(kind, draw(st.sampled_from(dtypes)), draw(st.integers(1, 300)))
        infos[name], numbers[name] = info, numbers_of(rng, info, n)
    return infos, numbers, n


def plainly(payload: bytes, infos: dict[str, ArrayInfo]) -> dict[str, Any]:
    """The arrays of a member by msgpack alone, as docs/reference/format.md says it."""
    member = msgpack.unpackb(payload)
    assert list(member) == list(infos)
    out = {}
    for name, info in infos.items():
        if info.kind == "dense":
            out[name] = np.frombuffer(member[name], np.dtype(info.dtype).newbyteorder("<"))
            continue
        cell, row = msgpack.unpackb(member[name]), np.zeros(info.width, info.dtype)
        assert list(cell) == ["n", "genes", "values"]
        columns = np.cumsum(leb128(cell["genes"]))
        assert len(columns) == cell["n"]
        is_whole = info.dtype == "int32"
        row[columns.astype(int)] = (
            leb128(cell["values"]) if is_whole else np.frombuffer(cell["values"], "<f4")
        )
        out[name] = row
    return out


@settings(deadline=None, max_examples=80)
@given(sets_of_arrays())
def test_all_bits_come_back(case: tuple[dict[str, ArrayInfo], dict[str, Any], int]) -> None:
    infos, numbers, n = case
    rows = {name: rows_from(infos[name], numbers[name]) for name in infos}
    payload, sizes = encode_arrays(infos, rows, n)
    ends = np.cumsum(sizes)
    assert ends[-1] == len(payload)
    found, status = ArrayReader(infos).read(payload, ends - sizes, sizes)
    assert not status.any()
    for name, info in infos.items():
        assert dense_rows(found[name], info).tobytes() == numbers[name].tobytes()
    for i in range(n):
        member = payload[ends[i] - sizes[i] : ends[i]].tobytes()
        assert msgpack.packb(msgpack.unpackb(member)) == member
        for one in (decode_arrays(member, infos), plainly(member, infos)):
            assert all(one[name].tobytes() == numbers[name][i].tobytes() for name in infos)
    # One row by itself has the same bytes: a member is a function of its cell.
    alone, _ = encode_arrays(infos, {k: rows_of(r, np.array([n - 1])) for k, r in rows.items()}, 1)
    assert alone.tobytes() == payload[ends[-1] - sizes[-1] :].tobytes()


@settings(deadline=None, max_examples=300)
@given(sets_of_arrays(), st.data())
def test_hostile_bytes_end_in_an_error_or_in_arrays(
    case: tuple[dict[str, ArrayInfo], dict[str, Any], int], data: Any
) -> None:
    infos, numbers, _ = case
    rows = {name: rows_from(infos[name], numbers[name][:1]) for name in infos}
    member = bytearray(encode_arrays(infos, rows, 1)[0].tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(member) - 1))
        what = data.draw(st.integers(0, 2))
        if what == 0:
            member[at] = data.draw(st.integers(0, 255))
        elif what == 1:
            del member[at : at + data.draw(st.integers(1, 9))]
        else:
            member[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        if not member:
            break
    try:
        found = decode_arrays(bytes(member), infos)
    except FormatError:
        return
    for name, info in infos.items():
        assert found[name].shape == (info.width,) and found[name].dtype == info.dtype


DENSE, SPARSE = info_of("dense", "float32", 2), info_of("sparse", "int32", 300)


def sparse(n: int, genes: bytes, values: bytes) -> bytes:
    return bytes(msgpack.packb({"n": n, "genes": genes, "values": values}))


@pytest.mark.parametrize(
    ("infos", "payload", "what"),
    [
        ({"a": DENSE}, b"", "not that of the arrays"),
        ({"a": DENSE}, msgpack.packb({"b": bytes(8)}), "not that of the arrays"),
        ({"a": DENSE}, msgpack.packb({"a": bytes(8), "b": bytes(8)}), "not that of the arrays"),
        ({"a": DENSE}, msgpack.packb({"a": bytes(8)}) + b"\0", "not that of the arrays"),
        ({"a": DENSE}, msgpack.packb({"a": bytes(12)}), "another size"),
        ({"a": DENSE}, b"\x81\xa1a\xc6\xff\xff\xff\xff" + bytes(8), "not that of the arrays"),
        ({"a": DENSE}, b"\x81\xa1a\xc5\x00\x08" + bytes(8), "not that of the arrays"),
        ({"a": SPARSE}, msgpack.packb({"a": sparse(1 << 20, b"\1", b"\1")}), "another size"),
        ({"a": SPARSE}, msgpack.packb({"a": sparse(1, b"\xff\xff", b"\1")}), "cut short"),
        ({"a": SPARSE}, msgpack.packb({"a": sparse(2, b"\1\0", b"\1\1")}), "do not ascend"),
        ({"a": SPARSE}, msgpack.packb({"a": sparse(1, b"\xac\2", b"\1")}), "outside its array"),
        ({"a": SPARSE}, msgpack.packb({"a": sparse(1, b"\1", b"\0")}), "is 0, or too large"),
        (
            {"a": SPARSE},
            msgpack.packb({"a": sparse(1, b"\1", b"\x80\x80\x80\x80\x08")}),
            "is 0, or too large",
        ),
        ({"a": SPARSE}, msgpack.packb({"a": bytes(3)}), "not that of the arrays"),
    ],
)
def test_each_fault_is_told(infos: dict[str, ArrayInfo], payload: bytes, what: str) -> None:
    with pytest.raises(FormatError, match=what) as e:
        decode_arrays(payload, infos, where="cell 7")
    assert e.value.where == "cell 7"


def test_the_worked_example() -> None:
    (found,) = re.findall(r"```hex\n(.*?)```", DOC, re.S)
    data = bytes.fromhex("".join(line.split("|")[0] for line in found.splitlines()))
    assert f"{len(data)} bytes:" in DOC
    infos = {"pca": DENSE, "adt": SPARSE}
    rows: dict[str, Rows] = {
        "pca": np.array([[0.5, -1]], np.float32),
        "adt": SparseRows(np.array([0, 1]), np.array([1], np.int32), np.array([3], np.int32)),
    }
    assert encode_arrays(infos, rows, 1)[0].tobytes() == data
    for column in ARRAY_COLUMNS:
        assert f"`{column}`" in DOC
    for field in ("kind", "dtype", "width", "columns", "source", "minor", "arrays"):
        assert f"`{field}`" in DOC

"""Members against msgpack and a LEB128 decoder in plain Python; hostile bytes end in FormatError."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any, Literal

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_reader import leb128
from shardsets import encode_cell

from scshards import Cell, decode_cell
from scshards.base.errors import FormatError
from scshards.cells.tokenizer import TokenRows
from scshards.shards.manifest import LabelInfo
from scshards.shards.members import encode_rows

Labels = dict[str, int | float]

MAX_ID = 2**31 - 1
IDS = st.one_of(st.integers(0, 300), st.integers(0, 70_000), st.integers(0, MAX_ID))
COUNT = st.one_of(st.integers(1, 200), st.integers(1, 2**64 - 1))
FLOAT = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False, width=32)
LABEL = st.one_of(
    st.just(-1), st.integers(0, 300), st.integers(0, MAX_ID), st.floats(allow_nan=True)
)
NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LABELS = st.dictionaries(NAME, LABEL, max_size=20)


@st.composite
def cells(draw: st.DrawFn, value: st.SearchStrategy = COUNT) -> tuple[list[int], list[Any], Labels]:
    genes = sorted(draw(st.sets(IDS, max_size=40)))
    values = draw(st.lists(value, min_size=len(genes), max_size=len(genes)))
    return genes, values, draw(LABELS)


def running_sums(deltas: list[int]) -> list[int]:
    return [sum(deltas[: i + 1]) for i in range(len(deltas))]


def same_labels(a: Labels, b: Labels) -> bool:
    """Equal in order, type and bits, NaN included."""

    def bits(v: int | float) -> tuple[type, Any]:
        return (float, struct.pack("<d", v)) if isinstance(v, float) else (int, v)

    return [(k, bits(v)) for k, v in a.items()] == [(k, bits(v)) for k, v in b.items()]


@given(cells())
def test_counts_against_msgpack_and_plain_leb128(cell: tuple[list[int], list[int], Labels]) -> None:
    genes, values, labels = cell
    member = encode_cell(genes, values, labels)
    fields = msgpack.unpackb(member)
    assert list(fields) == ["n", "genes", "values"] + (["labels"] if labels else [])
    assert fields["n"] == len(genes)
    assert running_sums(leb128(fields["genes"])) == genes
    assert leb128(fields["values"]) == values
    assert same_labels(fields.get("labels", {}), labels)
    # Every item in its shortest form: msgpack's own packer writes the same bytes.
    assert msgpack.packb(fields) == member


@given(cells(FLOAT))
def test_float_values_are_little_endian_float32(
    cell: tuple[list[int], list[float], Labels],
) -> None:
    genes, values, labels = cell
    member = encode_cell(genes, values, labels, kind="float")
    fields = msgpack.unpackb(member)
    assert list(struct.unpack(f"<{len(genes)}f", fields["values"])) == values
    assert running_sums(leb128(fields["genes"])) == genes
    assert msgpack.packb(fields) == member


@given(cells())
def test_decode_counts(cell: tuple[list[int], list[int], Labels]) -> None:
    genes, values, labels = cell
    out = decode_cell(encode_cell(genes, values, labels))
    assert out.genes.dtype == np.int32 and out.values.dtype == np.uint64
    assert out.genes.tolist() == genes and out.values.tolist() == values
    assert same_labels(out.labels, labels)


@given(cells(FLOAT))
def test_decode_floats(cell: tuple[list[int], list[float], Labels]) -> None:
    genes, values, labels = cell
    out = decode_cell(encode_cell(genes, values, labels, kind="float"), kind="float")
    assert out.values.dtype == np.float32 and out.values.tolist() == values
    assert out.genes.tolist() == genes and same_labels(out.labels, labels)


@given(st.lists(cells(), max_size=8), st.booleans())
def test_blocks_are_the_cells_one_after_another(block: list[Any], with_labels: bool) -> None:
    indptr = np.cumsum([0] + [len(genes) for genes, _, _ in block])
    rows = TokenRows(
        indptr=indptr.astype(np.int64),
        genes=np.array([g for genes, _, _ in block for g in genes], np.int32),
        values=np.array([v for _, values, _ in block for v in values], np.uint64),
    )
    codes = np.arange(len(block)) - 1
    numbers = np.arange(len(block)) / 3
    columns = {"donor": codes, "age": numbers}
    payload, ends = encode_rows(rows, columns if with_labels else {})
    bounds = [0, *ends.tolist()]
    members = [payload[a:b].tobytes() for a, b in itertools.pairwise(bounds)]
    for i, (member, (genes, values, _)) in enumerate(zip(members, block, strict=True)):
        labels: Labels = {"donor": i - 1, "age": i / 3} if with_labels else {}
        assert member == encode_cell(genes, values, labels)


@pytest.mark.parametrize("n", [0, 1, 127, 128, 255, 256, 65535, 65536])
def test_lengths_at_the_edges_of_msgpack_forms(n: int) -> None:
    genes, values = np.arange(n), np.ones(n, np.uint64)
    member = encode_cell(genes, values)
    assert msgpack.packb(msgpack.unpackb(member)) == member
    assert decode_cell(member).genes.tolist() == genes.tolist()


@pytest.mark.parametrize("code", [-1, 0, 127, 128, 255, 256, 65535, 65536, 2**31 - 1])
def test_codes_at_the_edges_of_msgpack_forms(code: int) -> None:
    member = encode_cell([1], [1], {"a": code})
    assert msgpack.packb(msgpack.unpackb(member)) == member
    assert decode_cell(member).labels == {"a": code}


@pytest.mark.parametrize("count", [1, 15, 16, 300])
def test_numbers_of_labels(count: int) -> None:
    labels: Labels = {f"column {i}": i for i in range(count)}
    member = encode_cell([1], [1], labels)
    assert msgpack.packb(msgpack.unpackb(member)) == member
    assert decode_cell(member).labels == labels


# --- hostile bytes ---------------------------------------------------------------------------

SAMPLE = encode_cell([3, 7, 300, 70_000], [1, 2, 300, 2**40], {"donor": 2, "age": 41.5})
SAMPLE_FLOAT = encode_cell([3, 7, 300], [0.5, 1.5, 2.5], {"donor": -1}, kind="float")
KINDS: list[Literal["counts", "float"]] = ["counts", "float"]


def survives(payload: bytes, kind: Literal["counts", "float"]) -> Cell | None:
    """The cell, after its promises were checked, or None for a FormatError; all else fails."""
    try:
        cell = decode_cell(payload, kind=kind, where="shard, key")
    except FormatError as e:
        assert "where: shard, key" in str(e)
        return None
    assert cell.genes.shape == cell.values.shape
    assert cell.genes.dtype == np.int32
    assert (cell.genes >= 0).all() and (np.diff(cell.genes.astype(np.int64)) > 0).all()
    # Each gene takes a byte, so a cell never is much larger than its bytes.
    assert len(cell.genes) <= len(payload)
    for name, label in cell.labels.items():
        assert isinstance(name, str)
        assert isinstance(label, float) or (type(label) is int and -1 <= label <= MAX_ID)
    return cell


@pytest.mark.parametrize("kind", KINDS)
@given(st.binary(max_size=200))
def test_random_bytes(kind: Literal["counts", "float"], payload: bytes) -> None:
    survives(payload, kind)


@pytest.mark.parametrize("kind", KINDS)
@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60), st.integers(0, 300))
def test_random_fields(
    kind: Literal["counts", "float"], genes: bytes, values: bytes, labels: bytes, n: int
) -> None:
    """Right structure, random contents."""
    head = {"n": n, "genes": genes, "values": values}
    survives(msgpack.packb(head), kind)
    survives(b"\x84" + msgpack.packb(head)[1:] + b"\xa6labels" + labels, kind)


@pytest.mark.parametrize("payload", [SAMPLE, SAMPLE_FLOAT], ids=KINDS)
def test_truncation_at_every_byte(payload: bytes) -> None:
    for kind in KINDS:
        for end in range(len(payload)):
            assert survives(payload[:end], kind) is None


@pytest.mark.parametrize("payload", [SAMPLE, SAMPLE_FLOAT], ids=KINDS)
def test_trailing_bytes(payload: bytes) -> None:
    for kind in KINDS:
        assert survives(payload + b"\0", kind) is None


@pytest.mark.parametrize("payload", [SAMPLE, SAMPLE_FLOAT], ids=KINDS)
def test_every_single_byte_mutation(payload: bytes) -> None:
    decoded = 0
    for kind in KINDS:
        for at in range(len(payload)):
            for byte in range(256):
                changed = payload[:at] + bytes([byte]) + payload[at + 1 :]
                decoded += survives(changed, kind) is not None
    assert decoded > len(payload), "some mutations give another valid cell"


@settings(max_examples=300)
@given(st.data())
def test_many_mutations(data: st.DataObject) -> None:
    payload = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    survives(bytes(payload), "counts")


def member(n: int, genes: bytes, values: bytes) -> bytes:
    return msgpack.packb({"n": n, "genes": genes, "values": values})


@pytest.mark.parametrize(
    ("payload", "what"),
    [
        (b"", "not a cell"),
        (b"\x80", "not a cell"),
        (msgpack.packb({"n": 0}), "not a cell"),
        (msgpack.packb({"genes": b"", "n": 0, "values": b""}), "not a cell"),
        (msgpack.packb({"n": 0, "genes": "", "values": b""}), "not a cell"),
        (msgpack.packb({"n": -1, "genes": b"", "values": b""}), "not a cell"),
        (msgpack.packb({"n": 2**40, "genes": b"", "values": b""}), "not a cell"),
        (member(2**32 - 1, b"\x01", b"\x01"), "number of genes"),
        (member(2, b"\x01", b"\x01\x01"), "number of genes"),
        (member(1, b"\x01\x01", b"\x01"), "number of genes"),
        (member(1, b"\x01", b"\x01\x01"), "number of genes"),
        (member(2, b"\x05\x00", b"\x01\x01"), "do not ascend"),
        (member(1, b"\x81", b"\x01"), "varint"),
        (member(1, b"\x81\x80\x80\x80\x80\x80", b"\x01"), "varint"),
        (member(1, b"\x80\x80\x80\x80\x08", b"\x01"), "outside"),
        (member(2, b"\xff\xff\xff\xff\x07\x01", b"\x01\x01"), "outside"),
        (member(1, b"\x01", b"\x81"), "varint"),
        (member(1, b"\x01", b"\xff" * 9 + b"\x02"), "varint"),
        (member(1, b"\x01", b"\x80" * 10 + b"\x01"), "varint"),
        (member(1, b"\x01", b""), "varint"),
    ],
)
def test_faults_by_name(payload: bytes, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        decode_cell(payload)


@pytest.mark.parametrize(
    "labels",
    [
        b"",
        b"\x01",
        msgpack.packb([1]),
        msgpack.packb({"a": "b"}),
        msgpack.packb({"a": [1]}),
        msgpack.packb({"a": {"b": 1}}),
        msgpack.packb({1: 1}),
        msgpack.packb({"a": True}),
        msgpack.packb({"a": None}),
        msgpack.packb({"a": -2}),
        msgpack.packb({"a": 2**31}),
        msgpack.packb({"a": 1}) + b"\0",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\x7f\xff\xff\xff",
        b"\xc7\x00\xff",
        b"\x91" * 3000,
    ],
)
def test_labels_that_are_none(labels: bytes) -> None:
    head = member(1, b"\x01", b"\x01")
    with pytest.raises(FormatError, match="not a cell"):
        decode_cell(b"\x84" + head[1:] + b"\xa6labels" + labels)


def test_labels_by_the_text_of_their_categories() -> None:
    infos = {
        "donor": LabelInfo(kind="category", categories=("x", "y")),
        "age": LabelInfo(kind="number"),
    }
    member = encode_cell([1], [1], {"donor": 1, "age": 2.5})
    assert decode_cell(member, labels=infos).labels == {"donor": "y", "age": 2.5}
    assert decode_cell(member).labels == {"donor": 1, "age": 2.5}
    member = encode_cell([1], [1], {"donor": -1, "age": math.nan})
    labels = decode_cell(member, labels=infos).labels
    assert labels["donor"] is None and math.isnan(labels["age"])
    assert decode_cell(encode_cell([1], [1]), labels=infos).labels == {}


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ({"donor": 2}, "no such category of 'donor': 2"),
        ({"donor": 0.0}, "no such label as 'donor'"),
        ({"age": 1}, "no such label as 'age'"),
        ({"sex": 1}, "no such label as 'sex'"),
    ],
)
def test_labels_that_the_manifest_does_not_have(labels: Labels, what: str) -> None:
    infos = {
        "donor": LabelInfo(kind="category", categories=("x", "y")),
        "age": LabelInfo(kind="number"),
    }
    with pytest.raises(FormatError, match=what):
        decode_cell(encode_cell([1], [1], labels), labels=infos)


def test_a_float_member_is_not_read_as_counts_of_another_number() -> None:
    with pytest.raises(FormatError):
        decode_cell(SAMPLE_FLOAT)
    with pytest.raises(FormatError):
        decode_cell(SAMPLE, kind="float")

"""Bytes that nobody packed: truncation and flipped bits anywhere, and members and indexes that lie under
right checksums. Each is an error that names what is wrong, never a crash, and no other cell suffers."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shardsets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import loader_of
from shardsets import Known, encode_cell, make_set

from scshards.base.errors import ChecksumError, FormatError, MissingDataError, ScshardsError
from scshards.base.storage import Storage
from scshards.cells.vocab import Vocab
from scshards.shards.manifest import Manifest
from scshards.shards.members import decode_cell, encode_rows
from scshards.streaming import wds
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.dataset import CellDataset
from scshards.streaming.loader import CellLoader
from scshards.streaming.read.source import CellBytes

GENES = 300
VOCAB = Vocab([f"g{i}" for i in range(GENES)]).with_specials()
OPTIONS = {
    "bins": (CollateOptions(max_length=40), "counts"),
    "ties": (CollateOptions(max_length=40, tie_break="random", exact_mask=True), "counts"),
    "log1p": (CollateOptions(max_length=40, values="log1p", target_sum=1e4), "counts"),
    "counts": (CollateOptions(max_length=1000, values="counts", include_zero_genes=20), "counts"),
    "generate": (CollateOptions(max_length=40, objective="generate"), "counts"),
    "none": (CollateOptions(max_length=40, objective="none", pad_to="max"), "counts"),
    "float": (CollateOptions(max_length=40, n_bins=7), "float"),
}
COLLATORS = {
    name: Collator(options, VOCAB, kind, 0)  # type: ignore[arg-type]
    for name, (options, kind) in OPTIONS.items()
}


def a_member(rng: random.Random, kind: str, least: int = 0) -> bytes:
    n = max(least, rng.choice([0, 1, 7, 8, 9, 33, 100, GENES]))
    genes = sorted(rng.sample(range(GENES), n))
    if kind == "float":
        return encode_cell(genes, [rng.uniform(0.1, 9) for _ in genes], kind="float")
    return encode_cell(genes, [rng.choice([1, 1, 2, 200, 70_000, 2**63]) for _ in genes])


def spoiled(rng: random.Random, kind: str) -> bytes:
    """A member with something wrong in it, most of the time."""
    member = bytearray(a_member(rng, kind))
    how = rng.randrange(6)
    if how == 0:
        for _ in range(rng.randint(1, 5)):
            member[rng.randrange(len(member))] = rng.randrange(256)
    elif how == 1:
        member = member[: rng.randrange(len(member))]
    elif how == 2:
        at = rng.randrange(len(member))
        member[at:at] = rng.randbytes(rng.randint(1, 9))
    elif how == 3:
        a, b = sorted(rng.randrange(len(member)) for _ in range(2))
        del member[a:b]
    elif how == 4:
        fields = msgpack.unpackb(bytes(member))
        n = rng.choice([0, fields["n"] + 1, len(fields["genes"]), 2**31, 2**32 - 1])
        fields["n"] = n
        member = bytearray(msgpack.packb(fields))
    else:
        fields = msgpack.unpackb(bytes(member))
        name = rng.choice(["genes", "values"])
        fields[name] = rng.choice(
            [
                rng.randbytes(len(fields[name])),
                b"\xff" * len(fields[name]),
                fields[name] + b"\x80\x00",
                b"\x01" * fields["n"],
                fields[name] * 20,
                b"\xff\xff\xff\xff\x0f" + fields[name][1:],
            ]
        )
        member = bytearray(msgpack.packb(fields))
    return bytes(member) or b"\0"


def collated(of: Collator, members: list[bytes], keys: list[int]) -> Any:
    """The batch of members that lie among bytes that are none of theirs."""
    gap = b"\x83\xa1n\x01\xff\x80"
    data = np.frombuffer(gap + b"".join(m + gap for m in members), np.uint8)
    sizes = np.array([len(m) for m in members], np.int64)
    starts = np.cumsum(sizes + len(gap)) - sizes
    labels = np.zeros((len(keys), 0), np.int64)
    return of.collate(CellBytes(data, starts, sizes, np.array(keys), labels), 0)[0]


def attack(name: str, seed: int) -> bool:
    """Collate a spoiled member between two good ones; whether it was refused."""
    rng = random.Random(f"{name} {seed}")
    kind = OPTIONS[name][1]
    # With fewer genes, a batch of the generative objective makes do with what its rows have.
    members = [a_member(rng, kind, 7), spoiled(rng, kind), a_member(rng, kind, 7)]
    try:
        cell = decode_cell(members[1], kind=kind)  # type: ignore[arg-type]
        is_cell = bool((cell.genes < len(VOCAB)).all())
    except FormatError:
        is_cell = False
    try:
        batch = collated(COLLATORS[name], members, [5, (3 << 40) | 9, 6])
    except FormatError as e:
        assert not is_cell, e
        assert "cell 000003-0000000009" in str(e), e
        return True
    # The collator does not read the labels that a member repeats; the index has them.
    assert is_cell or members[1][0] == 0x84
    genes = [t for k, t in vars_of(batch).items() if k.endswith("genes")]
    assert all(((g >= 0) & (g < len(VOCAB))).all() for g in genes)
    # Other cells are what they are without it. Padding depends on the longest.
    alone = collated(COLLATORS[name], [members[0], b"", members[2]], [5, -1, 6])
    for key, tensor in vars_of(alone).items():
        other = vars_of(batch)[key]
        if tensor.ndim == 2:
            width = min(tensor.shape[1], other.shape[1])
            for row in (0, 2):
                assert torch.equal(tensor[row, :width], other[row, :width]), key
    return False


def vars_of(batch: Any) -> dict[str, torch.Tensor]:
    fields = (f.name for f in dataclasses.fields(batch))
    return {k: v for k in fields if isinstance(v := getattr(batch, k), torch.Tensor)}


@pytest.mark.parametrize("name", OPTIONS)
def test_spoiled_members_are_refused_by_name_or_are_cells(name: str) -> None:
    refused = sum(attack(name, seed) for seed in range(120))
    assert 40 < refused < 120


THOUSANDS = """
import sys
sys.path[:0] = sys.argv[1:]
from test_faults_members import OPTIONS, attack
found = {name: sum(attack(name, 1000 + seed) for seed in range(2000)) for name in OPTIONS}
assert all(800 < refused < 2000 for refused in found.values()), found
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("boundscheck", ["0", "1"])
def test_spoiled_members_by_the_thousand(boundscheck: str) -> None:
    """With bounds checks, reading beside a member is an IndexError, and not a lucky guess."""
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", THOUSANDS, str(here), str(here.parent)],
        env=os.environ | {"NUMBA_BOUNDSCHECK": boundscheck},
        timeout=1700,
        check=True,
    )


def written(n: bytes, genes: bytes, values: bytes) -> bytes:
    """A member, its bytes as they are given."""
    bins = (bytes([0xC4, len(b)]) + b for b in (genes, values))
    return b"\x83\xa1n" + n + b"\xa5genes" + next(bins) + b"\xa6values" + next(bins)


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


MANY = 70
NOT_SECTION_4 = {
    "a count of 0": ("counts", written(b"\x01", b"\x03", b"\x00")),
    "a count of 0 among many": (
        "counts", written(bytes([MANY]), b"\x01" * MANY, b"\x01" * 65 + b"\x00" + b"\x01" * 4),
    ),
    "an overlong count": ("counts", written(b"\x01", b"\x03", b"\x81\x00")),
    "an overlong count of 0": ("counts", written(b"\x01", b"\x03", b"\x80\x00")),
    "an overlong large count": ("counts", written(b"\x01", b"\x03", b"\xff\xff\xff\xff\x80\x00")),
    "an overlong first id": ("counts", written(b"\x01", b"\x83\x00", b"\x01")),
    "an overlong gap": ("counts", written(b"\x02", b"\x03\x83\x00", b"\x01\x01")),
    "a gap of 0": ("counts", written(b"\x02", b"\x03\x00", b"\x01\x01")),
    "n in two bytes": ("counts", written(b"\xcc\x01", b"\x03", b"\x01")),
    "n in three bytes": ("counts", written(b"\xcd\x00\x01", b"\x03", b"\x01")),
    "n in five bytes": ("counts", written(b"\xce\x00\x00\x00\x01", b"\x03", b"\x01")),
    "a long head of a bin": (
        "counts", b"\x83\xa1n\x01\xa5genes\xc5\x00\x01\x03\xa6values\xc4\x01\x01",
    ),
    "NaN": ("float", written(b"\x02", b"\x03\x01", floats(1.5, float("nan")))),
    "a negative float": ("float", written(b"\x02", b"\x03\x01", floats(-3, 1))),
    "a float of 0": ("float", written(b"\x01", b"\x03", floats(0))),
    "an infinite float": ("float", written(b"\x01", b"\x03", floats(float("inf")))),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_SECTION_4)
def test_what_format_1_forbids_is_refused_wherever_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, member = NOT_SECTION_4[name]
    with pytest.raises(FormatError):
        decode_cell(member, kind=kind)  # type: ignore[arg-type]
    for how, (options, its_kind) in OPTIONS.items():
        if its_kind == kind:
            with pytest.raises(FormatError, match="cell 000000-0000000007"):
                collated(COLLATORS[how], [a_member(random.Random(0), kind, 7), member], [1, 7])
                pytest.fail(f"{options} takes it")

    def encoded(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        """The last cell of a shard is that member."""
        payload, ends = encode_rows(*args)
        head = payload[: ends[-2]]
        ends[-1] = len(head) + len(member)
        return np.concatenate([head, np.frombuffer(member, np.uint8)]), ends

    monkeypatch.setattr(shardsets, "encode_rows", encoded)
    root = make_set(tmp_path / "set", [6], kind=kind, n_genes=80, columns=()).root
    for read in (
        lambda: list(CellLoader(root, batch_size=2)),
        lambda: list(CellDataset(root, batch_size=2)),
        lambda: list(CellDataset(root, batch_size=2, as_cells=True)),
        lambda: list(wds.pipeline(root)),
        lambda: list(wds.pipeline(root, decode=False).compose(wds.Collate(root, 2))),
    ):
        with pytest.raises(FormatError):
            read()


@settings(max_examples=150)
@given(st.sampled_from(sorted(OPTIONS)), st.binary(min_size=1, max_size=120), st.integers(0, 2**33))
def test_any_bytes_as_fields(name: str, junk: bytes, n: int) -> None:
    cut = n % (len(junk) + 1)
    member = msgpack.packb({"n": n % 2**32, "genes": junk[:cut], "values": junk[cut:]})
    for hostile in (member, junk):
        try:
            collated(COLLATORS[name], [hostile], [7])
        except FormatError as e:
            assert "cell 000000-0000000007" in str(e)


# --- indexes that lie ------------------------------------------------------------------------


def lying(known: Known, column: str, values: Any) -> None:
    """Put another column into the first shard's index, and its checksum into the manifest."""
    storage = Storage(known.root)
    manifest = Manifest.from_json(storage.read("manifest.json"))
    shard, *others = manifest.splits["train"]
    table = pq.read_table(io.BytesIO(storage.read(shard.index_path)))
    table = table.set_column(table.column_names.index(column), column, values)
    out = io.BytesIO()
    pq.write_table(table, out)
    storage.write(shard.index_path, out.getvalue())
    told = dataclasses.replace(
        shard,
        index_bytes=len(out.getvalue()),
        index_sha256=hashlib.sha256(out.getvalue()).hexdigest(),
    )
    changed = dataclasses.replace(manifest, splits={"train": (told, *others)})
    storage.write("manifest.json", changed.to_json())


N = 30
TOP = 2**63 - 1


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("offset", pa.array([TOP] * N)),
        ("offset", pa.array([TOP - 50] * N)),
        ("offset", pa.array([-TOP - 1] * N)),
        ("offset", pa.array([1 << 40] * N)),
        ("size", pa.array([TOP] * N)),
        ("size", pa.array([0] * N)),
        ("size", pa.array([-5] * N)),
        ("offset", pa.array(["a"] * N)),
        ("offset", pa.array([None] + [600] * (N - 1), pa.int64())),
        ("size", pa.array([1.5] * N)),
        ("row", pa.array(["1"] * N)),
        ("source", pa.array([True] * N)),
        ("obs.donor", pa.array(["a"] * N)),
        ("obs.donor", pa.array([7] * N, pa.int32())),
        ("obs.donor", pa.array([-2] * N, pa.int32())),
        ("obs.age", pa.array(["old"] * N)),
        ("obs.age", pa.array([3] * N, pa.int32())),
    ],
)
def test_an_index_that_lies(tmp_path: Path, column: str, values: Any) -> None:
    known = make_set(tmp_path / "set", [N, 12])
    lying(known, column, values)
    with pytest.raises(FormatError) as caught:
        list(loader_of(known.root, batch_size=4, lanes=3))
    assert "000000" in str(caught.value)
    found = [
        key
        for batch in loader_of(
            known.root, batch_size=4, lanes=3, on_bad_shard="quarantine", drop_last=False
        )
        for key in batch.key.tolist()
        if key >= 0
    ]
    assert set(range(N, N + 12)) <= set(found) <= set(range(N + 12))


def test_an_index_of_another_length(tmp_path: Path) -> None:
    known = make_set(tmp_path / "set", [N, 12])
    storage = Storage(known.root)
    manifest = Manifest.from_json(storage.read("manifest.json"))
    first, second = manifest.splits["train"]
    swapped = dataclasses.replace(
        first,
        index_path=second.index_path,
        index_bytes=second.index_bytes,
        index_sha256=second.index_sha256,
    )
    changed = dataclasses.replace(manifest, splits={"train": (swapped, second)})
    storage.write("manifest.json", changed.to_json())
    with pytest.raises(FormatError, match="12 rows for 30 cells"):
        list(loader_of(known.root, batch_size=4, lanes=3))


# --- files that changed ----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["tar", "parquet"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_truncation_and_flipped_bits_anywhere(tmp_path: Path, part: str, compression: str) -> None:
    known = make_set(tmp_path / "set", [9, 8], compression=compression)
    path = next(known.root.glob(f"train/000001.{part}*"))
    whole = path.read_bytes()
    rng = random.Random(0)
    every = range(len(whole))
    for at in rng.sample(every, 100):
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
        )
        refused(known, ChecksumError, path)
    for at in rng.sample(every, 50):
        path.write_bytes(whole[:at])
        refused(known, MissingDataError, path)
    path.write_bytes(whole)
    assert len(list(loader_of(known.root, batch_size=17, lanes=1))) == 1


def refused(known: Known, error: type[ScshardsError], path: Path) -> None:
    with pytest.raises(error) as caught:
        list(loader_of(known.root, batch_size=17, lanes=1, shuffle=False, threads=1))
    assert path.name in str(caught.value)

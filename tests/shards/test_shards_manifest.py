"""The manifest: JSON round trip, the shape of its text, and damaged ones of many kinds."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base.errors import FormatError
from scshards.shards.manifest import LabelInfo, Manifest, ShardInfo, SourceInfo, seal_holds
from scshards.shards.tar import Chunks

NUMBER = st.integers(0, 2**53)
TEXT = st.text(max_size=20)
HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)


@st.composite
def shards(draw: st.DrawFn, split: str, number: int) -> ShardInfo:
    n = draw(st.integers(1, 3))
    counts = st.lists(st.integers(0, 2**40), min_size=n, max_size=n)
    stored = np.array(draw(counts), np.int64)
    cells = np.array(draw(counts), np.int64)
    return ShardInfo(
        path=f"{split}/{number:06d}.tar",
        cells=int(cells.sum()),
        tokens=draw(NUMBER),
        max_genes=draw(NUMBER),
        bytes=int(stored.sum()),
        sha256=draw(HEX),
        index_path=f"{split}/{number:06d}.parquet",
        index_bytes=draw(NUMBER),
        index_sha256=draw(HEX),
        chunks=Chunks(
            cells=cells,
            stored=stored,
            raw=draw(st.sampled_from([stored, stored * 2])),
            sums=np.array(
                draw(st.lists(st.integers(0, 2**64 - 1), min_size=n, max_size=n)), np.uint64
            ),
        ),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    splits = draw(
        st.sampled_from([("train",), ("train", "valid"), ("train", "valid", "held-out_2")])
    )
    category = st.lists(TEXT, max_size=4).map(
        lambda names: LabelInfo(kind="category", categories=tuple(names))
    )
    sources = st.builds(
        SourceInfo,
        name=TEXT,
        dropped=st.dictionaries(TEXT, NUMBER, max_size=3),
        **dict.fromkeys(
            ["rows", "kept", "columns", "matched", "unmatched", "merged", "values", "unmatched_values", "bytes"],
            NUMBER,
        ),
    )  # fmt: skip
    return Manifest(
        vocab_size=draw(NUMBER),
        vocab_fingerprint=draw(HEX),
        value_kind=draw(st.sampled_from(["counts", "float"])),
        compression=draw(st.sampled_from(["none", "zstd"])),
        labels=draw(
            st.dictionaries(
                TEXT, st.one_of(category, st.just(LabelInfo(kind="number"))), max_size=3
            )
        ),
        splits={
            split: tuple(draw(shards(split, i)) for i in range(draw(st.integers(0, 3))))
            for split in splits
        },
        sources=tuple(draw(st.lists(sources, max_size=3))),
        options=draw(st.dictionaries(TEXT, st.one_of(st.none(), NUMBER, TEXT), max_size=3)),
    )


def same(a: Manifest, b: Manifest) -> bool:
    """Equal fields; chunk tables are arrays, which `==` does not compare to one answer."""

    def plain(m: Manifest) -> Any:
        def shard(s: ShardInfo) -> Any:
            c = s.chunks
            arrays = [x.tolist() for x in (c.cells, c.stored, c.raw, c.sums)]
            return [getattr(s, f) for f in ShardInfo.__slots__ if f != "chunks"] + arrays

        fields = [getattr(m, f) for f in Manifest.__slots__ if f != "splits"]
        return [fields, {name: [shard(s) for s in shards] for name, shards in m.splits.items()}]

    return bool(plain(a) == plain(b))


@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    data = manifest.to_json()
    again = Manifest.from_json(data)
    assert same(again, manifest)
    assert again.to_json() == data
    for split in manifest.splits:
        assert again.fingerprint(split) == manifest.fingerprint(split)


@given(manifests())
def test_each_shard_has_a_line(manifest: Manifest) -> None:
    lines = manifest.to_json().decode().split("\n")
    for shards in manifest.splits.values():
        for s in shards:
            assert sum(f'{{"path": {json.dumps(s.path)}' in line for line in lines) == 1


@given(manifests(), st.data())
def test_the_last_field_seals_the_rest(manifest: Manifest, data: st.DataObject) -> None:
    text = manifest.to_json()
    assert seal_holds(text)
    body, _, seal = text.rpartition(b',\n "sha256": "')
    assert json.loads(text)["sha256"] == hashlib.sha256(body).hexdigest() == seal[:64].decode()
    at = data.draw(st.integers(0, len(text) - 1))
    assert not seal_holds(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])


def sample() -> Manifest:
    def shard(number: int) -> ShardInfo:
        stored = np.array([1000, 500])
        return ShardInfo(
            path=f"train/{number:06d}.tar", cells=7, tokens=70, max_genes=20, bytes=1500,
            sha256="ab" * 32, index_path=f"train/{number:06d}.parquet", index_bytes=99,
            index_sha256="cd" * 32,
            chunks=Chunks(
                cells=np.array([4, 3]), stored=stored, raw=stored,
                sums=np.array([1, 2**64 - 1], np.uint64),
            ),
        )  # fmt: skip

    return Manifest(
        vocab_size=10, vocab_fingerprint="ef" * 32, value_kind="counts", compression="none",
        labels={
            "donor": LabelInfo(kind="category", categories=("@shard 0@", "b")),
            "age": LabelInfo(kind="number"),
        },
        splits={"train": (shard(0), shard(1)), "valid": ()},
        sources=(
            SourceInfo(
                name="a.h5ad", rows=20, kept=14, dropped={"few genes": 6}, columns=12, matched=9,
                unmatched=3, merged=1, values=140, unmatched_values=5, bytes=999,
            ),
        ),
        options={"seed": 0},
    )  # fmt: skip


def test_counts_of_a_split() -> None:
    assert (sample().cells("train"), sample().tokens("train")) == (14, 140)
    assert (sample().cells("valid"), sample().tokens("valid")) == (0, 0)


def test_names_that_are_no_utf8() -> None:
    data = sample().to_json().replace(b'"a.h5ad"', b'"\\udcff.h5ad"')
    manifest = Manifest.from_json(data)
    assert manifest.sources[0].name == "\udcff.h5ad"
    assert Manifest.from_json(manifest.to_json()).sources[0].name == "\udcff.h5ad"


def test_fingerprint_by_its_definition() -> None:
    lines = ["1", "ef" * 32, "counts", "train"]
    lines += [f"train/00000{i}.tar 7 {'ab' * 32}" for i in range(2)]
    expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert sample().fingerprint("train") == expected != sample().fingerprint("valid")


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not the manifest of a shard set"),
        (b"3", "not the manifest of a shard set"),
        (b"{}", "not the manifest of a shard set"),
        (b'{"format": "other"}', "not the manifest of a shard set"),
        (b'{"format": "scshards"}', "format version None"),
        (b'{"format": "scshards", "version": 2}', "format version 2 is not 1"),
        (b'{"format": "scshards", "version": "1"}', "format version '1' is not 1"),
        (b'{"format": "scshards", "version": 1}', "damaged"),
    ],
)
def test_files_that_are_no_manifest(data: bytes, what: str) -> None:
    with pytest.raises(FormatError) as caught:
        Manifest.from_json(data, root="root")
    assert what in caught.value.what and "root/manifest.json" in str(caught.value.where)


def test_every_missing_field_is_found() -> None:
    """Each key of the tree taken away in turn, but for those that only help people."""
    tree = json.loads(sample().to_json())
    optional = {("vocab", "file"), ("sha256",)}

    def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        found = []
        for key, value in items:
            if isinstance(node, dict) and not set(path) & {"options", "dropped"}:
                found.append((*path, key))
            if isinstance(value, dict | list):
                found += paths(value, (*path, key))
        return found

    tried = 0
    for path in paths(tree):
        if path in optional or path[-1] in ("categories", "donor", "age", "train", "valid"):
            continue
        damaged = copy.deepcopy(tree)
        node = damaged
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        with pytest.raises(FormatError):
            Manifest.from_json(json.dumps(damaged))
        tried += 1
    assert tried > 50


def shard0(tree: Any) -> Any:
    return tree["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: shard0(t).update(cells=8), "of its chunks do not add up"),
        (lambda t: shard0(t).update(bytes=1), "of its chunks do not add up"),
        (lambda t: shard0(t).update(tokens=-1), "a whole number from 0 is needed, not -1"),
        (lambda t: shard0(t).update(tokens=1.5), "splits.train.shards[0].tokens: a whole number from 0 is needed, not 1.5"),
        (lambda t: shard0(t).update(tokens="70"), "not '70'"),
        (lambda t: shard0(t).update(tokens=True), "not true"),
        (lambda t: shard0(t).update(tokens=71), "splits.train.tokens: the tokens of its shards do not add up"),
        (lambda t: t["splits"]["train"].update(cells=3), "cells of its shards do not add up"),
        (lambda t: t["splits"]["train"].update(bytes=3), "bytes of its shards do not add up"),
        (lambda t: shard0(t).update(sha256=None), "shards[0].sha256: null is no SHA-256"),
        (lambda t: shard0(t).update(path="../secret.tar"), "is no path of a shard"),
        (lambda t: shard0(t).update(path="/etc/passwd"), "is no path of a shard"),
        (lambda t: shard0(t).update(path="train/../../x"), "is no path of a shard"),
        (lambda t: shard0(t)["index"].update(path="s3://b/x"), "is no path of a shard"),
        (lambda t: shard0(t)["chunks"].update(cells=[8, -1]), "a whole number from 0 is needed, not -1"),
        (lambda t: shard0(t)["chunks"].update(cells=[7]), "is uneven"),
        (lambda t: shard0(t)["chunks"].update(bytes=[2**70, 1]), "chunks.bytes[0]: a whole number from 0 is needed, not a number of 22 digits"),
        (lambda t: shard0(t)["chunks"].update(bytes=3), "damaged"),
        (lambda t: shard0(t)["chunks"].update(xxh64="zz yy"), "damaged"),
        (lambda t: shard0(t)["chunks"].update(xxh64="f" * 17 + " 0"), "damaged"),
        (lambda t: shard0(t)["chunks"].update(xxh64=5), "damaged"),
        (lambda t: shard0(t).update(chunks=[]), "damaged"),
        (lambda t: t["splits"]["train"].update(shards={}), "a list is needed"),
        (lambda t: t.update(splits=[]), "damaged"),
        (lambda t: t.update(sources={"a": 1}), "damaged"),
        (lambda t: t.update(labels={"a": {"kind": "date"}}), "labels.a.kind: 'date'"),
        (lambda t: t.update(labels={"a": {"kind": "category", "categories": [1]}}), "labels.a.categories[0]: a text is needed, not 1"),
        (lambda t: t.update(compression="lz4"), "compression: 'lz4'"),
        (lambda t: t["genes"].update(encoding="raw"), "encoding"),
        (lambda t: t["values"].update(encoding="float32-le"), "encoding"),
        (lambda t: t["values"].update(kind="bins"), "values.kind: 'bins'"),
        (lambda t: t["vocab"].update(size="10"), "vocab.size: a whole number"),
        (lambda t: t.update(options=5), "damaged"),
    ],
)  # fmt: skip
def test_damage(change: Callable[[Any], None], what: str) -> None:
    tree = json.loads(sample().to_json())
    Manifest.from_json(json.dumps(tree))
    change(tree)
    with pytest.raises(FormatError) as caught:
        Manifest.from_json(json.dumps(tree), root="root")
    assert what in caught.value.what and "root/manifest.json" in str(caught.value.where)
    assert "the same pack into another folder" in str(caught.value.advice)


def test_truncation_at_every_byte_and_flipped_bits() -> None:
    data = sample().to_json()
    for end in range(len(data) - 1):
        with pytest.raises(FormatError):
            Manifest.from_json(data[:end])
    for at in range(len(data)):
        try:
            Manifest.from_json(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        except FormatError:
            continue

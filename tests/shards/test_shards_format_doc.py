"""docs/reference/format.md says what the code does: its examples are run, its tables are read.

Nothing here but the shard set under test is made with scshards' own readers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pandas as pd
import pytest
import xxhash
import zstandard
from shardsets import Known, encode_cell, make_set

from scshards.cells.batch import KEY_ROW_BITS
from scshards.shards import Compression
from scshards.shards.index import OWN_COLUMNS
from scshards.shards.manifest import Manifest, seal_holds
from scshards.shards.tar import CHUNK_BYTES, MAX_ROWS, MAX_SOURCES, build_tar

DOC = (Path(__file__).parents[2] / "docs" / "reference" / "format.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOC, re.S)
    return str(found)


def test_the_hexdump_is_what_encode_cell_gives() -> None:
    lines = [line.split("|") for line in block("hexdump").splitlines()]
    assert all(len(line) == 2 and line[1].strip() for line in lines), "every byte is explained"
    data = bytes.fromhex("".join(hexadecimal for hexadecimal, _ in lines))
    assert data == encode_cell([3, 7, 300], [1, 2, 300], {"donor": 2, "age": 41.5})
    assert f"{len(data)} bytes:" in DOC
    assert msgpack.unpackb(data)["labels"] == {"donor": 2, "age": 41.5}


def test_the_manifest_is_one() -> None:
    data = block("json").encode()
    manifest = Manifest.from_json(data)
    assert manifest.to_json() == data
    assert seal_holds(data)


def test_every_field_of_the_manifest_has_a_line() -> None:
    tables = "\n".join(line for line in DOC.splitlines() if line.startswith("|"))

    def names(tree: Any) -> set[str]:
        if isinstance(tree, list):
            return set().union(*map(names, tree))
        return set(tree).union(*map(names, tree.values())) if isinstance(tree, dict) else set()

    manifest = json.loads(block("json"))
    examples = {"donor", "age", "train", "valid", "fewer than 1 genes", "seed", "valid_fraction"}
    for name in names(manifest) - examples:
        assert re.search(rf"[`.]{name}[`.]", tables), f"{name} is not in a table"


def test_numbers_in_the_text() -> None:
    assert f"{CHUNK_BYTES:,}" in DOC
    assert f"source << {KEY_ROW_BITS} | row" in DOC
    assert (MAX_SOURCES, MAX_ROWS) == (10**6, 10**10)
    assert "at most 10^6 sources of 10^10 rows" in DOC
    for column in OWN_COLUMNS:
        assert f"`{column}`" in DOC


def test_the_tar_header_by_its_table() -> None:
    member = encode_cell([1], [1])
    tar, _ = build_tar(
        np.frombuffer(member, np.uint8),
        np.array([0]),
        np.array([len(member)]),
        np.array([2]),
        np.array([1234]),
    )
    header = bytearray(512)
    header[0:26] = b"000002-0000001234.cell.mp\0"
    header[100:108] = b"0000644\0"
    header[108:124] = b"0000000\0" * 2
    header[124:136] = f"{len(member):011o}\0".encode()
    header[136:148] = b"0" * 11 + b"\0"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    padded = member + bytes(512 - len(member))
    assert tar.tobytes() == bytes(header) + padded + bytes(1024)


@pytest.fixture(params=["none", "zstd"])
def known(request: pytest.FixtureRequest, tmp_path: Path) -> Known:
    compression: Compression = request.param
    return make_set(tmp_path / "shards", [40, 7], compression=compression)


def test_the_reader_in_fifteen_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = make_set(tmp_path / "shards", [4, 3])
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "docs/reference/format.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"000000-{row:010d} "
        + str({"donor": [*"abc", None][known.donor[row]], "age": known.age[row]})
        + " "
        + str(
            {
                known.vocab.tokens[g]: int(v)
                for g, v in zip(known.genes[row], known.values[row], strict=True)
            }
        )
        for row in range(4)
    ]


def test_one_cell_by_the_index_and_the_chunk_table(known: Known) -> None:
    """The recipe of section 5: index, chunk, range, checksum, frame, member."""
    manifest = json.loads((known.root / "manifest.json").read_text())
    seen = 0
    for shard in manifest["splits"]["train"]["shards"]:
        index = pd.read_parquet(known.root / shard["index"]["path"])
        table = shard["chunks"]
        raw_ends = list(itertools.accumulate(table.get("raw_bytes", table["bytes"])))
        ends = list(itertools.accumulate(table["bytes"]))
        for cell in index.itertuples():
            i = next(i for i, end in enumerate(raw_ends) if cell.offset < end)
            with (known.root / shard["path"]).open("rb") as f:
                f.seek(ends[i] - table["bytes"][i])
                chunk = f.read(table["bytes"][i])
            assert xxhash.xxh64(chunk).hexdigest() == table["xxh64"].split()[i]
            if manifest["compression"] == "zstd":
                chunk = zstandard.ZstdDecompressor().decompress(chunk)
            at = cell.offset - (raw_ends[i - 1] if i else 0)
            member = msgpack.unpackb(chunk[at : at + cell.size])
            row = int(cell.row)
            assert member["n"] == len(known.genes[row]) == cell.n_genes
            assert member["labels"]["donor"] == known.donor[row]
            # Forty genes: every delta is one byte.
            assert list(itertools.accumulate(member["genes"])) == known.genes[row].tolist()
            assert cell.total == known.values[row].sum()
            seen += 1
    assert seen == 47


def test_checksums_and_fingerprint_by_their_description(known: Known) -> None:
    manifest = json.loads((known.root / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        for entry in (shard, shard["index"]):
            data = (known.root / entry["path"]).read_bytes()
            assert len(data) == entry["bytes"]
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    vocab = json.loads((known.root / "vocab.json").read_text())
    text = "".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__))
    assert hashlib.sha256(text.encode()).hexdigest() == manifest["vocab"]["fingerprint"]
    assert len(vocab) == manifest["vocab"]["size"]

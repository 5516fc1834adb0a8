"""A reader of shard sets that shares no code with scshards. Used by the tests of all floors.

Shards are read with stock webdataset (or zstandard and tarfile), members with msgpack and a LEB128
decoder in plain Python.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

MEMBER = "cell.mp"


@dataclass(frozen=True)
class Member:
    """One cell as a stranger reads it."""

    split: str
    shard: str
    genes: list[int]
    values: list[float]
    labels: dict[str, Any]


def read_back(root: Path) -> dict[str, Member]:
    """{key: cell} of all shards, in the order of the splits, shards and members."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    kind = manifest["values"]["kind"]
    out: dict[str, Member] = {}
    for split, tree in manifest["splits"].items():
        for shard in tree["shards"]:
            for key, cell in members(root / shard["path"]):
                genes, at = [], 0
                for delta in leb128(cell["genes"]):
                    at += delta
                    genes.append(at)
                stored = cell["values"]
                values = (
                    leb128(stored)
                    if kind == "counts"
                    else list(struct.unpack(f"<{len(stored) // 4}f", stored))
                )
                assert cell["n"] == len(genes) == len(values)
                assert key not in out, "a key appears twice"
                out[key] = Member(split, shard["path"], genes, values, cell.get("labels", {}))
    return out


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, msgpack map) of a shard: stock webdataset for tar, zstandard and tarfile for tar.zst."""
    if path.suffix == ".zst":
        import zstandard

        with path.open("rb") as f:
            data = zstandard.ZstdDecompressor().stream_reader(f, read_across_frames=True).read()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for info in tar:
                assert info.name.endswith(f".{MEMBER}")
                yield info.name.partition(".")[0], msgpack.unpackb(tar.extractfile(info).read())
        return
    import webdataset

    for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
        yield sample["__key__"], sample[MEMBER]


def leb128(data: bytes) -> list[int]:
    """Seven bits a byte, low ones first, the top bit says that more come."""
    out, number, shift = [], 0, 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            out.append(number)
            number, shift = 0, 0
    assert shift == 0, "the data ends inside a number"
    return out


def key(source: int, row: int) -> str:
    return f"{source:06d}-{row:010d}"


def assert_holds(root: Path, want: dict[str, dict[int, float]]) -> dict[str, Member]:
    """The shards hold exactly these cells, genes ascending, value for value."""
    found = read_back(root)
    assert sorted(found) == sorted(want)
    for k, cell in want.items():
        assert found[k].genes == sorted(cell), k
        assert dict(zip(found[k].genes, found[k].values, strict=True)) == cell, k
    return found

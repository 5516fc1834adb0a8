"""The manifest: what a shard set holds. Written last: without it there is no shard set.

It grows with shards, never with cells. Specified in docs/format.md. Called by pack, stream, CLI.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from scshards.base.errors import FormatError
from scshards.cells.tokenizer import ValueKind
from scshards.shards.tar import Chunks, Compression

MANIFEST = "manifest.json"
VOCAB = "vocab.json"
FORMAT_NAME, FORMAT_VERSION = "scshards", 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard: its two files, their sizes and checksums, and what is in them.

    Attributes
    ----------
    path, index_path
        Relative to the root: `train/000000.tar[.zst]`, `train/000000.parquet`.
    cells, tokens, max_genes
        Cells; stored values over all cells; values of the longest cell.
    bytes, sha256, index_bytes, index_sha256
        Of the two files as stored.
    chunks
        The chunk table of the tar.
    """

    path: str
    cells: int
    tokens: int
    max_genes: int
    bytes: int
    sha256: str
    index_path: str
    index_bytes: int
    index_sha256: str
    chunks: Chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelInfo:
    """An obs column that was kept: `category` (codes into `categories`) or `number`."""

    kind: Literal["category", "number"]
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo:
    """What became of one input: rows and columns in, cells and values out, losses by reason.

    Attributes
    ----------
    name
        As it was given to pack.
    rows, kept, dropped
        Cells in the input; kept; {reason: cells dropped}.
    columns, matched, unmatched, merged
        Gene columns; with a token; without one; sharing a token with an earlier column.
    values, unmatched_values
        Values stored; non-zero values of read cells that lay in unmatched columns.
    """

    name: str
    rows: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    columns: int
    matched: int
    unmatched: int
    merged: int
    values: int
    unmatched_values: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole of a shard set; see the fields of its parts.

    Attributes
    ----------
    vocab_size, vocab_fingerprint
        Of vocab.json.
    value_kind
        "counts" (LEB128) or "float" (little-endian float32).
    compression
        Of the tars.
    labels
        The obs columns kept, in the order they have in each member.
    splits
        {split: its shards in order}.
    sources
        In the order of their ordinals.
    options
        What pack was asked for, seed included.
    """

    vocab_size: int
    vocab_fingerprint: str
    value_kind: ValueKind
    compression: Compression
    labels: Mapping[str, LabelInfo]
    splits: Mapping[str, tuple[ShardInfo, ...]]
    sources: tuple[SourceInfo, ...]
    options: Mapping[str, Any]

    def cells(self, split: str) -> int:
        """Cells of a split."""
        return sum(s.cells for s in self.splits[split])

    def tokens(self, split: str) -> int:
        """Stored values of a split, over all its cells."""
        return sum(s.tokens for s in self.splits[split])

    def fingerprint(self, split: str) -> str:
        """SHA-256 (hex) of what makes the stream of a split what it is: vocabulary and shards."""
        h = hashlib.sha256()
        parts = [str(FORMAT_VERSION), self.vocab_fingerprint, self.value_kind, split]
        parts += [f"{s.path} {s.cells} {s.sha256}" for s in self.splits[split]]
        h.update("\n".join(parts).encode())
        return h.hexdigest()

    def to_json(self) -> bytes:
        """The file's bytes: indented, with one line for each shard."""
        lines: list[str] = []

        def shard(info: ShardInfo) -> str:
            lines.append(json.dumps(_shard_to_json(info), ensure_ascii=False))
            return f"@shard {len(lines) - 1}@"

        tree = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "vocab": {
                "file": VOCAB,
                "size": self.vocab_size,
                "fingerprint": self.vocab_fingerprint,
            },
            "genes": {"encoding": "delta-leb128"},
            "values": {
                "kind": self.value_kind,
                "encoding": "leb128" if self.value_kind == "counts" else "float32-le",
            },
            "compression": self.compression,
            "labels": {
                name: {"kind": c.kind, "categories": list(c.categories)}
                if c.kind == "category"
                else {"kind": c.kind}
                for name, c in self.labels.items()
            },
            "splits": {
                name: {
                    "cells": sum(s.cells for s in shards),
                    "tokens": sum(s.tokens for s in shards),
                    "bytes": sum(s.bytes for s in shards),
                    "shards": [shard(s) for s in shards],
                }
                for name, shards in self.splits.items()
            },
            "sources": [_source_to_json(s) for s in self.sources],
            "options": dict(self.options),
        }
        text = json.dumps(tree, indent=1, ensure_ascii=False)
        head, *rest = text.split('"@shard ')
        for part in rest:
            number, _, after = part.partition('@"')
            head += lines[int(number)] + after
        return head.encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes | str, *, where: object = None) -> Manifest:
        """Parse a manifest; FormatError says what is wrong with it."""
        try:
            tree = json.loads(data)
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise FormatError(f"the manifest is not valid JSON: {e}", where=where) from None
        if not isinstance(tree, dict) or tree.get("format") != FORMAT_NAME:
            raise FormatError("this is not the manifest of a shard set", where=where)
        if tree.get("version") != FORMAT_VERSION:
            raise FormatError(
                f"format version {tree.get('version')!r} is not {FORMAT_VERSION}",
                where=where,
                advice="read it with the version of scshards that packed it",
            )
        try:
            manifest = cls(
                vocab_size=tree["vocab"]["size"],
                vocab_fingerprint=tree["vocab"]["fingerprint"],
                value_kind=tree["values"]["kind"],
                compression=tree["compression"],
                labels={
                    name: LabelInfo(kind=c["kind"], categories=tuple(c.get("categories", ())))
                    for name, c in tree["labels"].items()
                },
                splits={
                    name: tuple(_shard_from_json(s) for s in split["shards"])
                    for name, split in tree["splits"].items()
                },
                sources=tuple(SourceInfo(**_flat_source(s)) for s in tree["sources"]),
                options=tree["options"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FormatError(
                f"the manifest is incomplete: {type(e).__name__} {e}",
                where=where,
                advice="restore it from a good copy, or pack again",
            ) from None
        if manifest.value_kind not in ("counts", "float") or manifest.compression not in (
            "none",
            "zstd",
        ):
            raise FormatError("the manifest names an unknown encoding", where=where)
        for name, shards in manifest.splits.items():
            for s in shards:
                if s.cells != int(s.chunks.cells.sum()) or s.bytes != int(s.chunks.stored.sum()):
                    raise FormatError(
                        f"the chunks of {s.path} do not add up to the shard",
                        where=f"{where} ({name})",
                    )
        return manifest


def _shard_to_json(s: ShardInfo) -> dict[str, Any]:
    c = s.chunks
    chunks = {"cells": c.cells.tolist(), "bytes": c.stored.tolist()}
    if not np.array_equal(c.raw, c.stored):
        chunks["raw_bytes"] = c.raw.tolist()
    return {
        "path": s.path,
        "cells": s.cells,
        "tokens": s.tokens,
        "max_genes": s.max_genes,
        "bytes": s.bytes,
        "sha256": s.sha256,
        "index": {"path": s.index_path, "bytes": s.index_bytes, "sha256": s.index_sha256},
        "chunks": {**chunks, "xxh64": " ".join(f"{int(x):016x}" for x in c.sums)},
    }


def _shard_from_json(tree: dict[str, Any]) -> ShardInfo:
    chunks, index = tree["chunks"], tree["index"]
    stored = np.array(chunks["bytes"], np.int64)
    raw = np.array(chunks["raw_bytes"], np.int64) if "raw_bytes" in chunks else stored
    sums = np.array([int(x, 16) for x in chunks["xxh64"].split()], np.uint64)
    cells = np.array(chunks["cells"], np.int64)
    if not len(cells) == len(stored) == len(raw) == len(sums):
        raise ValueError(f"the chunk table of {tree['path']} is uneven")
    return ShardInfo(
        path=tree["path"],
        cells=tree["cells"],
        tokens=tree["tokens"],
        max_genes=tree["max_genes"],
        bytes=tree["bytes"],
        sha256=tree["sha256"],
        index_path=index["path"],
        index_bytes=index["bytes"],
        index_sha256=index["sha256"],
        chunks=Chunks(cells=cells, stored=stored, raw=raw, sums=sums),
    )


def _source_to_json(s: SourceInfo) -> dict[str, Any]:
    return {
        "name": s.name,
        "cells": {"rows": s.rows, "kept": s.kept, "dropped": dict(s.dropped)},
        "genes": {
            "columns": s.columns,
            "matched": s.matched,
            "unmatched": s.unmatched,
            "merged": s.merged,
        },
        "values": {"stored": s.values, "unmatched": s.unmatched_values},
    }


def _flat_source(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": tree["name"],
        **tree["cells"],
        **tree["genes"],
        "values": tree["values"]["stored"],
        "unmatched_values": tree["values"]["unmatched"],
    }

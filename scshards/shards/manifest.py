"""The manifest: what a shard set holds. Written last: without it there is no shard set.

It grows with shards, never with cells. Specified in docs/format.md. Called by pack, stream, CLI.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.cells.tokenizer import ValueKind
from scshards.shards import Compression
from scshards.shards.tar import Chunks

MANIFEST = "manifest.json"
VOCAB = "vocab.json"
FORMAT_NAME, FORMAT_VERSION = "scshards", 1
GENES_ENCODING = "delta-leb128"
VALUES_ENCODING = {"counts": "leb128", "float": "float32-le"}
_PATH = re.compile(r"\w[\w-]*/\w[\w.-]*")
_OPEN, _TOO_LARGE = 4, 1 << 63
_SEAL = ',\n "sha256": "'


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
    left_out
        {type: features that are no gene columns}, such as antibodies.
    values, unmatched_values
        Values stored; non-zero values of read cells that lay in unmatched columns.
    bytes
        Of its members, before padding and compression.
    """

    name: str
    rows: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    columns: int
    matched: int
    unmatched: int
    merged: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    values: int
    unmatched_values: int
    bytes: int


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
    requests
        SHA-256 (hex) of what each call that made or added to the set was asked for, the state of its
        inputs included; a set that an older version made has none.
    """

    vocab_size: int
    vocab_fingerprint: str
    value_kind: ValueKind
    compression: Compression
    labels: Mapping[str, LabelInfo]
    splits: Mapping[str, tuple[ShardInfo, ...]]
    sources: tuple[SourceInfo, ...]
    options: Mapping[str, Any]
    requests: tuple[str, ...] = ()

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
        """The file's bytes: indented, one line for each shard, and last the SHA-256 of all before it."""
        tree = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "vocab": {
                "file": VOCAB,
                "size": self.vocab_size,
                "fingerprint": self.vocab_fingerprint,
            },
            "genes": {"encoding": GENES_ENCODING},
            "values": {
                "kind": self.value_kind,
                "encoding": VALUES_ENCODING[self.value_kind],
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
                    "shards": [shard_to_json(s) for s in shards],
                }
                for name, shards in self.splits.items()
            },
            "sources": [_source_to_json(s) for s in self.sources],
            "options": dict(self.options),
        }
        if self.requests:
            tree["requests"] = list(self.requests)
        # A file name that is no UTF-8 comes as lone surrogates, which JSON spells with a backslash.
        body = _layout(tree).removesuffix("\n}").encode(errors="backslashreplace")
        return body + f'{_SEAL}{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes | str, *, where: object = None) -> Manifest:
        """Parse a manifest; FormatError says what is wrong with it."""
        try:
            tree = json.loads(data)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
            raise FormatError(f"the manifest is not valid JSON: {e}", where=where) from None
        if not isinstance(tree, dict) or tree.get("format") != FORMAT_NAME:
            raise FormatError("this is not the manifest of a shard set", where=where)
        if tree.get("version") != FORMAT_VERSION or type(tree["version"]) is not int:
            raise FormatError(
                f"format version {tree.get('version')!r} is not {FORMAT_VERSION}",
                where=where,
                advice="read it with the version of scshards that packed it",
            )
        try:
            return cls._from_tree(tree)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            missing = "there is no " if isinstance(e, KeyError) else ""
            raise FormatError(
                f"the manifest is damaged: {missing}{e}",
                where=where,
                advice="restore it from a good copy, or pack again",
            ) from None

    @classmethod
    def _from_tree(cls, tree: dict[str, Any]) -> Manifest:
        kind, compression = tree["values"]["kind"], tree["compression"]
        if (
            VALUES_ENCODING.get(kind) != tree["values"]["encoding"]
            or tree["genes"]["encoding"] != GENES_ENCODING
            or compression not in ("none", "zstd")
            or tree["vocab"]["file"] != VOCAB
        ):
            raise ValueError("it names an encoding or a file that format 1 does not have")
        if not isinstance(tree["options"], dict):
            raise ValueError("the options are no table")
        return cls(
            vocab_size=_number(tree["vocab"]["size"]),
            vocab_fingerprint=_text(tree["vocab"]["fingerprint"]),
            value_kind=kind,
            compression=compression,
            labels={name: _label_from_json(c) for name, c in tree["labels"].items()},
            splits={name: _split_from_json(split) for name, split in tree["splits"].items()},
            sources=tuple(_source_from_json(s) for s in tree["sources"]),
            options=dict(tree["options"]),
            requests=tuple(_text(r) for r in tree.get("requests", ())),
        )


def seal_holds(data: bytes) -> bool:
    """Whether a manifest's bytes are those that were written, by the SHA-256 in its last field."""
    body, seal, rest = data.rpartition(_SEAL.encode())
    return bool(seal) and rest == f'{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _layout(value: Any, depth: int = 0) -> str:
    """Indented JSON text in which whatever lies `_OPEN` deep, such as a shard, is one line."""
    if depth == _OPEN or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        items = [
            f"{json.dumps(k, ensure_ascii=False)}: {_layout(v, depth + 1)}"
            for k, v in value.items()
        ]
    else:
        items = [_layout(v, depth + 1) for v in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    pad = "\n" + " " * depth
    return opening + ",".join(f"{pad} {item}" for item in items) + pad + closing


def shard_to_json(s: ShardInfo) -> dict[str, Any]:
    """A shard as the manifest tells it, ready for JSON."""
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


def _split_from_json(tree: dict[str, Any]) -> tuple[ShardInfo, ...]:
    shards = tuple(shard_from_json(s) for s in tree["shards"])
    for name in ("cells", "tokens", "bytes"):
        if sum(getattr(s, name) for s in shards) != tree[name]:
            raise ValueError(f"the {name} of the shards do not add up to those of their split")
    return shards


def shard_from_json(tree: dict[str, Any]) -> ShardInfo:
    """What `shard_to_json` told; ValueError or KeyError when it is damaged."""
    path, chunks, index = _path(tree["path"]), tree["chunks"], tree["index"]
    stored = _numbers(chunks["bytes"])
    table = Chunks(
        cells=_numbers(chunks["cells"]),
        stored=stored,
        raw=_numbers(chunks["raw_bytes"]) if "raw_bytes" in chunks else stored,
        sums=np.frombuffer(bytes.fromhex(_text(chunks["xxh64"])), ">u8").astype(np.uint64),
    )
    if not len(table.cells) == len(table.stored) == len(table.raw) == len(table.sums):
        raise ValueError(f"the chunk table of {path} is uneven")
    shard = ShardInfo(
        path=path,
        cells=_number(tree["cells"]),
        tokens=_number(tree["tokens"]),
        max_genes=_number(tree["max_genes"]),
        bytes=_number(tree["bytes"]),
        sha256=_text(tree["sha256"]),
        index_path=_path(index["path"]),
        index_bytes=_number(index["bytes"]),
        index_sha256=_text(index["sha256"]),
        chunks=table,
    )
    if shard.cells != sum(chunks["cells"]) or shard.bytes != sum(chunks["bytes"]):
        raise ValueError(f"the chunks of {path} do not add up to the shard")
    return shard


def _label_from_json(tree: dict[str, Any]) -> LabelInfo:
    if tree["kind"] not in ("category", "number"):
        raise ValueError(f"{tree['kind']!r} is no kind of label")
    return LabelInfo(
        kind=tree["kind"], categories=tuple(_text(c) for c in tree.get("categories", ()))
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
            **({"left_out": dict(s.left_out)} if s.left_out else {}),
        },
        "values": {"stored": s.values, "unmatched": s.unmatched_values, "bytes": s.bytes},
    }


def _source_from_json(tree: dict[str, Any]) -> SourceInfo:
    cells, genes, values = tree["cells"], tree["genes"], tree["values"]
    return SourceInfo(
        name=_text(tree["name"]),
        rows=_number(cells["rows"]),
        kept=_number(cells["kept"]),
        dropped={_text(reason): _number(n) for reason, n in cells["dropped"].items()},
        columns=_number(genes["columns"]),
        matched=_number(genes["matched"]),
        unmatched=_number(genes["unmatched"]),
        merged=_number(genes["merged"]),
        left_out={_text(kind): _number(n) for kind, n in genes.get("left_out", {}).items()},
        values=_number(values["stored"]),
        unmatched_values=_number(values["unmatched"]),
        bytes=_number(values["bytes"]),
    )


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _TOO_LARGE:
        raise ValueError(f"{value!r:.60} stands where a number from 0 belongs")
    return value


def _numbers(values: Any) -> NDArray[np.int64]:
    """As `_number` of each; a set of 100 million cells has 1.5 million of them."""
    if not isinstance(values, list) or set(map(type, values)) - {int}:
        raise ValueError(f"{values!r:.60} stands where a list of numbers belongs")
    if values and min(values) < 0:
        raise ValueError(f"{min(values)} stands where a number from 0 belongs")
    return np.array(values, np.int64)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} stands where text belongs")
    return value


def _path(value: Any) -> str:
    """A path below the root: a manifest must not lead its reader to other files."""
    if not _PATH.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is no path of a shard")
    return str(value)

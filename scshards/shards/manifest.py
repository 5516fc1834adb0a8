"""The manifest: what a shard set holds. Written last: without it there is no shard set.

It grows with shards, never with cells. Specified in docs/format.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from scshards.base.errors import FormatError
from scshards.base.records import Damaged, Record, read_json
from scshards.cells.tokenizer import ValueKind
from scshards.shards import Compression
from scshards.shards.tar import Chunks

MANIFEST = "manifest.json"
VOCAB = "vocab.json"
FORMAT_NAME, FORMAT_VERSION = "scshards", 1
GENES_ENCODING = "delta-leb128"
RECORD = "record"
"""The key among the options that holds what they are not: requests, and more of each source."""

VALUES_ENCODING = {"counts": "leb128", "float": "float32-le"}
_PATH = re.compile(r"\w[\w-]*/\w[\w.-]*")
_NAME = re.compile(r"\w[\w-]*")
_OPEN = 4
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
    gene_column
        The column of var that named its genes, "index" its index.
    ids
        The share of its genes that are Ensembl ids.
    shared
        The genes that it has in common with another input of that pack, of those of the smaller of the
        two, at the least over all others.
    identity
        What tells it from other inputs: its address `at`, `size`, what its storage says of its state,
        the `values` of its matrix, and `cells`, a hash of the names of its cells.
    values, unmatched_values
        Values stored; non-zero values of read cells that lay in unmatched columns.
    rounded
        Values of read cells that were off a whole number, and were taken as it.
    bytes
        Of its members, before padding and compression.
    skipped
        Why the whole input was left out; "" when it was not.
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
    gene_column: str | None = None
    ids: float | None = None
    shared: float | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    values: int
    unmatched_values: int
    rounded: int = 0
    bytes: int
    skipped: str = ""


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
            "options": self._options_to_json(),
        }
        # A file name that is no UTF-8 comes as lone surrogates, which JSON spells with a backslash.
        body = _layout(tree).removesuffix("\n}").encode(errors="backslashreplace")
        return body + f'{_SEAL}{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()

    def _options_to_json(self) -> dict[str, Any]:
        """The options, and under RECORD what the first version does not tell.

        Its `verify` writes the manifest again to compare it, and keeps unknown fields in options alone.
        """
        record: dict[str, Any] = {"requests": list(self.requests)} if self.requests else {}
        more = [_more_to_json(s) for s in self.sources]
        if any(more):
            record["sources"] = more
        return {**self.options, **({RECORD: record} if record else {})}

    @classmethod
    def from_json(cls, data: bytes | str, *, where: object = None) -> Manifest:
        """Parse a manifest; FormatError says what is wrong with it, and in which of its fields."""
        try:
            tree = read_json(data)
            if not isinstance(tree, dict) or tree.get("format") != FORMAT_NAME:
                raise FormatError("this is not the manifest of a shard set", where=where)
            if type(tree.get("version")) is not int or tree["version"] != FORMAT_VERSION:
                raise FormatError(
                    f"format version {tree.get('version')!r:.60} is not {FORMAT_VERSION}",
                    where=where,
                    advice="read it with the version of scshards that packed it",
                )
            return cls._from_record(Record(tree))
        except Damaged as e:
            raise FormatError(
                f"the manifest is damaged: {e}",
                where=where,
                advice="restore it from a good copy, or pack again",
            ) from None

    @classmethod
    def _from_record(cls, tree: Record) -> Manifest:
        vocab, values = tree.record("vocab"), tree.record("values")
        kind = values.one_of("kind", VALUES_ENCODING)
        values.one_of("encoding", (VALUES_ENCODING[kind],))
        tree.record("genes").one_of("encoding", (GENES_ENCODING,))
        vocab.one_of("file", (VOCAB,))
        options = tree.record("options")
        record = options.record(RECORD) if RECORD in options else Record({})
        sources = list(tree.records("sources"))
        more = list(record.records("sources")) if "sources" in record else []
        if len(more) > len(sources):
            raise record.wrong("sources", "they are more than the sources of the set")
        more += [Record({})] * (len(sources) - len(more))
        return cls(
            vocab_size=vocab.number("size"),
            vocab_fingerprint=vocab.text("fingerprint"),
            value_kind=cast(ValueKind, kind),
            compression=cast(Compression, tree.one_of("compression", ("none", "zstd"))),
            labels={name: _label_from(label) for name, label in tree.tables("labels")},
            splits={name: _split_from(name, split) for name, split in tree.tables("splits")},
            sources=tuple(_source_from(s, m) for s, m in zip(sources, more, strict=True)),
            options={k: v for k, v in tree.plain("options").items() if k != RECORD},
            requests=record.texts("requests") if "requests" in record else (),
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


def _split_from(name: str, tree: Record) -> tuple[ShardInfo, ...]:
    if not _NAME.fullmatch(name):
        # Its shards are in a folder of that name: a manifest must not lead its reader elsewhere.
        raise tree.wrong("", "this is no name of a split")
    shards = tuple(_shard_from(shard) for shard in tree.records("shards"))
    for count in ("cells", "tokens", "bytes"):
        if sum(getattr(s, count) for s in shards) != tree.number(count):
            raise tree.wrong(count, f"the {count} of its shards do not add up to that")
    return shards


def shard_from_json(tree: dict[str, Any]) -> ShardInfo:
    """What `shard_to_json` told; ValueError when it is damaged."""
    return _shard_from(Record(tree))


def _shard_from(tree: Record) -> ShardInfo:
    chunks, index = tree.record("chunks"), tree.record("index")
    stored = chunks.numbers("bytes")
    try:
        sums = np.frombuffer(bytes.fromhex(chunks.text("xxh64")), ">u8").astype(np.uint64)
    except ValueError as e:
        raise e if isinstance(e, Damaged) else chunks.wrong("xxh64", "no checksums") from None
    table = Chunks(
        cells=chunks.numbers("cells"),
        stored=stored,
        raw=chunks.numbers("raw_bytes") if "raw_bytes" in chunks else stored,
        sums=sums,
    )
    if not len(table.cells) == len(table.stored) == len(table.raw) == len(table.sums):
        raise chunks.wrong("", "the chunk table is uneven")
    shard = ShardInfo(
        path=_path(tree),
        cells=tree.number("cells"),
        tokens=tree.number("tokens"),
        max_genes=tree.number("max_genes"),
        bytes=tree.number("bytes"),
        sha256=tree.text("sha256"),
        index_path=_path(index),
        index_bytes=index.number("bytes"),
        index_sha256=index.text("sha256"),
        chunks=table,
    )
    for count in ("cells", "bytes"):
        if getattr(shard, count) != sum(chunks.any(count)):
            raise tree.wrong(count, f"the {count} of its chunks do not add up to that")
    return shard


def _label_from(tree: Record) -> LabelInfo:
    kind = tree.one_of("kind", ("category", "number"))
    categories = tree.texts("categories") if "categories" in tree else ()
    return LabelInfo(kind=cast(Literal["category", "number"], kind), categories=categories)


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
        "values": {"stored": s.values, "unmatched": s.unmatched_values, "bytes": s.bytes},
    }


_MORE = ("gene_column", "ids", "shared", "left_out", "identity", "rounded", "skipped")
"""What is told of a source under RECORD, where there is something to tell."""


def _more_to_json(s: SourceInfo) -> dict[str, Any]:
    found = {name: getattr(s, name) for name in _MORE}
    empty = {f.name: f.default for f in dataclasses.fields(s)} | {"left_out": {}, "identity": {}}
    return {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in found.items()
        if value != empty[name]
    }


def _source_from(tree: Record, more: Record) -> SourceInfo:
    cells, genes, values = tree.record("cells"), tree.record("genes"), tree.record("values")
    return SourceInfo(
        name=tree.text("name"),
        rows=cells.number("rows"),
        kept=cells.number("kept"),
        dropped=cells.counts("dropped"),
        columns=genes.number("columns"),
        matched=genes.number("matched"),
        unmatched=genes.number("unmatched"),
        merged=genes.number("merged"),
        left_out=more.counts("left_out") if "left_out" in more else {},
        gene_column=more.text("gene_column") if "gene_column" in more else None,
        ids=more.share("ids") if "ids" in more else None,
        shared=more.share("shared") if "shared" in more else None,
        identity=_identity(more) if "identity" in more else {},
        values=values.number("stored"),
        unmatched_values=values.number("unmatched"),
        rounded=more.number("rounded") if "rounded" in more else 0,
        bytes=values.number("bytes"),
        skipped=more.text("skipped") if "skipped" in more else "",
    )


def _identity(tree: Record) -> dict[str, Any]:
    found, record = tree.plain("identity"), tree.record("identity")
    for name in {"at", "cells"} & found.keys():
        record.text(name)
    return found


def _path(tree: Record) -> str:
    """A path below the root: a manifest must not lead its reader to other files."""
    path = tree.text("path")
    if not _PATH.fullmatch(path):
        raise tree.wrong("path", f"{path!r:.60} is no path of a shard")
    return path

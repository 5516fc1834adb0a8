"""The manifest: what a shard set holds. Written last: without it there is no shard set.

It grows with shards, never with cells. Specified in docs/reference/format.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.base.memory import collected_apart
from scshards.base.records import (
    At,
    Count,
    Damaged,
    Form,
    Share,
    Within,
    from_tree,
    read_json,
    shown,
    to_tree,
)
from scshards.cells.tokenizer import ValueKind
from scshards.kernels.members import MEMBER_BOUND
from scshards.shards import Compression
from scshards.shards.mending import manifest_again
from scshards.shards.tar import CHUNK_BYTES, Chunks

MANIFEST = "manifest.json"
VOCAB = "vocab.json"
FORMAT_NAME, FORMAT_VERSION = "scshards", 1
GENES_ENCODING = "delta-leb128"
RECORD = "record"
"""The key among the options that holds what they are not: requests, and more of each source."""

VALUES_ENCODING = {"counts": "leb128", "float": "float32-le"}
MINOR_VERSION = 1
"""Of a set with arrays: what readers of version 1 skip, and need not know."""

DENSE_DTYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"
)  # fmt: skip
SPARSE_DTYPES = ("int32", "float32")
MAX_WIDTH = 1 << 24
"""Most columns of an array."""

_OPEN = 4
_SEAL = ',\n "sha256": "'

_PATH, _NAME = re.compile(r"\w[\w-]*/\w[\w.-]*"), re.compile(r"\w[\w-]*")

_HEX, _SURROGATE = re.compile("[0-9a-f]{64}"), re.compile("[\ud800-\udfff]")

_LARGEST_VOCAB = 1 << 31
_LEAST_CELL = 1024
"""Bytes of a cell in a tar: a header and a block, at the least."""

_LARGE = 1 << 20
"""Bytes of a manifest that becomes so many objects that collecting garbage takes a third of the time."""


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

    path: _Path
    cells: Count
    tokens: Count
    max_genes: Count
    bytes: Count
    sha256: _Sum
    index_path: Annotated[_Path, At("index.path")]
    index_bytes: Annotated[Count, At("index.bytes")]
    index_sha256: Annotated[_Sum, At("index.sha256")]
    chunks: Annotated[Chunks, Form(_read_chunks, _write_chunks)]

    def __post_init__(self) -> None:
        for name, parts in (("cells", self.chunks.cells), ("bytes", self.chunks.stored)):
            if getattr(self, name) != sum(parts.tolist()):
                raise Damaged(f"the {name} of its chunks do not add up to that", name)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelInfo:
    """An obs column that was kept: `category` (codes into `categories`) or `number`."""

    kind: Literal["category", "number"]
    categories: tuple[_Text, ...] = ()

    def named(self, value: float) -> str | float | None:
        """A number as it is; of a code its category, None where it is missing."""
        if self.kind == "number":
            return value
        return None if value < 0 else self.categories[int(value)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayInfo:
    """An array beside the genes of each cell, such as proteins: a row of `width` numbers (format 1.1).

    Attributes
    ----------
    kind
        "dense": all numbers. "sparse": those that are not 0, with their columns.
    dtype
        Of the numbers: for a dense array any of DENSE_DTYPES, for a sparse one "int32" (whole numbers
        from 1 on) or "float32".
    width
        How many columns there are.
    columns
        Their names, where the input has some.
    source
        What it is in the input: "obsm", or columns of the matrix that are of a "feature_type".
    """

    kind: Literal["dense", "sparse"]
    dtype: str
    width: Annotated[int, Within(1, MAX_WIDTH)]
    columns: tuple[_Text, ...] | None = None
    source: Literal["obsm", "feature_type"]

    def __post_init__(self) -> None:
        if self.dtype not in (DENSE_DTYPES if self.kind == "dense" else SPARSE_DTYPES):
            raise Damaged(f"{self.dtype!r} is no type of a {self.kind} array", "dtype")
        if self.columns is not None and len(self.columns) != self.width:
            raise Damaged(f"{len(self.columns)} names for {self.width} columns", "columns")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a dense array."""
        return self.width * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecord:
    """What is told of an input beside what the first version tells; nothing, where a set has no record.

    Attributes
    ----------
    gene_column
        The column of var that named its genes, "index" its index.
    ids
        The share of its genes that are Ensembl ids.
    shared
        The genes that it has in common with another input of that pack, of those of the smaller of the
        two, at the least over all others.
    left_out
        {type: features that are no gene columns}, such as antibodies.
    identity
        What tells it from other inputs: its address `at`, `size`, what its storage says of its state,
        the `values` of its matrix, and `cells`, a hash of the names of its cells.
    rounded
        Values of read cells that were off a whole number, and were taken as it.
    skipped
        Why the whole input was left out; "" when it was not.
    """

    gene_column: str | None = None
    ids: Share | None = None
    shared: Share | None = None
    left_out: Mapping[str, Count] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    rounded: Count = 0
    skipped: str = ""

    def __post_init__(self) -> None:
        for name in ("at", "cells"):
            if not isinstance(said := self.identity.get(name, ""), str):
                raise Damaged(f"a text is needed, not {shown(said)}", f"identity.{name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo(SourceRecord):
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
    bytes
        Of its members, before padding and compression.
    """

    name: str
    rows: Annotated[Count, At("cells.rows")]
    kept: Annotated[Count, At("cells.kept")]
    dropped: Annotated[Mapping[str, Count], At("cells.dropped")]
    columns: Annotated[Count, At("genes.columns")]
    matched: Annotated[Count, At("genes.matched")]
    unmatched: Annotated[Count, At("genes.unmatched")]
    merged: Annotated[Count, At("genes.merged")]
    values: Annotated[Count, At("values.stored")]
    unmatched_values: Annotated[Count, At("values.unmatched")]
    bytes: Annotated[Count, At("values.bytes")]


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
    arrays
        The arrays beside the genes of each cell, in the order they have in its second member.
    """

    vocab_size: Annotated[Count, At("vocab.size")]
    vocab_fingerprint: Annotated[_Sum, At("vocab.fingerprint")]
    value_kind: Annotated[ValueKind, At("values.kind")]
    compression: Compression
    labels: Mapping[_Text, LabelInfo]
    splits: Annotated[Mapping[str, tuple[ShardInfo, ...]], Form(_read_splits, _write_splits)]
    sources: tuple[SourceInfo, ...]
    options: Mapping[str, Any]
    requests: tuple[str, ...] = ()
    arrays: Mapping[_Text, ArrayInfo] = field(default_factory=dict)

    def cells(self, split: str) -> int:
        """Cells of a split."""
        return sum(s.cells for s in self.splits[split])

    def tokens(self, split: str) -> int:
        """Stored values of a split, over all its cells."""
        return sum(s.tokens for s in self.splits[split])

    def fingerprint(self, split: str) -> str:
        """SHA-256 (hex) of what makes the stream of a split what it is: vocabulary and shards."""
        return list(self._fingerprints(split))[-1]

    def shards_at(self, split: str, fingerprint: str) -> int | None:
        """How many shards a split had when this was its fingerprint; None if it never was."""
        each = enumerate(self._fingerprints(split))
        return next((n for n, one in each if one == fingerprint), None)

    def _fingerprints(self, split: str) -> Iterator[str]:
        """The fingerprint of a split of no shard, of its first one, of its first two, and so on."""
        parts = [str(FORMAT_VERSION), self.vocab_fingerprint, self.value_kind, split]
        h = hashlib.sha256("\n".join(parts).encode())
        yield h.hexdigest()
        for s in self.splits[split]:
            h.update(f"\n{s.path} {s.cells} {s.sha256}".encode())
            yield h.hexdigest()

    def check_sizes(self, where: object) -> None:
        """FormatError for sizes that no set of format 1 has: memory is taken by them, unread.

        A chunk is CHUNK_BYTES and a cell at most, a cell takes 1,024 bytes of tar at least, and an index
        some 64 bytes for each number.
        """
        try:
            if self.vocab_size > _LARGEST_VOCAB:
                raise Damaged("no vocabulary is so large", "vocab.size")
            most = CHUNK_BYTES + self._largest_cell()
            for split, shards in self.splits.items():
                for i, shard in enumerate(shards):
                    if wrong := self._wrong_size(shard, most):
                        raise Damaged(wrong, f"splits.{split}.shards[{i}]")
        except Damaged as e:
            raise FormatError(
                f"the manifest can't be: {e}", where=where, advice="get the set from who made it"
            ) from None

    def _wrong_size(self, shard: ShardInfo, most: int) -> str | None:
        """What is wrong with the sizes of a shard whose chunks have `most` bytes."""
        cells, raw, stored = shard.chunks.cells, shard.chunks.raw, shard.chunks.stored
        # zstd makes what can't be compressed longer by a 256th.
        if max(raw.max(initial=0), stored.max(initial=0)) > most + most // 256 + 512:
            return "a chunk is larger than a mebibyte and a cell"
        if self.compression == "none" and not np.array_equal(raw, stored):
            return "its raw_bytes are not its bytes, though it is a plain tar"
        if (cells > raw // _LEAST_CELL).any():
            return "a chunk has no room for its cells"
        if shard.index_bytes > (1 << 20) + (shard.cells + 1000) * (16 + len(self.labels)) * 64:
            return "no index of so few cells is so large"
        return None

    def _largest_cell(self) -> int:
        """Bytes that a cell can take in a tar, with the closing blocks."""
        labels = sum(len(name.encode()) + 16 for name in self.labels)
        size = 2 * MEMBER_BOUND + 15 * self.vocab_size + labels
        for name, info in self.arrays.items():
            row = info.row_bytes if info.kind == "dense" else MEMBER_BOUND + 15 * info.width
            size += len(name.encode()) + 16 + row
        return size + 4 * _LEAST_CELL

    def to_json(self) -> bytes:
        """The file's bytes: indented, one line for each shard, and last the SHA-256 of all before it."""
        said = to_tree(self)
        tree: dict[str, Any] = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            **({"minor": MINOR_VERSION} if self.arrays else {}),
            "vocab": {"file": VOCAB, **said["vocab"]},
            "genes": {"encoding": GENES_ENCODING},
            "values": {**said["values"], "encoding": VALUES_ENCODING[self.value_kind]},
        }
        after = ("arrays",) if self.arrays else ()
        names = ("compression", "labels", *after, "splits", "sources", "options")
        tree |= {n: said[n] for n in names}
        for label in tree["labels"].values():
            if label["kind"] == "number":
                del label["categories"]
        # The first version's `verify` writes the manifest again to compare it, and keeps unknown fields
        # in options alone: what it does not tell goes there.
        nothing = to_tree(SourceRecord())
        more = [{n: source.pop(n) for n in nothing} for source in tree["sources"]]
        more = [{n: v for n, v in said.items() if v != nothing[n]} for said in more]
        record: dict[str, Any] = {"requests": list(self.requests)} if self.requests else {}
        record |= {"sources": more} if any(more) else {}
        tree["options"] |= {RECORD: record} if record else {}
        # A file name that is no UTF-8 comes as lone surrogates, which JSON spells with a backslash.
        body = _layout(tree).removesuffix("\n}").encode(errors="backslashreplace")
        return body + f'{_SEAL}{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes | str, *, root: str | None = None) -> Manifest:
        """Parse a manifest; FormatError says what is wrong with it, and in which of its fields.

        `root` is the address of its shard set, for messages.
        """
        where = None if root is None else f"{root}/{MANIFEST}"
        try:
            with collected_apart if len(data) > _LARGE else contextlib.nullcontext():
                tree = read_json(data)
                if not isinstance(tree, dict) or tree.get("format") != FORMAT_NAME:
                    raise FormatError("this is not the manifest of a shard set", where=where)
                if type(tree.get("version")) is not int or tree["version"] != FORMAT_VERSION:
                    raise FormatError(
                        f"format version {tree.get('version')!r:.60} is not {FORMAT_VERSION}",
                        where=where,
                        advice="read it with the version of scshards that packed it",
                    )
                return cls._of_tree(tree)
        except Damaged as e:
            raise FormatError(
                f"the manifest is damaged: {e}",
                where=where,
                advice=manifest_again(root) if root is not None else None,
            ) from None

    @classmethod
    def _of_tree(cls, tree: dict[str, Any]) -> Manifest:
        file, fixed = from_tree(cls, tree, others=True), from_tree(_Fixed, tree, others=True)
        if fixed.values != VALUES_ENCODING[file.value_kind]:
            raise Damaged(f"not that of {file.value_kind}", "values.encoding")
        options = dict(file.options)
        try:
            record = from_tree(_Record, options.pop(RECORD, {}), others=True)
            if len(record.sources) > len(file.sources):
                raise Damaged("they are more than the sources of the set", "sources")
        except Damaged as e:
            raise e.below(f"options.{RECORD}") from None
        sources = list(file.sources)
        for i, more in enumerate(record.sources):
            names = (f.name for f in dataclasses.fields(more))
            sources[i] = dataclasses.replace(sources[i], **{n: getattr(more, n) for n in names})
        return dataclasses.replace(
            file, sources=tuple(sources), options=options, requests=record.requests
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


# --- the file as it is -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Fixed:
    """What is the same in all manifests of this version."""

    vocab: Annotated[Literal["vocab.json"], At("vocab.file")] = "vocab.json"
    genes: Annotated[Literal["delta-leb128"], At("genes.encoding")]
    values: Annotated[str, At("values.encoding")]


@dataclass(frozen=True, kw_only=True)
class _Record:
    requests: tuple[str, ...] = ()
    sources: tuple[SourceRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Split:
    cells: Count
    tokens: Count
    bytes: Count
    shards: tuple[ShardInfo, ...]

    def __post_init__(self) -> None:
        for name in _SUMS:
            if getattr(self, name) != sum(getattr(s, name) for s in self.shards):
                raise Damaged(f"the {name} of its shards do not add up to that", name)


def _read_splits(tree: Any) -> dict[str, tuple[ShardInfo, ...]]:
    splits = from_tree(dict[_Name, _Split], tree, others=True)
    return {name: split.shards for name, split in splits.items()}


def _write_splits(splits: Mapping[str, tuple[ShardInfo, ...]]) -> dict[str, Any]:
    return {
        name: {n: sum(getattr(s, n) for s in shards) for n in _SUMS}
        | {"shards": [to_tree(s) for s in shards]}
        for name, shards in splits.items()
    }


@dataclass(frozen=True, kw_only=True)
class _ChunkTable:
    cells: _Numbers
    bytes: _Numbers
    raw_bytes: _Numbers | None = None
    xxh64: str


def _read_chunks(tree: Any) -> Chunks:
    said = from_tree(_ChunkTable, tree, others=True)
    try:
        sums = np.frombuffer(bytes.fromhex(said.xxh64), ">u8").astype(np.uint64)
    except ValueError:
        raise Damaged("no checksums", "xxh64") from None
    raw = said.bytes if said.raw_bytes is None else said.raw_bytes
    if not len(said.cells) == len(said.bytes) == len(raw) == len(sums):
        raise Damaged("the chunk table is uneven")
    return Chunks(cells=said.cells, stored=said.bytes, raw=raw, sums=sums)


def _write_chunks(c: Chunks) -> dict[str, Any]:
    chunks = {"cells": c.cells.tolist(), "bytes": c.stored.tolist()}
    if not np.array_equal(c.raw, c.stored):
        chunks["raw_bytes"] = c.raw.tolist()
    return {**chunks, "xxh64": " ".join(f"{int(x):016x}" for x in c.sums)}


def _read_numbers(values: Any) -> NDArray[np.int64]:
    # Whole lists at once: a set of 100 million cells has 1.5 million numbers.
    if type(values) is not list or set(map(type, values)) - {int}:
        raise Damaged(f"a list of whole numbers is needed, not {shown(values)}")
    if values and not 0 <= min(values) <= max(values) < 1 << 63:
        i = next(i for i, value in enumerate(values) if not 0 <= value < 1 << 63)
        raise Damaged(f"a whole number from 0 is needed, not {shown(values[i])}", f"[{i}]")
    return np.array(values, np.int64)


def _read_path(value: Any) -> str:
    return _matched(value, _PATH, "path of a shard")


def _read_name(value: Any) -> str:
    return _matched(value, _NAME, "name of a split")


def _read_sum(value: Any) -> str:
    return _matched(value, _HEX, "SHA-256")


def _read_text(value: Any) -> str:
    """A text that can be written: a file's name alone may be no Unicode."""
    if isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value)):
        return value
    raise Damaged(f"a text is needed, not {shown(value)}")


def _matched(value: Any, pattern: re.Pattern[str], what: str) -> str:
    """A text that is safe as a path below the root: a manifest must not lead its reader elsewhere."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise Damaged(f"{shown(value)} is no {what}")
    return value


_Path = Annotated[str, Form(_read_path)]
_Name = Annotated[str, Form(_read_name)]
_Sum = Annotated[str, Form(_read_sum)]
_Text = Annotated[str, Form(_read_text)]
_Numbers = Annotated[NDArray[np.int64], Form(_read_numbers)]
_SUMS = ("cells", "tokens", "bytes")

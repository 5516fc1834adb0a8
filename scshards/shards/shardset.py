"""Open a shard set: its manifest, its vocabulary, its indexes."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ChecksumError, ConfigError, FormatError, StorageError
from scshards.base.progress import counted
from scshards.base.storage import Storage
from scshards.base.text import did_you_mean
from scshards.base.threads import in_order
from scshards.cells.batch import KEY_ROW_BITS, format_key
from scshards.cells.vocab import Vocab
from scshards.shards.arrays import ArrayReader, dense_rows
from scshards.shards.chunks import read_cells
from scshards.shards.index import ARRAY_COLUMNS, OBS_PREFIX, check_bounds, read_index
from scshards.shards.manifest import MANIFEST, VOCAB, LabelInfo, Manifest, ShardInfo, seal_holds
from scshards.shards.mending import index_again, manifest_again, vocab_again

_KEY = re.compile(r"(\d{1,6})-(\d{1,10})")
_TAR = re.compile(r"(train|valid|test)/\d{6,}\.tar(\.zst)?")
_PLACE = ("source", "row", "offset", "size", "n_genes")
_AT_ONCE = 8
"""Indexes that are read at a time, to find a cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedCell:
    """One cell, in words.

    Attributes
    ----------
    key
        As members and indexes have it.
    split, shard, source
        Its split, the tar that holds it, and the name of the input that it came from.
    genes
        The names of its genes, in the order of their token ids.
    values
        uint64 or float32 [genes].
    labels
        {column: text, None where it is missing, or a number, NaN where it is missing}.
    arrays
        {array: its numbers [width]}, zeros included.
    """

    key: str
    split: str
    shard: str
    source: str
    genes: tuple[str, ...]
    values: NDArray[Any]
    labels: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class ShardSet:
    """A complete shard set on disk or in an object store.

    Parameters
    ----------
    root
        A local path or an fsspec URL.
    storage_options
        Passed to the file system.

    Attributes
    ----------
    manifest
        What there is: `manifest.splits`, `manifest.cells(split)`, `manifest.labels`, `manifest.sources`.

    Raises
    ------
    StorageError
        When there is no manifest: nothing was packed there, or packing did not finish.
    ChecksumError, FormatError
        When the manifest is damaged or of another version.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.storage = Storage(root, storage_options)
        manifest = self.storage.read_if_there(MANIFEST)
        if manifest is None and (n := shards_there(self.storage)):
            raise StorageError(
                "there is no complete shard set here: manifest.json is missing, beside "
                f"{counted(n, 'shards')}",
                where=self.storage.at(""),
                advice="if packing was interrupted, run the same command again; if the manifest was "
                f"lost, {manifest_again(self.storage.at(''))}",
            )
        if manifest is None:
            raise StorageError(
                "there is no complete shard set here: manifest.json is missing",
                where=self.storage.at(""),
                advice="check the address; if packing was interrupted, pack it again",
            )
        self.manifest = Manifest.from_json(manifest, root=self.storage.at(""))
        if not seal_holds(manifest):
            raise ChecksumError(
                "the manifest's bytes are not those that were written: its own checksum is of others",
                where=self.storage.at(MANIFEST),
                advice=f"{manifest_again(self.storage.at(''))}; it is not to be edited by hand",
            )
        self.manifest.check_sizes(self.storage.at(MANIFEST))
        self.manifest_sha256 = hashlib.sha256(manifest).hexdigest()

    @cached_property
    def vocab(self) -> Vocab:
        """The vocabulary, after its fingerprint was found to be the manifest's."""
        where = self.storage.at(VOCAB)
        vocab = Vocab.from_json(self.storage.read(VOCAB), where=where)
        if vocab.fingerprint != self.manifest.vocab_fingerprint:
            raise ChecksumError(
                "the vocabulary is not the one that these shards were packed with",
                where=where,
                advice=vocab_again(self.storage.at("")),
            )
        if len(vocab) != self.manifest.vocab_size:
            raise FormatError(
                f"it has {len(vocab)} tokens, and the manifest says {self.manifest.vocab_size}",
                where=where,
            )
        return vocab

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of a split; ConfigError names the splits there are."""
        if split not in self.manifest.splits:
            raise ConfigError(
                f"there is no split {split!r}",
                where=self.storage.at(""),
                advice=did_you_mean(split, self.manifest.splits),
            )
        return self.manifest.splits[split]

    def index(
        self,
        shard: ShardInfo,
        columns: Sequence[str] | None = None,
        data: bytes | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Columns of a shard's index, found right by its checksum and the set's bounds.

        `data` is what was read of it; without it, it is read here.
        """
        m = self.manifest
        return checked_index(self.storage, shard, columns, m.labels, len(m.sources), data)

    def cell(self, key: str | SupportsIndex) -> NamedCell:
        """The cell of a key: as text, such as ``"000002-0000001234"``, or a number of `batch.key`.

        Indexes are read until one has it, some at a time; of its shard only the chunk that holds it.

        Raises
        ------
        ConfigError
            When it is no key, or the set has no such cell.
        """
        source, row = _read_key(key)
        sources = self.manifest.sources

        def absent(advice: str) -> ConfigError:
            what = f"no cell has the key {format_key(source, row)}"
            return ConfigError(what, where=self.storage.at(""), advice=advice)

        if source >= len(sources):
            raise absent(f"the last source is {len(sources) - 1}")
        if row >= sources[source].rows:
            raise absent(f"{sources[source].name} ends with row {sources[source].rows - 1}")
        shards = [(split, s) for split, infos in self.manifest.splits.items() for s in infos]

        def look(at: tuple[str, ShardInfo]) -> tuple[str, ShardInfo, dict[str, NDArray[Any]]]:
            return *at, self._places(at[1])

        with contextlib.closing(in_order(look, shards, _AT_ONCE)) as indexes:
            for split, shard, index in indexes:
                found = np.flatnonzero((index["source"] == source) & (index["row"] == row))
                if len(found):
                    return next(self._cells(split, shard, index, found[:1]))
        raise absent(
            f"{sources[source].name} has such a row, which was dropped when it was packed: scshards info"
            " says how many, and why"
        )

    def cells(self, split: str, n: int | None = None) -> Iterator[NamedCell]:
        """The first `n` cells of a split, or all of them, in the order of its shards."""
        left = self.manifest.cells(split) if n is None else n
        for shard in self.shards(split):
            if left <= 0:
                return
            taken = np.arange(min(left, shard.cells))
            yield from self._cells(split, shard, self._places(shard), taken)
            left -= len(taken)

    def _places(self, shard: ShardInfo) -> dict[str, NDArray[Any]]:
        """What `_cells` needs of an index."""
        labels = (OBS_PREFIX + name for name in self.manifest.labels)
        return self.index(
            shard, [*_PLACE, *(ARRAY_COLUMNS if self.manifest.arrays else ()), *labels]
        )

    def _cells(
        self,
        split: str,
        shard: ShardInfo,
        index: Mapping[str, NDArray[Any]],
        taken: NDArray[np.intp],
    ) -> Iterator[NamedCell]:
        """The cells at some places of a shard, ascending."""
        m, tokens = self.manifest, self.vocab.tokens
        arrays = ArrayReader(m.arrays) if m.arrays else None
        found = read_cells(
            self.storage, shard, m.compression, index, taken, m.vocab_size, m.value_kind, arrays
        )
        for places, rows, beside in found:
            dense = {name: dense_rows(of, m.arrays[name]) for name, of in beside.items()}
            for i, place in enumerate(places.tolist()):
                source, cell = int(index["source"][place]), slice(*rows.indptr[i : i + 2].tolist())
                yield NamedCell(
                    key=format_key(source, int(index["row"][place])),
                    split=split,
                    shard=shard.path,
                    source=m.sources[source].name,
                    genes=tuple(tokens[g] for g in rows.genes[cell].tolist()),
                    values=rows.values[cell],
                    labels={
                        name: info.named(index[OBS_PREFIX + name][place].item())
                        for name, info in m.labels.items()
                    },
                    arrays={name: numbers[i] for name, numbers in dense.items()},
                )


def _read_key(key: str | SupportsIndex) -> tuple[int, int]:
    """The source and the row of a key."""
    if isinstance(key, str):
        match = _KEY.fullmatch(key)
        if match is not None:
            return int(match[1]), int(match[2])
    else:
        number = operator.index(key)
        if number >= 0:
            return number >> KEY_ROW_BITS, number & ((1 << KEY_ROW_BITS) - 1)
    raise ConfigError(
        f"{key!r} is no key of a cell",
        advice="it is the input's number, a hyphen and the row, such as 000002-0000001234, or a "
        "number of batch.key, which is -1 in rows without a cell",
    )


def shards_there(storage: Storage) -> int:
    """How many tars of shards are there, whatever a manifest says; 0 where nothing can be listed."""
    try:
        each = [storage.list(split) for split in ("train", "valid", "test")]
    except StorageError:
        return 0
    return sum(_TAR.fullmatch(name) is not None for names in each for name in names)


def check_index_bytes(storage: Storage, shard: ShardInfo, data: bytes | memoryview) -> None:
    """ChecksumError unless these are the bytes of the index that was packed."""
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ChecksumError(
            "the index is not the one that was packed",
            where=storage.at(shard.index_path),
            advice=index_again(storage.at("")),
        )


def checked_index(
    storage: Storage,
    shard: ShardInfo,
    columns: Sequence[str] | None,
    labels: Mapping[str, LabelInfo],
    n_sources: int,
    data: bytes | None = None,
) -> dict[str, NDArray[Any]]:
    """Columns of a shard's index; of a set with these labels and so many sources.

    Raises
    ------
    ChecksumError, FormatError
        When it is not the index that was packed.
    """
    where = storage.at(shard.index_path)
    data = storage.read(shard.index_path) if data is None else data
    check_index_bytes(storage, shard, data)
    table = read_index(data, columns, rows=shard.cells, where=where)
    check_bounds(table, labels, n_sources, where)
    return table

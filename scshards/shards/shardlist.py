"""The shards of a split as one list, of one shard set or of several that are read as one.

    roots, split -> ShardList: shards (each told by its ordinal), labels, sources, vocabulary

What sets do not share is made to fit where an index is read: ordinals of sources are shifted, codes are
those of the united categories, and a column that a set does not have is missing in all its cells.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import (
    ConfigError,
    FormatError,
    MissingDataError,
    ScshardsError,
    VocabError,
)
from scshards.base.storage import Storage
from scshards.base.text import did_you_mean
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.shards import Compression
from scshards.shards.index import ARRAY_COLUMNS, OBS_PREFIX, OWN_COLUMNS
from scshards.shards.manifest import ArrayInfo, LabelInfo, ShardInfo, SourceInfo
from scshards.shards.shardset import ShardSet

SOURCE = "source"
"""From which input of pack a cell is: its ordinal in every index, and by its name a category."""

_KNOWN_STARTS = 256
"""Shards whose chunks' starts stay in memory: more than lanes read at a time."""


class ShardList:
    """The shards of one split of some shard sets, in order.

    Parameters
    ----------
    roots
        At least one: local paths or fsspec URLs.
    split
        Which split; every set has to have it.
    storage_options
        Passed to the file system.

    Attributes
    ----------
    shardsets
        The sets.
    shards
        Their shards, set by set; a shard is told by its place here.
    set_of
        int64 [shards]: the set of each.
    cells
        int64 [shards]: its cells.
    labels
        {column: kind and categories}, of all sets together: the categories of the first set keep their
        codes, and those that only later sets have come after them.
    sources
        The sources of all sets, in the order of the ordinals that keys have.

    Raises
    ------
    StorageError, FormatError, ConfigError
        When there is no shard set, a damaged one, or none with that split.
    VocabError, ConfigError
        When the sets do not share vocabulary, kind of values or the kind of a label.
    """

    def __init__(
        self,
        roots: Sequence[str | os.PathLike[str]],
        split: str,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.split = split
        self.shardsets = tuple(ShardSet(root, storage_options) for root in roots)
        first = self.shardsets[0]
        for other in self.shardsets[1:]:
            _check_fit(first, other)
        per_set = [s.shards(split) for s in self.shardsets]
        self.shards: tuple[ShardInfo, ...] = tuple(x for shards in per_set for x in shards)
        self.set_of = np.repeat(np.arange(len(per_set)), [len(x) for x in per_set])
        self.cells = np.array([s.cells for s in self.shards], np.int64)
        self.labels = _united([s.manifest.labels for s in self.shardsets])
        sources = [s.manifest.sources for s in self.shardsets]
        self.sources: tuple[SourceInfo, ...] = tuple(x for of_set in sources for x in of_set)
        ends = np.cumsum([len(x) for x in sources])
        self._first_source = (ends - [len(x) for x in sources]).tolist()
        self._index_bytes: Callable[[int], bytes] = lambda shard: self.storage(shard).read(
            self.shards[shard].index_path
        )
        self._bad: dict[int, ScshardsError] = {}
        self._left_out: set[int] = set()
        self._codes = [_code_maps(s, self.labels) for s in self.shardsets]
        # Sums of whole tables, for each chunk that is read, take as long as reading it.
        self._chunk_starts = lru_cache(_KNOWN_STARTS)(lambda shard: _starts(self.shards[shard]))

    @property
    def vocab(self) -> Vocab:
        """The vocabulary that all sets share."""
        return self.shardsets[0].vocab

    @property
    def value_kind(self) -> ValueKind:
        """ "counts" or "float"."""
        return self.shardsets[0].manifest.value_kind

    @property
    def is_local(self) -> bool:
        """Whether no shard has to come over a network."""
        return all(s.storage.is_local for s in self.shardsets)

    @cached_property
    def cell_bytes(self) -> int:
        """The mean bytes of a cell in the tars, headers included."""
        raw = sum(int(s.chunks.raw.sum()) for s in self.shards)
        return raw // max(int(self.cells.sum()), 1) + 1

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the stream is made of: the manifest's, or one of those of all sets.

        Without a shard that was left out it is another stream.
        """
        each = [s.manifest.fingerprint(self.split) for s in self.shardsets]
        each += [f"without {shard}" for shard in sorted(self._left_out)]
        return each[0] if len(each) == 1 else hashlib.sha256("\n".join(each).encode()).hexdigest()

    def set_at(self, fingerprint: str) -> tuple[tuple[SourceInfo, ...], int] | None:
        """What the set had when this was its fingerprint: its sources, and how many additions.

        None where that can't be said: of several sets, of a set that was made anew, or of another one.
        """
        if len(self.shardsets) > 1:
            return None
        manifest = self.shardsets[0].manifest
        n = manifest.shards_at(self.split, fingerprint)
        if not n or n == len(self.shards):
            return None
        # Each addition has shards of its own: the first one that is new says which addition it is of.
        new = self.index(n, [SOURCE])[SOURCE].min()
        began = [added["first_source"] for added in manifest.options["added"]]
        additions = sum(first <= new for first in began) - 1
        return self.sources[: began[additions]], additions

    def storage(self, shard: int) -> Storage:
        """Where a shard lies."""
        return self.shardsets[self.set_of[shard]].storage

    def compression(self, shard: int) -> Compression:
        """How a shard is compressed."""
        return self.shardsets[self.set_of[shard]].manifest.compression

    def at(self, shard: int) -> str:
        """A shard's address, for messages."""
        return self.storage(shard).at(self.shards[shard].path)

    def chunk_starts(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each chunk of a shard begins, in its file and in its plain tar; int64 [chunks]."""
        return self._chunk_starts(shard)

    def name(self) -> str:
        """The addresses of all sets, for messages."""
        return ", ".join(s.storage.at("") for s in self.shardsets)

    def arrays(self, names: Sequence[str]) -> Mapping[str, ArrayInfo]:
        """The arrays of all sets, which have these; none where none is named.

        Raises
        ------
        ConfigError
            When there is no such array, or sets have other arrays than the first.
        """
        return self.arrays_of(self.shardsets, names)

    @staticmethod
    def arrays_of(sets: Sequence[ShardSet], names: Sequence[str]) -> Mapping[str, ArrayInfo]:
        """The same of some sets."""
        if not names:
            return {}
        first, *others = sets
        known = first.manifest.arrays
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"the cells have no array {name!r}",
                    where=first.storage.at(""),
                    advice=did_you_mean(name, known)
                    if known
                    else "pack them with --obsm or --feature-array",
                )
        for other in others:
            if list(other.manifest.arrays.items()) != list(known.items()):
                raise ConfigError(
                    f"it has other arrays than {first.storage.at('')}",
                    where=other.storage.at(""),
                    advice="keep those that both have, in one order: scshards reshard --arrays",
                )
        return known

    def read_indexes_by(self, read: Callable[[int], bytes]) -> None:
        """Let this function read the bytes of a shard's index from now on."""
        self._index_bytes = read

    @property
    def left_out(self) -> Set[int]:
        """Shards that are read as if they had no cells."""
        return self._left_out

    def leave_out(self, shard: int) -> None:
        """Read a shard as if it had no cells; `cells` and `fingerprint` change."""
        self._left_out.add(shard)
        self.cells[shard] = 0

    def bad_indexes(self) -> dict[int, ScshardsError]:
        """The shards whose indexes were found to be bad since this was asked last, and how."""
        bad, self._bad = self._bad, {}
        return bad

    def label(self, name: str) -> LabelInfo | None:
        """A label; SOURCE, which no label need be, has the names of the inputs for categories."""
        if name == SOURCE and name not in self.labels:
            return LabelInfo(kind="category", categories=tuple(self._named_sources[0]))
        return self.labels.get(name)

    @cached_property
    def _named_sources(self) -> tuple[dict[str, int], NDArray[np.int32]]:
        """The code of each name of a source, and of each source: sets may share names."""
        names = dict.fromkeys(s.name for s in self.sources)
        codes = {name: code for code, name in enumerate(names)}
        return codes, np.array([codes[s.name] for s in self.sources], np.int32)

    def index(
        self, shard: int, columns: Sequence[str], data: bytes | None = None
    ) -> dict[str, NDArray[Any]]:
        """Columns of a shard's index, as they are in the sets read as one; `data`: its bytes, if known.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            When it is not the index that was packed.
        """
        of_source = OBS_PREFIX + SOURCE
        if of_source in columns and SOURCE not in self.labels:
            others = (c for c in columns if c not in (SOURCE, of_source))
            found = self.index(shard, [SOURCE, *others], data)
            return found | {of_source: self._named_sources[1][found[SOURCE]]}
        number = int(self.set_of[shard])
        shardset, info, codes = self.shardsets[number], self.shards[shard], self._codes[number]
        own = shardset.manifest.labels
        has = [
            c for c in columns if not c.startswith(OBS_PREFIX) or c.removeprefix(OBS_PREFIX) in own
        ]
        table: Mapping[str, NDArray[Any]] = {}
        if shard in self._left_out:
            kinds = {**OWN_COLUMNS, **ARRAY_COLUMNS}
            table = {c: np.empty(0, kinds.get(c, np.int32)) for c in has}
        elif has:
            try:
                table = shardset.index(
                    info, has, self._index_bytes(shard) if data is None else data
                )
            except (FormatError, MissingDataError) as e:
                self._bad[shard] = e
                raise
        out: dict[str, NDArray[Any]] = {}
        for column in columns:
            if column not in table:
                is_number = self.labels[column.removeprefix(OBS_PREFIX)].kind == "number"
                missing, kind = (np.nan, np.float64) if is_number else (-1, np.int32)
                out[column] = np.full(self.cells[shard], missing, kind)
                continue
            values = table[column]
            if column == SOURCE and self._first_source[number]:
                values = values.astype(np.int64) + self._first_source[number]
            out[column] = codes[column][values] if column in codes else values
        return out


def _starts(shard: ShardInfo) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    stored, raw = shard.chunks.stored, shard.chunks.raw
    return np.cumsum(stored) - stored, np.cumsum(raw) - raw


def _check_fit(first: ShardSet, other: ShardSet) -> None:
    if other.manifest.vocab_fingerprint != first.manifest.vocab_fingerprint:
        raise VocabError(
            f"it was packed with another vocabulary than {first.storage.at('')}",
            where=other.storage.at(""),
            advice="pack it again with the vocab.json of the other set",
        )
    if other.manifest.value_kind != first.manifest.value_kind:
        raise ConfigError(
            f"it holds {other.manifest.value_kind}, and {first.storage.at('')} "
            f"{first.manifest.value_kind}",
            where=other.storage.at(""),
            advice="pack it again with the same --values",
        )


def _united(sets: Sequence[Mapping[str, LabelInfo]]) -> dict[str, LabelInfo]:
    """The labels of all sets, with all their categories."""
    out: dict[str, LabelInfo] = {}
    for labels in sets:
        for name, info in labels.items():
            known = out.setdefault(name, info)
            if known.kind != info.kind:
                raise ConfigError(
                    f"the label {name!r} is a {known.kind} in one set and a {info.kind} in another",
                    advice="leave it out of one of them: scshards reshard --obs",
                )
            categories = tuple(dict.fromkeys((*known.categories, *info.categories)))
            out[name] = LabelInfo(kind=info.kind, categories=categories)
    return out


def _code_maps(shardset: ShardSet, labels: Mapping[str, LabelInfo]) -> dict[str, NDArray[np.int32]]:
    """For each index column whose codes are others here, the new code of each; last, -1 for -1."""
    out: dict[str, NDArray[np.int32]] = {}
    for name, info in shardset.manifest.labels.items():
        if info.kind == "category":
            place = {c: i for i, c in enumerate(labels[name].categories)}
            codes = [place[c] for c in info.categories]
            if codes != list(range(len(codes))):
                out[OBS_PREFIX + name] = np.array([*codes, -1], np.int32)
    return out

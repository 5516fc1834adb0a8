"""Shard sets as inputs: each cell with the key, the split and the labels that it has there.

    OldSet            a set that another one is made of
    .runs(...)        its shards, some at a time, each run an input of its own: ShardRun
    ShardSource       one run, opened: genes are the tokens, obs the labels and what the index knows

An index is read whole when it is needed, a shard some chunks at a time. Everything is checked: an index
by its checksum, chunks by theirs, members by what the index says of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.base.storage import Storage
from scshards.cells.batch import cell_keys
from scshards.cells.tokenizer import TokenRows, ValueKind
from scshards.shards import Compression
from scshards.shards.arrays import ArrayReader, Rows, SparseRows
from scshards.shards.chunks import read_cells
from scshards.shards.index import ARRAY_COLUMNS, OBS_PREFIX
from scshards.shards.manifest import ArrayInfo, LabelInfo, Manifest, ShardInfo
from scshards.shards.shardset import ShardSet, checked_index
from scshards.sources.matrix import cut_block, row_cuts
from scshards.sources.rows import SOURCE, Block, Source

KNOWN = ("n_genes", "total", SOURCE)
"""What the index knows of a cell beside its labels; a label of the same name comes first."""

RUN_CELLS = 1 << 20
"""A run has about so many cells: what is known of all of them is in memory at once."""

_PLACES = ("source", "row", "offset", "size")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRun:
    """Some shards of one set, as one input of pack.

    Attributes
    ----------
    url, name, source_names
        The set's address, what messages call it, and what its sources are called.
    shards
        (split, shard) in order.
    first_row
        The number of the first cell, as rows of this input are counted.
    labels
        The labels that are asked for.
    first_source, n_sources
        The ordinal of the set's first source in the new set, and how many it has.
    compression, kind, n_tokens
        Of the shards and their members.
    arrays, wanted
        The arrays of the set, and the names of those that blocks are to have.
    """

    url: str
    name: str
    source_names: tuple[str, ...]
    shards: tuple[tuple[str, ShardInfo], ...]
    first_row: int = 0
    labels: Mapping[str, LabelInfo]
    first_source: int
    n_sources: int
    compression: Compression
    kind: ValueKind
    n_tokens: int
    arrays: Mapping[str, ArrayInfo] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()

    @property
    def cells(self) -> int:
        return sum(shard.cells for _, shard in self.shards)

    def part(self, start: int, stop: int) -> ShardRun:
        """The shards that hold these rows, without their labels."""
        ends = self.first_row + np.cumsum([shard.cells for _, shard in self.shards])
        first, last = np.searchsorted(ends, (start, stop - 1), side="right").tolist()
        skipped = int(ends[first - 1]) if first else self.first_row
        shards = self.shards[first : last + 1]
        return dataclasses.replace(
            self, shards=shards, first_row=skipped, labels={}, source_names=()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OldSet:
    """A shard set that another one is made of.

    Attributes
    ----------
    root, name
        Its address, and what messages and the manifest call it.
    manifest, sha256
        Its manifest, and the checksum of the file.
    first_source
        What is added to the ordinals of its sources.
    """

    root: str
    name: str
    manifest: Manifest
    sha256: str
    first_source: int

    @classmethod
    def of(cls, found: ShardSet, first_source: int = 0) -> OldSet:
        """A set that was opened."""
        return cls(
            root=found.storage.url,
            name=found.storage.at(""),
            manifest=found.manifest,
            sha256=found.manifest_sha256,
            first_source=first_source,
        )

    def runs(
        self, labels: Collection[str], cells: int = RUN_CELLS, arrays: Collection[str] = ()
    ) -> Iterator[ShardRun]:
        """All shards in order, about so many cells at a time, with those of these labels and arrays it
        has."""
        m = self.manifest
        shards = [(split, s) for split, some in m.splits.items() for s in some if s.cells]
        sizes = np.append(0, np.cumsum([shard.cells for _, shard in shards], dtype=np.int64))
        for a, b in row_cuts(sizes, cells):
            yield ShardRun(
                url=self.root,
                name=self.name,
                source_names=tuple(s.name for s in m.sources),
                shards=tuple(shards[a:b]),
                labels={n: info for n, info in m.labels.items() if n in labels},
                first_source=self.first_source,
                n_sources=len(m.sources),
                compression=m.compression,
                kind=m.value_kind,
                n_tokens=m.vocab_size,
                arrays=m.arrays,
                wanted=tuple(name for name in arrays if name in m.arrays),
            )


class ShardSource(Source):
    """One run of shards.

    Parameters
    ----------
    run
        Which shards.
    ordinal
        The number of the input.
    storage_options
        For the file system.

    Raises
    ------
    ChecksumError, FormatError, StorageError
        From every method that reads, when an index or a shard is not what the manifest says.
    """

    needs_transposing = False
    matrix_name = "shards"

    def __init__(
        self, run: ShardRun, ordinal: int, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self.run, self.ordinal, self.name = run, ordinal, run.name
        self.n_rows, self.n_columns = run.first_row + run.cells, run.n_tokens
        self.n_values = sum(shard.tokens for _, shard in run.shards)
        self._storage = Storage(run.url, storage_options)
        self._tables: dict[int, dict[str, NDArray[Any]]] = {}
        self._arrays = ArrayReader(run.arrays, run.wanted) if run.wanted else None

    def _names(self, column: str | None) -> Sequence[str]:
        raise AssertionError("the columns of a shard set are tokens already")

    @property
    def sources(self) -> tuple[int, int]:
        """See Source."""
        return self.run.first_source, self.run.n_sources

    @property
    def obs_columns(self) -> Sequence[str]:
        return (*self.run.labels, *(name for name in KNOWN if name not in self.run.labels))

    def _obs(self, column: str | None) -> Any:
        """A label, or what the index knows."""
        import pandas as pd

        if column is None:
            raise SourceError("the cells of a shard set have no names", where=self.name)
        info = self.run.labels.get(column)
        if info is None and column == SOURCE:
            # Sets of different inputs may be merged whose names are the same.
            names = dict.fromkeys(self.run.source_names)
            place = {name: i for i, name in enumerate(names)}
            codes = np.array([place[name] for name in self.run.source_names], np.int32)
            return pd.Categorical.from_codes(codes[self.known(SOURCE)], list(names))
        if info is None:
            return self.known(column)
        values = self.known(OBS_PREFIX + column)
        if info.kind == "number":
            return values
        return pd.Categorical.from_codes(values, pd.Index(info.categories, dtype=object))

    def known(self, column: str) -> NDArray[Any]:
        """A column of the index [n_rows]."""
        return np.concatenate([self.index(i)[column] for i in range(len(self.run.shards))])

    def cells(
        self, i: int, rows: NDArray[np.intp]
    ) -> Iterator[tuple[NDArray[np.intp], TokenRows, dict[str, Rows]]]:
        """Genes, values and arrays of some cells of the i-th shard; see chunks.read_cells."""
        run, index = self.run, self.index(i)
        shard = run.shards[i][1]
        return read_cells(
            self._storage,
            shard,
            run.compression,
            index,
            rows,
            run.n_tokens,
            run.kind,
            self._arrays,
        )

    def in_splits(self, names: Sequence[str]) -> NDArray[np.int8]:
        """The place of each cell's split among the names; -1 where it is none of them [n_rows]."""
        codes = [names.index(s) if s in names else -1 for s, _ in self.run.shards]
        return np.repeat(np.array(codes, np.int8), [shard.cells for _, shard in self.run.shards])

    def keys(self, start: int, stop: int) -> NDArray[np.int64]:
        """See Source: as they are in the set, its sources numbered after those of sets before it."""
        parts = [np.zeros(0, np.int64)]
        for i, a, b in self._shards_of(start, stop):
            index = self.index(i)
            sources = self.run.first_source + index["source"][a:b].astype(np.int64)
            parts.append(cell_keys(sources, index["row"][a:b]))
        return np.concatenate(parts)

    def _blocks(
        self, start: int, stop: int, max_rows: int, max_values: int, wanted: NDArray[np.bool_]
    ) -> Iterator[Block]:
        """See Source; chunks without a wanted row are not read."""
        first_row = start
        for i, a, b in self._shards_of(start, stop):
            rows = np.arange(a, b)[wanted[first_row - start : first_row - start + b - a]]
            for cells, found, beside in self.cells(i, rows):
                # Rows between them are empty.
                at, n = cells - cells[0], int(cells[-1] - cells[0]) + 1
                indptr = _spread(found.indptr, at, n)
                first = first_row + int(cells[0]) - a
                block = Block(first, indptr, found.genes, found.values)
                whole = {name: _spread_rows(of, at, n) for name, of in beside.items()}
                for piece in cut_block(block, max_values, max_rows):
                    begin = piece.first_row - first
                    some = slice(begin, begin + len(piece.indptr) - 1)
                    yield piece._replace(beside={n: _cut(of, some) for n, of in whole.items()})
            first_row += b - a

    def sample(self, n_values: int) -> NDArray[Any]:
        """None: what was packed was looked at then."""
        return np.zeros(0)

    def close(self) -> None:
        """See Source."""
        self._tables.clear()

    def index(self, i: int) -> dict[str, NDArray[Any]]:
        """The index of the i-th shard, after it was found to be one of this set."""
        if i in self._tables:
            return self._tables[i]
        run, shard = self.run, self.run.shards[i][1]
        labels = [OBS_PREFIX + name for name in run.labels]
        arrays = ARRAY_COLUMNS if self._arrays is not None else ()
        columns = list(dict.fromkeys([*_PLACES, *arrays, *KNOWN, *labels]))
        index = checked_index(self._storage, shard, columns, run.labels, run.n_sources)
        self._tables[i] = index
        return index

    def _shards_of(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(place of a shard, first and last of its cells) that hold the rows start:stop."""
        first = self.run.first_row
        for i, (_, shard) in enumerate(self.run.shards):
            a, b = max(start - first, 0), min(stop - first, shard.cells)
            if a < b:
                yield i, a, b
            first += shard.cells


def _spread(indptr: NDArray[np.int64], at: NDArray[np.intp], n: int) -> NDArray[np.int64]:
    """The bounds of n rows, of which those at `at` have these, and others nothing."""
    sizes = np.zeros(n, np.int64)
    sizes[at] = np.diff(indptr)
    return np.append(0, np.cumsum(sizes))


def _spread_rows(rows: Rows, at: NDArray[np.intp], n: int) -> Rows:
    """n rows of an array, of which those at `at` are these, and others zeros."""
    if isinstance(rows, SparseRows):
        return rows._replace(indptr=_spread(rows.indptr, at, n))
    if len(at) == n:
        return rows
    out = np.zeros((n, rows.shape[1]), rows.dtype)
    out[at] = rows
    return out


def _cut(rows: Rows, some: slice) -> Rows:
    if not isinstance(rows, SparseRows):
        return rows[some]
    indptr = rows.indptr[some.start : some.stop + 1]
    values = slice(indptr[0], indptr[-1])
    return SparseRows(indptr - indptr[0], rows.columns[values], rows.values[values])

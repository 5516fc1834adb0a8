"""The cells of a shard set that an export takes: found by the indexes, then read shard after shard.

    Taken(shardset, options)      which splits, which labels
    .survey()  -> Survey          how many cells there are, how large their values, whether in order
    .pieces()  -> Piece           members as they lie in the shards, some chunks at a time
    .decoded(piece) -> Block      their genes and values

A shard's index and a few of its chunks are in memory. Called by exporting.export and exporting.order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base import where as where_
from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError, FormatError
from scshards.base.progress import Progress, printable
from scshards.base.threads import read_ahead
from scshards.cells.batch import format_key
from scshards.cells.tokenizer import TokenRows
from scshards.exporting.options import ExportOptions
from scshards.shards.chunks import decode_block, read_chunks
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import LabelInfo, ShardInfo
from scshards.shards.shardset import ShardSet

NUMBERS = ("n_genes", "total", "source")
"""What an expression may name beside labels; a label of the same name comes first."""

BINS = 1 << 16
"""The rows of all inputs, one after another, are counted in so many stretches."""

_RECORD_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What the indexes say of the cells that are taken.

    Attributes
    ----------
    cells
        Of each split.
    left_out
        Cells of these splits for which the expression is not true.
    values
        Over all taken cells.
    largest_total
        The largest sum of a cell's values; no value is above it.
    is_ordered
        Whether the cells lie in the shards in the order of inputs and rows.
    bytes
        float64 [BINS]: of the members in each stretch of rows.
    """

    cells: Mapping[str, int]
    left_out: int
    values: int
    largest_total: float
    is_ordered: bool
    bytes: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What the index says of some cells: arrays of one entry a cell.

    Attributes
    ----------
    split
        int16: the place of the split in `Taken.splits`.
    source, row, n_genes
        int32, int64, int32.
    labels
        In the order of the manifest: int32 codes (-1 missing) or float64 numbers (NaN missing).
    """

    split: NDArray[np.int16]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    n_genes: NDArray[np.int32]
    labels: tuple[NDArray[Any], ...]

    def __len__(self) -> int:
        return len(self.row)

    def at(self, places: slice | NDArray[np.intp]) -> Columns:
        """Those of some of the cells."""
        return Columns(
            split=self.split[places],
            source=self.source[places],
            row=self.row[places],
            n_genes=self.n_genes[places],
            labels=tuple(values[places] for values in self.labels),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Cells as members: cell i is raw[starts[i]:starts[i] + sizes[i]]."""

    columns: Columns
    raw: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Decoded cells."""

    columns: Columns
    rows: TokenRows

    def __len__(self) -> int:
        return len(self.columns)

    def part(self, first: int, last: int) -> Block:
        """The cells first:last; their arrays are views."""
        ends = self.rows.indptr
        values = slice(int(ends[first]), int(ends[last]))
        rows = TokenRows(
            indptr=ends[first : last + 1] - ends[first],
            genes=self.rows.genes[values],
            values=self.rows.values[values],
            unmatched_values=0,
        )
        return Block(columns=self.columns.at(slice(first, last)), rows=rows)


class Taken:
    """The cells that `options` take of a shard set.

    Attributes
    ----------
    splits
        In the order of the manifest; those without a shard are left out.
    labels
        As the manifest has them.
    sources
        Names of the inputs, each once, printable.
    first_rows
        int64 [sources + 1]: where the rows of each begin, when all are laid one after another.

    Raises
    ------
    ConfigError
        When there is no such split, or the expression names what the cells do not have.
    """

    def __init__(self, shardset: ShardSet, options: ExportOptions) -> None:
        manifest = shardset.manifest
        for split in options.splits or ():
            if split not in manifest.splits:
                raise ConfigError(
                    f"there is no split {split!r}",
                    where=shardset.storage.at(""),
                    advice=did_you_mean(split, manifest.splits),
                )
        self.shardset, self.name = shardset, shardset.storage.at("")
        self.splits = tuple(
            s for s in manifest.splits if options.splits is None or s in options.splits
        )
        self.labels: Mapping[str, LabelInfo] = manifest.labels
        self.sources = _distinct(printable(s.name) for s in manifest.sources)
        self.first_rows = np.cumsum([0, *(s.rows for s in manifest.sources)], dtype=np.int64)
        self._where = None if options.where is None else where_.parse(options.where)
        self._named = self._columns_of_where()

    def survey(self, *, shown: bool) -> Survey:
        """Look at all indexes.

        Raises
        ------
        ConfigError
            When no cell is taken, or the expression does not fit the columns.
        ChecksumError, FormatError, StorageError
            When an index is not what the manifest says.
        """
        cells = dict.fromkeys(self.splits, 0)
        left_out = values = 0
        largest, last, is_ordered = 0.0, -1, True
        n_bytes = np.zeros(BINS)
        total = sum(self.shardset.manifest.cells(s) for s in self.splits)
        with Progress("reading indexes", total, shown=shown) as bar:
            for split, _, shard in self._shards():
                index = self._index(shard, [*_OWN, "total", *self._named.values()])
                taken = self._taken(index)
                at = self.position(index["source"][taken], index["row"][taken])
                if len(at):
                    cells[split] += len(at)
                    values += int(index["n_genes"][taken].sum(dtype=np.int64))
                    largest = max(largest, float(index["total"][taken].max()))
                    is_ordered &= bool(at[0] > last) and bool((at[1:] > at[:-1]).all())
                    last = int(at[-1])
                    sizes = index["size"][taken] + _RECORD_BYTES
                    n_bytes += np.bincount(at // self.bin_rows, sizes, BINS)
                left_out += shard.cells - len(at)
                bar.add(shard.cells)
        if not sum(cells.values()):
            what = f"matches {self._where.text!r}" if self._where and total else "is there"
            raise ConfigError(
                f"no cell {what}",
                where=self.name,
                advice="loosen the expression; scshards info shows splits and labels",
            )
        return Survey(
            cells={s: n for s, n in cells.items() if n},
            left_out=left_out,
            values=values,
            largest_total=largest,
            is_ordered=is_ordered,
            bytes=n_bytes,
        )

    def position(self, source: NDArray[np.integer], row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of cells when the rows of all inputs are laid one after another."""
        at: NDArray[np.int64] = self.first_rows[source] + row
        return at

    @property
    def bin_rows(self) -> int:
        """Rows of one of the stretches of a Survey."""
        return max(1, -(-int(self.first_rows[-1]) // BINS))

    def pieces(self) -> Generator[Piece, None, None]:
        """The cells, shard after shard; of a store, the next are read meanwhile.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            When an index or a shard is not what was packed.
        """
        pieces = self._pieces()
        if self.shardset.storage.is_local:
            yield from pieces
            return
        with contextlib.closing(read_ahead(pieces)) as ahead:
            yield from ahead

    def decoded(self, piece: Piece) -> Block:
        """Genes and values of members; FormatError when one is no cell."""
        manifest, columns = self.shardset.manifest, piece.columns

        def where(i: int) -> str:
            return f"{self.name}: {format_key(int(columns.source[i]), int(columns.row[i]))}"

        rows = decode_block(
            piece.raw, piece.starts, piece.sizes, manifest.vocab_size, manifest.value_kind, where
        )
        differs = np.flatnonzero(np.diff(rows.indptr) != columns.n_genes)
        if len(differs):
            raise FormatError(
                "n_genes is another in the index",
                where=where(int(differs[0])),
                advice="run scshards verify on the shard set",
            )
        return Block(columns=columns, rows=rows)

    def _pieces(self) -> Iterator[Piece]:
        storage, compression = self.shardset.storage, self.shardset.manifest.compression
        label_columns = [OBS_PREFIX + name for name in self.labels]
        for _, code, shard in self._shards():
            needed = [*_OWN, "offset", *label_columns, *self._named.values()]
            index = self._index(shard, needed)
            taken = self._taken(index)
            for cells, raw, start in read_chunks(storage, shard, compression, index, taken):
                yield Piece(
                    columns=Columns(
                        split=np.full(len(cells), code, np.int16),
                        source=index["source"][cells],
                        row=index["row"][cells],
                        n_genes=index["n_genes"][cells],
                        labels=tuple(index[c][cells] for c in label_columns),
                    ),
                    raw=raw,
                    starts=index["offset"][cells] - start,
                    sizes=index["size"][cells],
                )

    def _shards(self) -> Iterator[tuple[str, int, ShardInfo]]:
        for code, split in enumerate(self.splits):
            for shard in self.shardset.manifest.splits[split]:
                yield split, code, shard

    def _index(self, shard: ShardInfo, columns: list[str]) -> dict[str, NDArray[Any]]:
        """Columns of a shard's index, each number in the bounds that the manifest sets."""
        index = self.shardset.index(shard, list(dict.fromkeys(columns)))
        where = self.shardset.storage.at(shard.index_path)
        source, row, n_sources = index["source"], index["row"], len(self.sources)
        if len(row):
            if not 0 <= int(source.min()) <= int(source.max()) < n_sources:
                raise FormatError("a cell is of no source of the set", where=where)
            if int(row.min()) < 0 or (row >= np.diff(self.first_rows)[source]).any():
                raise FormatError("a cell's source has no such row", where=where)
            for name, info in self.labels.items():
                codes = index.get(OBS_PREFIX + name)
                if codes is None or info.kind == "number":
                    continue
                if not -1 <= int(codes.min()) <= int(codes.max()) < len(info.categories):
                    raise FormatError(f"a cell has no such category of {name!r}", where=where)
        return index

    def _taken(self, index: Mapping[str, NDArray[Any]]) -> NDArray[np.intp]:
        n = len(index["row"])
        if self._where is None or not n:
            return np.arange(n)
        columns = {name: self._values(index, name) for name in self._where.columns}
        return np.flatnonzero(self._where.mask(columns, n, where=self.name))

    def _values(self, index: Mapping[str, NDArray[Any]], name: str) -> Any:
        """A column as an expression sees it."""
        import pandas as pd

        values = index[self._named[name]]
        if name not in self.labels or self.labels[name].kind == "number":
            return values
        return pd.Categorical.from_codes(values, categories=list(self.labels[name].categories))

    def _columns_of_where(self) -> dict[str, str]:
        """{what the expression names: the index's column}."""
        found: dict[str, str] = {}
        if self._where is None:
            return found
        for name in self._where.columns:
            if name not in self.labels and name not in NUMBERS:
                raise ConfigError(
                    f"the cells of the shard set have no {name!r}",
                    where=f"{self.name}: --where",
                    advice=did_you_mean(name, (*self.labels, *NUMBERS)),
                )
            found[name] = OBS_PREFIX + name if name in self.labels else name
        for name, value in self._where.compared:
            info = self.labels.get(name)
            if info is not None and info.kind == "category" and value not in info.categories:
                raise ConfigError(
                    f"the column {name!r} has no category {value!r}",
                    where=f"{self.name}: --where",
                    advice=did_you_mean(str(value), info.categories),
                )
        return found


_OWN = ("source", "row", "n_genes", "size")


def _distinct(names: Iterator[str]) -> tuple[str, ...]:
    """The names, a number behind those that were there before."""
    out: dict[str, None] = {}
    for name in names:
        other, n = name, 1
        while other in out:
            n += 1
            other = f"{name} ({n})"
        out[other] = None
    return tuple(out)

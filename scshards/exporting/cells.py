"""The cells of a shard set that an export takes: found by the indexes, then read some chunks at a time.

    Taken(shardset, options)      which splits, which labels
    .survey()  -> Survey          how many cells there are, how large their values, whether in order
    .reads()   -> functions       each reads some of them, as Members: these, and `decoded`, threads call
    .decoded(members) -> Block    their genes and values

Called by exporting.export.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base import where as where_
from scshards.base.errors import ConfigError, FormatError
from scshards.base.progress import Progress, printable
from scshards.cells.batch import cell_keys, format_key, split_keys
from scshards.cells.tokenizer import TokenRows
from scshards.exporting.options import ExportOptions
from scshards.shards.chunks import chunk_runs, decode_block, read_run
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import ShardInfo
from scshards.shards.shardset import ShardSet

SAMPLED = 64
"""Of so many cells the survey keeps one, to know how large the cells are from key to key."""

_NUMBERS = ("n_genes", "total", "source")
"""What an expression may name beside labels; a label of the same name comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What the indexes say of the cells that are taken.

    Attributes
    ----------
    cells, left_out
        Of each split; and of these splits, those for which the expression is not true.
    values
        Over all taken cells.
    largest_total
        The largest sum of a cell's values; no value is above it.
    is_ordered
        Whether the cells lie in the shards in the order of inputs and rows.
    keys, sizes
        int64: of one in SAMPLED cells, by key, and the bytes of its member.
    """

    cells: Mapping[str, int]
    left_out: int
    values: int
    largest_total: float
    is_ordered: bool
    keys: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """Cells as members: cell i is raw[starts[i]:starts[i] + cells["size"][i]]."""

    cells: NDArray[Any]
    raw: NDArray[np.uint8]
    starts: NDArray[np.int64]

    def part(self, some: slice) -> Members:
        """Those of some of the cells."""
        return Members(cells=self.cells[some], raw=self.raw, starts=self.starts[some])


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Decoded cells."""

    cells: NDArray[Any]
    rows: TokenRows


class Taken:
    """The cells that `options` take of a shard set.

    Attributes
    ----------
    splits
        In the order of the manifest.
    labels
        As the manifest has them.
    sources
        Names of the inputs, each once, printable.
    dtype
        Of what is known of a cell: `key`, the `size` of its member, `n_genes`, the place of its `split`,
        and `label-0` and so on, int32 codes (-1 missing) or float64 numbers (NaN missing).

    Raises
    ------
    ConfigError
        When there is no such split, or the expression names what the cells do not have.
    """

    def __init__(self, shardset: ShardSet, options: ExportOptions) -> None:
        manifest = shardset.manifest
        self.shardset, self.name, self.labels = shardset, shardset.storage.at(""), manifest.labels
        for split in options.splits or ():
            shardset.shards(split)
        self.splits = tuple(s for s in manifest.splits if s in (options.splits or manifest.splits))
        self.sources = _distinct(printable(s.name) for s in manifest.sources)
        self.dtype = np.dtype(
            [("key", "<i8"), ("size", "<i8"), ("n_genes", "<i4"), ("split", "<i2")]
            + [
                (f"label-{i}", "<f8" if info.kind == "number" else "<i4")
                for i, info in enumerate(self.labels.values())
            ]
        )
        self._where = None if options.where is None else where_.parse(options.where)
        self._categories = {
            **dict.fromkeys(_NUMBERS),
            **{n: i.categories if i.kind == "category" else None for n, i in self.labels.items()},
        }
        if self._where is not None:
            self._where.check(self._categories, self.name)

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
        values, largest, last, is_ordered = 0, 0.0, -1, True
        sample = [np.zeros((2, 0), np.int64)]
        total = sum(self.shardset.manifest.cells(s) for s in self.splits)
        with Progress("reading indexes", total, shown=shown) as bar:
            for code, shard in self._shards():
                index, taken = self._index(shard, "size", "total")
                keys = cell_keys(index["source"][taken], index["row"][taken])
                if len(keys):
                    cells[self.splits[code]] += len(keys)
                    values += int(index["n_genes"][taken].sum(dtype=np.int64))
                    largest = max(largest, float(index["total"][taken].max()))
                    is_ordered &= bool(keys[0] > last) and bool((keys[1:] > keys[:-1]).all())
                    last = int(keys[-1])
                    sample.append(np.stack([keys, index["size"][taken]])[:, ::SAMPLED])
                bar.add(shard.cells)
        n = sum(cells.values())
        if not n:
            what = f"matches {self._where.text!r}" if self._where and total else "is there"
            raise ConfigError(
                f"no cell {what}",
                where=self.name,
                advice="loosen the expression; scshards info shows splits and labels",
            )
        keys, sizes = np.concatenate(sample, axis=1)
        by_key = np.argsort(keys)
        return Survey(
            cells={s: n for s, n in cells.items() if n},
            left_out=total - n,
            values=values,
            largest_total=largest,
            is_ordered=is_ordered,
            keys=keys[by_key],
            sizes=sizes[by_key],
        )

    def reads(self) -> Iterator[Callable[[], Members]]:
        """What reads the cells, shard after shard, neighbouring chunks at a time.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            When an index, or what a function reads, is not what was packed.
        """
        labels = {OBS_PREFIX + name: f"label-{i}" for i, name in enumerate(self.labels)}
        for code, shard in self._shards():
            index, taken = self._index(shard, "size", "offset", *labels)
            for places in chunk_runs(shard, index, taken, self.shardset.storage.at(shard.path)):
                cells = np.empty(len(places), self.dtype)
                cells["key"] = cell_keys(index["source"][places], index["row"][places])
                cells["split"] = code
                for column, name in {"size": "size", "n_genes": "n_genes", **labels}.items():
                    cells[name] = index[column][places]
                yield functools.partial(self._read, shard, places, cells, index["offset"][places])

    def _read(
        self,
        shard: ShardInfo,
        places: NDArray[np.intp],
        cells: NDArray[Any],
        offsets: NDArray[np.int64],
    ) -> Members:
        compression = self.shardset.manifest.compression
        raw, begin = read_run(self.shardset.storage, shard, compression, places)
        return Members(cells=cells, raw=raw, starts=offsets - begin)

    def decoded(self, members: Members) -> Block:
        """Genes and values of members; FormatError when one is no cell."""
        manifest, cells = self.shardset.manifest, members.cells
        rows = decode_block(
            members.raw,
            members.starts,
            np.ascontiguousarray(cells["size"]),
            manifest.vocab_size,
            manifest.value_kind,
            lambda i: self.place(cells[i]),
        )
        differs = np.flatnonzero(np.diff(rows.indptr) != cells["n_genes"])
        if len(differs):
            raise FormatError(
                "n_genes is another in the index",
                where=self.place(cells[differs[0]]),
                advice="run scshards verify on the shard set",
            )
        return Block(cells=cells, rows=rows)

    def no_cells(self) -> Block:
        """A block without cells, which shows the types."""
        raw = np.zeros(0, np.uint8)
        raw.setflags(write=False)  # as chunks are: the kernels are compiled once
        nobody = Members(cells=np.zeros(0, self.dtype), raw=raw, starts=np.zeros(0, np.int64))
        return self.decoded(nobody)

    def place(self, cell: Any) -> str:
        """What an error calls a cell."""
        source, row = split_keys(cell["key"])
        return f"{self.name}: {format_key(int(source), int(row))}"

    def _shards(self) -> Iterator[tuple[int, ShardInfo]]:
        for code, split in enumerate(self.splits):
            for shard in self.shardset.manifest.splits[split]:
                yield code, shard

    def _index(
        self, shard: ShardInfo, *columns: str
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.intp]]:
        """Columns of a shard's index, and which of its cells are taken."""
        expression = self._where
        names = expression.columns if expression else ()
        named = {name: OBS_PREFIX + name if name in self.labels else name for name in names}
        needed = ("source", "row", "n_genes", *columns, *named.values())
        index = self.shardset.index(shard, list(dict.fromkeys(needed)))
        if expression is None:
            return index, np.arange(shard.cells)
        values = {name: self._as_texts(index[column], name) for name, column in named.items()}
        return index, np.flatnonzero(expression.mask(values, shard.cells, where=self.name))

    def _as_texts(self, values: NDArray[Any], column: str) -> Any:
        import pandas as pd

        categories = self._categories[column]
        if categories is None:
            return values
        return pd.Categorical.from_codes(values, categories=list(categories))


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    """The names, a number behind those that were there before."""
    out: dict[str, None] = {}
    for name in names:
        other, n = name, 1
        while other in out:
            n += 1
            other = f"{name} ({n})"
        out[other] = None
    return tuple(out)

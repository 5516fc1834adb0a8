"""The cells of a shard set that an export takes: found by the indexes, then read part by part.

    Cells(shardset, options)      which splits, which labels
    .survey()                     how many cells there are, and how large their values
    .parts(limit) -> Part         some of one shard and one file, in order; .read(dtype) -> TokenRows

Each shard is read as sources.shardset reads it, a run of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base import where as where_
from scshards.base.errors import ConfigError
from scshards.base.progress import Progress, printable
from scshards.cells.batch import format_key
from scshards.cells.tokenizer import TokenRows, ValueKind
from scshards.exporting.options import Dtype, ExportOptions
from scshards.shards.arrays import Rows
from scshards.shards.chunks import chunk_runs
from scshards.shards.index import OBS_PREFIX, key_texts
from scshards.shards.manifest import LabelInfo
from scshards.shards.shardset import ShardSet
from scshards.sources.rows import SOURCE
from scshards.sources.shardset import KNOWN, OldSet, ShardSource

PART_BYTES = 1 << 21
"""A part is of chunks of about so many bytes: of a plain set at most a million values, 12 MB, and as
many again as they are written. shards.chunks.READ_BYTES is a multiple: a part is read at once."""

_EXACT = {"float32": 1 << 24, "float64": 1 << 53, "int64": (1 << 63) - 1}
"""Every whole number up to this is held exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Cells of one shard that go into one file.

    Attributes
    ----------
    source, places
        The shard, and their places there.
    split, number, first
        Their split, the number of its file, and how many cells of the export come before them.
    """

    source: ShardSource
    places: NDArray[np.intp]
    split: str
    number: int
    first: int

    def __len__(self) -> int:
        return len(self.places)

    def known(self, column: str) -> NDArray[Any]:
        """A column of the index."""
        return self.source.index(0)[column][self.places]

    @property
    def keys(self) -> Any:
        """Their keys as text, an arrow array."""
        return key_texts(self.known("source").astype(np.int64), self.known("row"))

    def read(self, dtype: np.dtype[Any]) -> tuple[TokenRows, dict[str, Rows]]:
        """Genes, and values as `dtype`; and what lies beside the genes, by name.

        Raises
        ------
        ConfigError
            When a value is no such number.
        ChecksumError, FormatError, StorageError
            When the shard is not what was packed, or can't be read.
        """
        ((_, rows, beside),) = self.source.cells(0, self.places)
        values = rows.values
        with np.errstate(invalid="ignore"):  # what is above 2^63 is looked at below
            out = values.astype(dtype, copy=False)
            if values.dtype.kind == "f" or int(values.max(initial=0)) <= _EXACT[dtype.name]:
                return rows._replace(values=out), beside
            differs = out.astype(np.int64).view(np.uint64) != values
        above = values >= 1 << 63 if dtype.kind == "i" else out >= 2.0**63
        bad = np.flatnonzero(differs | above)
        if len(bad):
            cell = int(np.searchsorted(rows.indptr, bad[0], side="right")) - 1
            key = format_key(*(int(self.known(name)[cell]) for name in ("source", "row")))
            raise ConfigError(
                f"the count {int(values[bad[0]])} is no {dtype}",
                where=f"{self.source.name}: {key}",
                advice="choose a wider one with --dtype, or leave the cell out with --where",
            )
        return rows._replace(values=out), beside


Column = tuple[Callable[[Part], NDArray[Any]], tuple[str, ...] | None]
"""What a column holds of cells, numbers or codes (-1 missing); and the texts that codes stand for."""


class Cells:
    """The cells that `options` take of a shard set.

    Attributes
    ----------
    name, vocab
        Of the set.
    columns
        What is known of a cell, by name: its split, its input and its row there, then its labels. A
        label comes in the place of another column of its name.
    arrays
        What is read of what lies beside the genes: all of it, but for a scBank, which has no place for
        it.

    Raises
    ------
    ConfigError
        When there is no such split, or the expression names what the cells do not have.
    """

    def __init__(self, shardset: ShardSet, options: ExportOptions) -> None:
        manifest = shardset.manifest
        self.name, self.vocab = shardset.storage.at(""), shardset.vocab
        self._options, self._set = options, OldSet.of(shardset)
        self.arrays = {} if options.to == "scbank" else dict(manifest.arrays)
        for split in options.splits or ():
            shardset.shards(split)
        asked = manifest.splits if options.splits is None else options.splits
        self._splits = tuple(split for split in manifest.splits if split in asked)
        self._n = sum(manifest.cells(split) for split in self._splits)
        names = [source.name for source in manifest.sources]
        # Of merged sets, several inputs may have one name.
        place = {name: i for i, name in enumerate(dict.fromkeys(map(printable, names)))}
        code = np.array([place[printable(name)] for name in names], np.int64)
        self.columns: dict[str, Column] = {
            "split": (self._codes, self._splits),
            SOURCE: (lambda part: code[part.known("source")], tuple(place)),
            "row": (lambda part: part.known("row"), None),
        }
        self.columns = {n: c for n, c in self.columns.items() if n not in manifest.labels}
        self.columns |= {name: _label(name, info) for name, info in manifest.labels.items()}
        self._where = None if options.where is None else where_.parse(options.where)
        if self._where is not None:
            labels = {n: i.categories if i.kind == "category" else None
                      for n, i in manifest.labels.items()}  # fmt: skip
            self._where.check({**dict.fromkeys(KNOWN), SOURCE: names, **labels}, self.name)

    def survey(self, *, shown: bool) -> tuple[dict[str, int], int, int, float]:
        """Look at all indexes.

        Returns
        -------
        The cells of each split that are taken, how many of these splits are left out, the values of all
        that are taken, and the largest sum of a cell's values.

        Raises
        ------
        ConfigError
            When no cell is taken, or the expression does not fit the columns.
        ChecksumError, FormatError, StorageError
            When an index is not what the manifest says.
        """
        cells: Counter[str] = Counter()
        values, largest = 0, 0.0
        with Progress("reading indexes", self._n, shown=shown) as bar:
            for split, source, taken in self._shards():
                if len(taken):
                    cells[split] += len(taken)
                    values += int(source.known("n_genes")[taken].sum(dtype=np.int64))
                    largest = max(largest, float(source.known("total")[taken].max()))
                bar.add(source.n_rows)
        if not cells:
            what = f"matches {self._where.text!r}" if self._where and self._n else "is there"
            raise ConfigError(
                f"no cell {what}",
                where=self.name,
                advice="loosen the expression; scshards info shows splits and labels",
            )
        return dict(cells), self._n - cells.total(), values, largest

    def parts(self, limit: int) -> Iterator[Part]:
        """The cells in the order of the shards; a file has at most `limit` of one split.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            When an index is not what the manifest says.
        """
        before: Counter[str] = Counter()
        for split, source, taken in self._shards():
            for some in chunk_runs(source.run.shards[0][1], taken, PART_BYTES):
                while len(some):
                    number, there = divmod(before[split], limit)
                    places, some = some[: limit - there], some[limit - there :]
                    yield Part(
                        source=source,
                        places=places,
                        split=split,
                        number=number,
                        first=before.total(),
                    )
                    before[split] += len(places)

    def _shards(self) -> Iterator[tuple[str, ShardSource, NDArray[np.intp]]]:
        """Each shard of the splits, and the places of the cells that are taken."""
        for run in self._set.runs(self._set.manifest.labels, cells=1, arrays=self.arrays):
            split = run.shards[0][0]
            if split not in self._splits:
                continue
            source = ShardSource(run, 0, self._options.storage_options)
            if self._where is None:
                yield split, source, np.arange(source.n_rows)
                continue
            values = {column: source.column(column) for column in self._where.columns}
            mask = self._where.mask(values, source.n_rows, where=self.name)
            yield split, source, np.flatnonzero(mask)

    def _codes(self, part: Part) -> NDArray[np.int64]:
        return np.full(len(part), self._splits.index(part.split))


def value_dtype(asked: Dtype, kind: ValueKind, largest_total: float) -> np.dtype[Any]:
    """The dtype that values are written as.

    `largest_total` is the largest sum of a cell's values, as the indexes have it: no count is above it.

    Raises
    ------
    ConfigError
        For whole numbers of values that are none.
    """
    if kind == "float" and asked == "int64":
        raise ConfigError(
            "the shard set holds float values", where="dtype", advice="use float32 or float64"
        )
    if asked != "auto":
        return np.dtype(asked)
    # Below and not up to: a sum that was rounded down to the limit may hide a number above it.
    fits = (name for name, limit in _EXACT.items() if largest_total < limit or kind == "float")
    return np.dtype(next(fits, "int64"))


def _label(name: str, info: LabelInfo) -> Column:
    texts = None if info.kind == "number" else info.categories
    return lambda part: part.known(OBS_PREFIX + name), texts

"""Parquet files of cells: scBank's datatable, and files with labels.

scBank's columns are those that `datasets.Dataset.to_parquet` writes of what scGPT's DataBank gives it
(scgpt/scbank/databank.py): id int64, genes list<int64>, expressions list<float> of a float32 matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scshards.base.errors import ConfigError
from scshards.cells.tokenizer import TokenRows
from scshards.cells.vocab import SPECIALS, Vocab
from scshards.exporting.cells import Cells, Part
from scshards.shards.arrays import Rows, SparseRows
from scshards.shards.manifest import ArrayInfo

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_VALUES, ROW_GROUP_CELLS = 1 << 22, 1 << 16
"""A row group is full with so many values, or so many cells."""

ID, KEY, GENES, EXPRESSIONS = "id", "key", "genes", "expressions"


class ParquetLayout:
    """How cells stand in parquet files.

    Parameters
    ----------
    cells
        Of the shard set.
    labelled
        With keys, labels, splits and inputs; scBank has none.

    Raises
    ------
    ConfigError
        When a label can't be a column beside those that every cell has.
    """

    def __init__(self, cells: Cells, *, labelled: bool) -> None:
        self._labelled, self._columns = labelled, cells.columns if labelled else {}
        for name in (ID, KEY, GENES, EXPRESSIONS):
            if name in self._columns:
                raise ConfigError(
                    f"the label {name!r} has the name of a column that every cell has",
                    where=cells.name,
                    advice="export a copy without it: scshards reshard --obs",
                )
        self._arrays = cells.arrays
        others = {ID, KEY, GENES, EXPRESSIONS, *self._columns}
        for name in [c for n, i in cells.arrays.items() for c in _array_columns(n, i)]:
            if name in others:
                raise ConfigError(
                    f"an array would have the name of another column, {name!r}",
                    where=cells.name,
                    advice="export a copy without it: scshards reshard --arrays",
                )
            others.add(name)

    def prepared(self, part: Part, rows: TokenRows, beside: Mapping[str, Rows]) -> pa.Table:
        """Cells as `write` takes them."""
        import pyarrow as pa

        offsets = pa.array(rows.indptr.astype(np.int32))
        found: dict[str, Any] = {ID: pa.array(np.arange(part.first, part.first + len(part)))}
        if self._labelled:
            found[KEY] = part.keys
        genes = pa.array(rows.genes.astype(np.int64))
        found[GENES] = pa.ListArray.from_arrays(offsets, genes)
        found[EXPRESSIONS] = pa.ListArray.from_arrays(offsets, pa.array(rows.values))
        for name, (values_of, texts) in self._columns.items():
            some = values_of(part)
            mask = np.isnan(some) if texts is None else some < 0
            array = pa.array(some if texts is None else some.astype(np.int32), mask=mask)
            if texts is not None:
                dictionary = pa.array(texts, pa.string())
                array = pa.DictionaryArray.from_arrays(array, dictionary).dictionary_decode()
            found[name] = array
        for name, info in self._arrays.items():
            of = beside[name]
            if not isinstance(of, SparseRows):
                flat = pa.array(np.ascontiguousarray(of, info.dtype).reshape(-1))
                found[name] = pa.FixedSizeListArray.from_arrays(flat, info.width)
                continue
            ends = pa.array(of.indptr.astype(np.int32))
            for column, values in zip(
                _array_columns(name, info), (of.columns, of.values), strict=True
            ):
                found[column] = pa.ListArray.from_arrays(ends, pa.array(values))
        return pa.table(found)

    def write(self, path: Path, record: str, found: Iterator[pa.Table]) -> None:
        """A file of what `prepared` has made. There is no place for a record: one stands beside it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        first = next(found)
        schema = first.schema
        texts = [f.name for f in schema if f.type == pa.string() and f.name != KEY]
        # Ids ascend within a cell, so their differences are small.
        packed = {f"{GENES}.list.element": "DELTA_BINARY_PACKED", ID: "DELTA_BINARY_PACKED"}
        group, n_values = schema.empty_table(), 0
        with pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            use_dictionary=[f"{EXPRESSIONS}.list.element", *texts],
            column_encoding=packed,
        ) as writer:
            for table in itertools.chain([first], found):
                group = pa.concat_tables([group, table])
                n_values += len(table.column(GENES).chunk(0).values)
                if n_values >= ROW_GROUP_VALUES or len(group) >= ROW_GROUP_CELLS:
                    writer.write_table(group, row_group_size=len(group))
                    group, n_values = schema.empty_table(), 0
            if len(group):
                writer.write_table(group, row_group_size=len(group))


def _array_columns(name: str, info: ArrayInfo) -> tuple[str, ...]:
    """The columns of an array: its numbers, or of a sparse one the places and the numbers."""
    return (name,) if info.kind == "dense" else (f"{name}.columns", f"{name}.values")


def bank_vocab(vocab: Vocab) -> dict[str, int]:
    """What a scBank's gene_vocab.json holds: no special tokens, and every id as it is.

    Where a gene comes after a special token, all stay: scGPT reads no vocabulary with a gap in it.
    """
    tokens = vocab.to_dict()
    genes = {token: i for token, i in tokens.items() if token not in SPECIALS}
    return genes if max(genes.values(), default=-1) == len(genes) - 1 else tokens

"""Parquet files of cells: scBank's datatable, and files with labels.

scBank's columns are those that `datasets.Dataset.to_parquet` writes of what scGPT's DataBank gives it
(scgpt/scbank/databank.py): id int64, genes list<int64>, expressions list<float> of a float32 matrix.
Called by exporting.export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.cells.vocab import SPECIALS, Vocab
from scshards.exporting.cells import Block, Taken
from scshards.exporting.values import ROW, SOURCE, SPLIT, keys, own_columns, written

ROW_GROUP_VALUES, ROW_GROUP_CELLS = 1 << 22, 1 << 16
"""A row group is full with so many values, or so many cells."""

ID, KEY, GENES, EXPRESSIONS = "id", "key", "genes", "expressions"


class ParquetFile:
    """One file, written block by block.

    Parameters
    ----------
    path
        Where it goes.
    taken, dtype
        The shard set, and what values are written as.
    labelled
        With keys, labels, splits and inputs; scBank has none.
    """

    def __init__(self, path: Path, taken: Taken, dtype: np.dtype[Any], *, labelled: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._taken, self._dtype, self._labelled = taken, dtype, labelled
        fields: dict[str, Any] = {ID: pa.int64()}
        if labelled:
            fields[KEY] = pa.string()
        fields[GENES] = pa.list_(pa.int64())
        fields[EXPRESSIONS] = pa.list_(pa.from_numpy_dtype(dtype))
        if labelled:
            own = {SPLIT: pa.string(), SOURCE: pa.string(), ROW: pa.int64()}
            fields |= {name: own[name] for name in own_columns(taken)}
            for name, info in taken.labels.items():
                fields[name] = pa.float64() if info.kind == "number" else pa.string()
        self._schema = pa.schema(list(fields.items()))
        texts = [n for n, kind in fields.items() if kind == pa.string() and n != KEY]
        # Ids ascend within a cell, so their differences are small.
        packed = {f"{GENES}.list.element": "DELTA_BINARY_PACKED", ID: "DELTA_BINARY_PACKED"}
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression="zstd",
            use_dictionary=[f"{EXPRESSIONS}.list.element", *texts],
            column_encoding=packed,
        )
        self._tables: list[Any] = []
        self._values = self._cells = 0

    def add(self, block: Block, first_id: int) -> None:
        """Write cells; `first_id` is the id of the first."""
        import pyarrow as pa

        rows, columns = block.rows, block.columns
        n = len(block)
        offsets = pa.array(rows.indptr.astype(np.int32))
        values = written(block, self._dtype, self._taken.name)
        arrays: dict[str, Any] = {
            ID: pa.array(np.arange(first_id, first_id + n)),
            GENES: pa.ListArray.from_arrays(offsets, pa.array(rows.genes.astype(np.int64))),
            EXPRESSIONS: pa.ListArray.from_arrays(offsets, pa.array(values)),
        }
        if self._labelled:
            arrays[KEY] = _texts_of(keys(block))
            arrays[SPLIT] = _named(columns.split, self._taken.splits)
            arrays[SOURCE] = _named(columns.source, self._taken.sources)
            arrays[ROW] = pa.array(columns.row)
            for (name, info), found in zip(self._taken.labels.items(), columns.labels, strict=True):
                if info.kind == "number":
                    arrays[name] = pa.array(found, mask=np.isnan(found))
                else:
                    arrays[name] = _named(found, info.categories)
        table = pa.table([arrays[name] for name in self._schema.names], schema=self._schema)
        self._tables.append(table)
        self._cells += n
        self._values += len(values)
        if self._values >= ROW_GROUP_VALUES or self._cells >= ROW_GROUP_CELLS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the file's end."""
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        """Close the file, which is not whole."""
        self._tables = []
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=self._cells)
        self._tables, self._values, self._cells = [], 0, 0


def check_columns(taken: Taken) -> None:
    """ConfigError when a label can't be a column beside those that every cell has."""
    for name in (ID, KEY, GENES, EXPRESSIONS):
        if name in taken.labels:
            raise ConfigError(
                f"the label {name!r} has the name of a column that every cell has",
                where=taken.name,
                advice="export a copy without it: scshards reshard --obs",
            )


def bank_vocab(vocab: Vocab) -> dict[str, int]:
    """What a scBank's gene_vocab.json holds: no special tokens, and every id as it is.

    Where a gene comes after a special token, all stay: scGPT reads no vocabulary with a gap in it.
    """
    tokens = vocab.to_dict()
    genes = {token: i for token, i in tokens.items() if token not in SPECIALS}
    return genes if max(genes.values(), default=-1) == len(genes) - 1 else tokens


def _named(codes: NDArray[np.integer], names: tuple[str, ...]) -> Any:
    """Text of codes; null for -1."""
    import pyarrow as pa

    wide = codes.astype(np.int32)
    indices = pa.array(wide, mask=wide < 0)
    dictionary = pa.array(names, pa.string())
    return pa.DictionaryArray.from_arrays(indices, dictionary).dictionary_decode()


def _texts_of(characters: NDArray[np.uint8]) -> Any:
    """Rows of ASCII characters as text."""
    import pyarrow as pa

    n, width = characters.shape
    ends = np.arange(n + 1, dtype=np.int32) * np.int32(width)
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(characters))

"""AnnData files of cells, written block by block: CSR counts, labels in obs, the vocabulary in var.

Datasets grow as cells come, so that no matrix is ever whole in memory. Called by exporting.export.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, FormatError
from scshards.base.storage import Storage
from scshards.cells.vocab import SPECIALS, Vocab
from scshards.census.h5ad import (
    CELLS_CHUNK,
    GROUPS,
    VALUES_CHUNK,
    Growing,
    NewFile,
    new_group,
    new_index,
    write_order,
    write_texts,
)
from scshards.exporting.cells import Block, Taken
from scshards.exporting.values import ROW, SOURCE, SPLIT, keys, own_columns, written

_RECORD = "scshards-export"


class H5adFile:
    """One file, written block by block.

    Parameters
    ----------
    path
        Where it goes.
    taken, dtype
        The shard set, and what values are written as.
    vocab
        Its genes are the columns, in the order of their ids.
    record
        What `read_record` gives back; "" is none.
    """

    def __init__(
        self, path: Path, taken: Taken, dtype: np.dtype[Any], vocab: Vocab, record: str
    ) -> None:
        import h5py

        self._taken, self._dtype = taken, dtype
        is_gene = np.array([t not in SPECIALS for t in vocab.tokens], np.bool_)
        self._column = np.where(is_gene, np.cumsum(is_gene) - 1, -1).astype(np.int32)
        self._disk = NewFile(path)
        self._file = h5py.File(self._disk, "w")
        self._cells = 0
        f = self._file
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if record:
            f.attrs[_RECORD] = record
        for name in GROUPS:
            new_group(f, name, "dict", "0.1.0")
        self._x = new_group(f, "X", "csr_matrix", "0.1.0")
        self._data = Growing(self._x, "data", dtype, VALUES_CHUNK)
        self._indices = Growing(self._x, "indices", np.dtype(np.int32), VALUES_CHUNK)
        self._indptr = Growing(self._x, "indptr", np.dtype(np.int64), CELLS_CHUNK)
        self._indptr.add(np.zeros(1, np.int64))
        self._obs = new_group(f, "obs", "dataframe", "0.2.0")
        self._columns = {
            name: self._new_column(name) for name in (*own_columns(taken), *taken.labels)
        }
        self._keys = new_index(self._obs, list(self._columns))
        write_order(self._obs, list(self._columns))
        _write_var(f, [t for t, gene in zip(vocab.tokens, is_gene, strict=True) if gene],
                   np.flatnonzero(is_gene))  # fmt: skip

    def add(self, block: Block, first_id: int) -> None:
        """Write cells; AnnData has no use for `first_id`."""
        rows, columns = block.rows, block.columns
        indices = self._column[rows.genes]
        if len(indices) and int(indices.min()) < 0:
            raise FormatError(
                "a cell holds a special token",
                where=self._taken.name,
                advice="run scshards verify on the shard set",
            )
        self._data.add(written(block, self._dtype, self._taken.name))
        start = self._indices.n
        self._indices.add(indices)
        self._indptr.add(rows.indptr[1:] + start)
        own = {SPLIT: columns.split, SOURCE: columns.source, ROW: columns.row}
        found: dict[str, Any] = own | dict(zip(self._taken.labels, columns.labels, strict=True))
        for name, column in self._columns.items():
            values: NDArray[Any] = found[name]
            column.add(values.astype(column.dtype))
        text = keys(block)
        n = self._cells + len(block)
        self._keys.resize((n,))
        self._keys[self._cells : n] = text.view(f"S{text.shape[1]}")[:, 0].astype(object)
        self._cells = n
        self._disk.check()

    def close(self) -> None:
        """Write what is left, and the shape."""
        for growing in (self._data, self._indices, self._indptr, *self._columns.values()):
            growing.finish()
        n_genes = int(self._column.max(initial=-1)) + 1
        self._x.attrs["shape"] = np.array([self._cells, n_genes], np.int64)
        self._file.close()
        self._disk.close()
        self._disk.check()

    def abandon(self) -> None:
        """Close the file, which is not whole."""
        try:
            self._file.close()
        finally:
            self._disk.close()

    def _new_column(self, name: str) -> Growing:
        info = self._taken.labels.get(name)
        if info is None and name == ROW:
            return Growing(self._obs, name, np.dtype(np.int64), CELLS_CHUNK, "array", "0.2.0")
        if info is not None and info.kind == "number":
            return Growing(self._obs, name, np.dtype(np.float64), CELLS_CHUNK, "array", "0.2.0")
        if info is not None:
            names: Sequence[str] = info.categories
        else:
            names = self._taken.splits if name == SPLIT else self._taken.sources
        group = new_group(self._obs, name, "categorical", "0.2.0")
        group.attrs["ordered"] = False
        write_texts(group, "categories", names)
        sizes = (np.int8, np.int16, np.int32)
        kind = next(k for k in sizes if len(names) <= np.iinfo(k).max)
        return Growing(group, "codes", np.dtype(kind), CELLS_CHUNK, "array", "0.2.0")


def read_record(storage: Storage) -> str | None:
    """The record of the file at the root of a storage; None when there is none, or no such file."""
    import h5py

    if not storage.exists(""):
        return None
    try:
        with storage.open() as raw, h5py.File(raw, "r") as f:
            return str(f.attrs[_RECORD])
    except (OSError, KeyError):
        return None  # no HDF5 file, or not one of ours


def check_names(taken: Taken, vocab: Vocab) -> None:
    """ConfigError when HDF5 can't hold a label, a category or a gene by its name."""
    labels = list(taken.labels)
    for name in labels:
        parts = name.split("/")
        inside = [other for other in labels if other.startswith(f"{name}/")]
        if "" in parts or "." in parts or inside:
            raise ConfigError(
                f"the label {name!r} can't be a column of obs",
                where=taken.name,
                advice="export a copy without it: scshards reshard --obs",
            )
    texts = [*vocab.tokens, *labels, *taken.sources]
    texts += [c for info in taken.labels.values() for c in info.categories]
    bad = next((text for text in texts if "\0" in text), None)
    if bad is not None:
        raise ConfigError(f"HDF5 can't hold the text {bad!r}", where=taken.name)


def _write_var(file: Any, genes: Sequence[str], ids: NDArray[np.intp]) -> None:
    var = new_group(file, "var", "dataframe", "0.2.0")
    var.attrs["_index"] = "_index"
    write_order(var, ["id"])
    write_texts(var, "_index", genes)
    dataset = var.create_dataset("id", data=ids.astype(np.int64))
    dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

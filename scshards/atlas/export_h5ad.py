"""AnnData files of cells, written block by block: CSR counts, labels in obs, the vocabulary in var.

The encodings are those of anndata's on-disk format (anndata docs, "On-disk format"). Datasets grow as
cells come, so that no matrix is ever whole in memory. Called by atlas.export.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.atlas.export_cells import Block, Taken
from scshards.atlas.export_values import ROW, SOURCE, SPLIT, keys, own_columns, written
from scshards.base.errors import ConfigError, FormatError
from scshards.cells.vocab import SPECIALS, Vocab

VALUES_CHUNK, CELLS_CHUNK, NAMES_CHUNK = 1 << 17, 1 << 14, 1 << 10
"""Entries of an HDF5 chunk of the matrix, of a column of obs, and of its index."""

_LEVEL = 1
_GROUPS = ("layers", "obsm", "obsp", "uns", "varm", "varp")


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
    """

    def __init__(self, path: Path, taken: Taken, dtype: np.dtype[Any], vocab: Vocab) -> None:
        import h5py

        self._taken, self._dtype = taken, dtype
        is_gene = np.array([t not in SPECIALS for t in vocab.tokens], np.bool_)
        self._column = np.where(is_gene, np.cumsum(is_gene) - 1, -1).astype(np.int32)
        self._file = h5py.File(path, "w")
        self._cells = 0
        f = self._file
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in _GROUPS:
            _group(f, name, "dict", "0.1.0")
        self._x = _group(f, "X", "csr_matrix", "0.1.0")
        self._data = _Growing(self._x, "data", dtype, VALUES_CHUNK)
        self._indices = _Growing(self._x, "indices", np.dtype(np.int32), VALUES_CHUNK)
        self._indptr = _Growing(self._x, "indptr", np.dtype(np.int64), CELLS_CHUNK)
        self._indptr.add(np.zeros(1, np.int64))
        self._obs = _group(f, "obs", "dataframe", "0.2.0")
        self._columns = {
            name: self._new_column(name) for name in (*own_columns(taken), *taken.labels)
        }
        self._keys = _new_index(self._obs, list(self._columns))
        _order(self._obs, list(self._columns))
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

    def close(self) -> None:
        """Write what is left, and the shape."""
        for growing in (self._data, self._indices, self._indptr, *self._columns.values()):
            growing.finish()
        n_genes = int(self._column.max(initial=-1)) + 1
        self._x.attrs["shape"] = np.array([self._cells, n_genes], np.int64)
        self._file.close()

    def abandon(self) -> None:
        """Close the file, which is not whole."""
        self._file.close()

    def _new_column(self, name: str) -> _Growing:
        info = self._taken.labels.get(name)
        if info is None and name == ROW:
            return _Growing(self._obs, name, np.dtype(np.int64), CELLS_CHUNK, "array", "0.2.0")
        if info is not None and info.kind == "number":
            return _Growing(self._obs, name, np.dtype(np.float64), CELLS_CHUNK, "array", "0.2.0")
        if info is not None:
            names: Sequence[str] = info.categories
        else:
            names = self._taken.splits if name == SPLIT else self._taken.sources
        group = _group(self._obs, name, "categorical", "0.2.0")
        group.attrs["ordered"] = False
        _write_texts(group, "categories", names)
        sizes = (np.int8, np.int16, np.int32)
        kind = next(k for k in sizes if len(names) <= np.iinfo(k).max)
        return _Growing(group, "codes", np.dtype(kind), CELLS_CHUNK, "array", "0.2.0")


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


class _Growing:
    """A dataset of one dimension that grows chunk by chunk.

    Chunks are shuffled and compressed here, by isal, and handed to HDF5 as they are: faster than its own
    gzip, and read by whatever reads that.
    """

    def __init__(
        self, group: Any, name: str, dtype: np.dtype[Any], chunk: int, *encoding: str
    ) -> None:
        self.n, self.dtype = 0, dtype
        self._rest, self._chunk = np.zeros(0, dtype), chunk
        self._dataset = group.create_dataset(
            name, (0,), dtype, maxshape=(None,), chunks=(chunk,),
            shuffle=True, compression="gzip", compression_opts=_LEVEL,
        )  # fmt: skip
        if encoding:
            self._dataset.attrs["encoding-type"], self._dataset.attrs["encoding-version"] = encoding

    def add(self, values: NDArray[Any]) -> None:
        """Append values."""
        self.n += len(values)
        if len(self._rest) + len(values) < self._chunk:
            self._rest = np.concatenate([self._rest, values])
            return
        head = self._chunk - len(self._rest)
        self._write(np.concatenate([self._rest, values[:head]]))
        whole = head + (len(values) - head) // self._chunk * self._chunk
        for at in range(head, whole, self._chunk):
            self._write(values[at : at + self._chunk])
        self._rest = values[whole:].copy()

    def finish(self) -> None:
        """Write what does not fill a chunk."""
        if len(self._rest):
            padded = np.zeros(self._chunk, self.dtype)
            padded[: len(self._rest)] = self._rest
            self._write(padded)
        self._dataset.resize((self.n,))

    def _write(self, values: NDArray[Any]) -> None:
        from isal import isal_zlib

        at = self._dataset.shape[0]
        self._dataset.resize((at + self._chunk,))
        planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, self.dtype.itemsize).T
        packed = isal_zlib.compress(np.ascontiguousarray(planes).data, level=_LEVEL)
        self._dataset.id.write_direct_chunk((at,), packed)


def _group(parent: Any, name: str, kind: str, version: str) -> Any:
    group = parent.create_group(name)
    group.attrs.update({"encoding-type": kind, "encoding-version": version})
    return group


def _new_index(frame: Any, columns: Sequence[str]) -> Any:
    """A growing dataset for the names of the rows of a frame."""
    import h5py

    name = "_index"
    while name in columns:
        name = f"_{name}"
    frame.attrs["_index"] = name
    dataset = frame.create_dataset(
        name, (0,), h5py.string_dtype(), maxshape=(None,), chunks=(NAMES_CHUNK,)
    )
    dataset.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return dataset


def _order(frame: Any, columns: Sequence[str]) -> None:
    import h5py

    # An empty list has no type of its own.
    frame.attrs.create("column-order", list(columns), (len(columns),), h5py.string_dtype())


def _write_texts(group: Any, name: str, texts: Sequence[str]) -> None:
    import h5py

    data = np.array(list(texts), object)
    dataset = group.create_dataset(name, (len(data),), h5py.string_dtype(), data=data)
    dataset.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def _write_var(file: Any, genes: Sequence[str], ids: NDArray[np.intp]) -> None:
    var = _group(file, "var", "dataframe", "0.2.0")
    var.attrs["_index"] = "_index"
    _order(var, ["id"])
    _write_texts(var, "_index", genes)
    dataset = var.create_dataset("id", data=ids.astype(np.int64))
    dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

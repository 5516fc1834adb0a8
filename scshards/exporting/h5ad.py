"""AnnData files of cells, written block by block: CSR counts, labels in obs, the vocabulary in var.

Datasets grow as cells come, so that no matrix is ever whole in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scshards.base.errors import ConfigError, FormatError
from scshards.base.storage import Storage
from scshards.cells.tokenizer import TokenRows
from scshards.cells.vocab import SPECIALS
from scshards.census.h5ad import CELLS_CHUNK, LEVEL, VALUES_CHUNK, H5adWriter
from scshards.exporting.cells import Cells, Part
from scshards.shards.arrays import Rows, SparseRows
from scshards.shards.manifest import ArrayInfo

_RECORD = "scshards-export"


class H5adLayout:
    """How cells stand in h5ad files: the genes of the vocabulary are the columns, by their ids.

    Raises
    ------
    ConfigError
        When AnnData can't hold a label, a category or a gene by its name.
    """

    def __init__(self, cells: Cells) -> None:
        self._name, self._columns = cells.name, cells.columns
        self._tokens = cells.vocab.tokens
        self._is_gene = np.array([t not in SPECIALS for t in self._tokens], np.bool_)
        self._place = np.where(self._is_gene, np.cumsum(self._is_gene) - 1, -1).astype(np.int32)
        for name in self._columns:
            parts = name.split("/")
            inside = [other for other in self._columns if other.startswith(f"{name}/")]
            if name == "_index" or "" in parts or "." in parts or inside:
                raise ConfigError(
                    f"the label {name!r} can't be a column of obs",
                    where=cells.name,
                    advice="export a copy without it: scshards reshard --obs",
                )
        self._arrays = cells.arrays
        for name in self._arrays:
            if not _is_key(name):
                raise ConfigError(
                    f"the array {name!r} can't be an element of obsm",
                    where=cells.name,
                    advice="export a copy without it: scshards reshard --arrays",
                )
        columns = [c for info in self._arrays.values() for c in info.columns or ()]
        texts = [*self._tokens, *self._columns, *self._arrays, *columns]
        texts += [text for _, some in self._columns.values() for text in some or ()]
        bad = next((text for text in texts if "\0" in text), None)
        if bad is not None:
            raise ConfigError(f"HDF5 can't hold the text {bad!r}", where=cells.name)

    def prepared(self, part: Part, rows: TokenRows, beside: Mapping[str, Rows]) -> tuple[Any, ...]:
        """Cells as `write` takes them: names, columns of obs, rows of X and of obsm; an h5ad file has no
        ids."""
        indices = self._place[rows.genes]
        if len(indices) and int(indices.min()) < 0:
            raise FormatError(
                "a cell holds a special token",
                where=self._name,
                advice="run scshards verify on the shard set",
            )
        names = part.keys.to_numpy(zero_copy_only=False)
        obs = [values_of(part) for values_of, _ in self._columns.values()]
        return names, obs, rows._replace(genes=indices), beside

    def write(self, path: Path, record: str, found: Iterator[tuple[Any, ...]]) -> None:
        """A file of what `prepared` has made; `record` is what `read_record` gives back, "" is none."""
        import pandas as pd

        first = next(found)
        obs: dict[str, Any] = {}
        for (name, (_, texts)), values in zip(self._columns.items(), first[1], strict=True):
            obs[name] = values[:0]
            if texts is not None:
                categories = pd.Index(np.array(texts, object), dtype=object)
                obs[name] = pd.Categorical.from_codes([], categories=categories)
        no_names = pd.Index([], dtype=object)
        genes = np.array(self._tokens, object)[self._is_gene]
        var = pd.DataFrame({"id": np.flatnonzero(self._is_gene)}, index=genes)
        dtype = first[2].values.dtype
        named = {
            name: np.array(info.columns, object)
            for name, info in self._arrays.items()
            if info.columns is not None and not _is_table(info)
        }
        uns = {"arrays": named} if named else {}
        with H5adWriter(path, pd.DataFrame(obs, index=no_names), var, dtype, uns) as writer:
            if record:
                writer.file.attrs[_RECORD] = record
            growing = [
                writer.growing(f"obs/{name}" if texts is None else f"obs/{name}/codes")
                for name, (_, texts) in self._columns.items()
            ]
            arrays = {
                name: _Element(writer, f"obsm/{name}", info) for name, info in self._arrays.items()
            }
            names = writer.file["obs"][writer.file["obs"].attrs["_index"]]
            for some_names, of_obs, rows, beside in itertools.chain([first], found):
                names.resize((writer.cells + len(some_names),))
                names[writer.cells :] = some_names
                for name, element in arrays.items():
                    element.add(beside[name], some_names)
                for column, values in zip(growing, of_obs, strict=True):
                    column.add(values.astype(column.dtype))
                writer.add(*rows)
            for column in growing:
                column.finish()
            for element in arrays.values():
                element.finish()
            writer.finish()


class _Element:
    """An element of obsm that grows: a table where columns have names that HDF5 can hold, else an array,
    or a CSR matrix."""

    def __init__(self, writer: H5adWriter, at: str, info: ArrayInfo) -> None:
        import pandas as pd
        from anndata.io import write_elem
        from scipy.sparse import csr_matrix

        file, self._info, self._cells, self._values = writer.file, info, 0, 0
        chunk = {"compression": "gzip", "compression_opts": LEVEL, "shuffle": True}
        self._is_table = _is_table(info)
        if info.kind == "sparse":
            none = csr_matrix((0, info.width), dtype=info.dtype)
            how = {**chunk, "indptr_dtype": np.int64, "chunks": (VALUES_CHUNK,)}
            write_elem(file, at, none, dataset_kwargs=how)
            self._parts = [writer.growing(f"{at}/{n}") for n in ("indptr", "indices", "data")]
        elif self._is_table:
            none = np.zeros((0, info.width), info.dtype)
            table = pd.DataFrame(none, pd.Index([], dtype=object), list(info.columns or ()))
            how = {**chunk, "chunks": (CELLS_CHUNK,), "maxshape": (None,)}
            write_elem(file, at, table, dataset_kwargs=how)
            self._parts = [writer.growing(f"{at}/{column}") for column in info.columns or ()]
            self._names = file[at][file[at].attrs["_index"]]
        else:
            rows = max(1, VALUES_CHUNK // info.width)
            how = {**chunk, "chunks": (rows, info.width), "maxshape": (None, info.width)}
            write_elem(file, at, np.zeros((0, info.width), info.dtype), dataset_kwargs=how)
        self._node = file[at]

    def add(self, rows: Rows, names: Any) -> None:
        """Append rows; `names` are those of the cells."""
        if isinstance(rows, SparseRows):
            indptr, indices, data = self._parts
            indptr.add(rows.indptr[1:] + self._values)
            indices.add(rows.columns.astype(indices.dtype))
            data.add(rows.values.astype(data.dtype))
            self._cells += len(rows.indptr) - 1
            self._values += len(rows.values)
            return
        end = self._cells + len(rows)
        if self._is_table:
            self._names.resize((end,))
            self._names[self._cells :] = names
            for column, values in zip(self._parts, rows.T, strict=True):
                column.add(values.astype(column.dtype))
        else:
            self._node.resize((end, self._info.width))
            self._node[self._cells :] = rows
        self._cells = end

    def finish(self) -> None:
        """Write what is left, and the shape."""
        for part in getattr(self, "_parts", ()):
            part.finish()
        if self._info.kind == "sparse":
            self._node.attrs["shape"] = np.array([self._cells, self._info.width], np.int64)


def _is_table(info: ArrayInfo) -> bool:
    """Whether an array is written as a table: HDF5 can hold its columns by their names."""
    names = info.columns
    if info.kind == "sparse" or names is None or len(set(names)) < len(names):
        return False
    return all(map(_is_key, names))


def _is_key(name: str) -> bool:
    return name not in ("", ".", "_index") and "/" not in name


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

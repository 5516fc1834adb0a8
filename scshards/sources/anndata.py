"""AnnData on disk: today's layout and those of older anndata versions, in HDF5 or zarr.

Only what is asked for is read: the names of var, single obs columns, and blocks of one matrix. Groups
and arrays are those of h5py or zarr, which are alike but for what the abstract methods tell.

h5ad files, local or behind any fsspec URL: AnnData in HDF5.
"""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import did_you_mean
from scshards.base.errors import ScshardsError, SourceError
from scshards.sources.hdf5 import direct, plain_values, text
from scshards.sources.matrix import Csc, Csr, Dense, reading
from scshards.sources.rows import FEATURE_TYPES, INDEX, Matrix, Source, missing_column

_INDEX_NAMES = ("_index", "index")


class AnnDataSource(Source):
    """One AnnData; see Source for what it offers and sources.open.open_source for its arguments.

    `file` is its root group; `closing` is closed with it, and holds the file.
    """

    def __init__(
        self,
        file: Any,
        closing: contextlib.ExitStack,
        name: str,
        ordinal: int,
        *,
        gene_column: str | None,
        layer: str | None,
        raw: bool,
        scratch: Path | None,
    ):
        self.name, self.ordinal = name, ordinal
        self._file, self._closing = file, closing
        self._gene_column, self._scratch = gene_column, scratch
        with reading(self.name):
            self._set_matrix(layer, raw)
            self._check_names()

    @abc.abstractmethod
    def _dense(self, node: Any) -> Any:
        """An array of two dimensions as sources.matrix reads it."""

    @abc.abstractmethod
    def _parts(self, node: Any, shape: tuple[int, int], by_rows: bool) -> tuple[Any, Any, Any]:
        """indptr, indices and data of a sparse matrix as sources.matrix reads them."""

    @abc.abstractmethod
    def _old_categories(self, frame: Any, node: Any) -> Any:
        """The categories of a column of anndata 0.7, whose codes are an array with an attribute."""

    def _field(self, table: Any, column: str) -> NDArray[Any]:
        """One column of an array of records."""
        values: NDArray[Any] = table[column]
        return values

    @abc.abstractmethod
    def _listed(self, group: Any) -> Sequence[str]:
        """What is in a group; nothing when the file can't be listed."""

    @property
    def _matrix(self) -> Matrix:
        return self._stored

    def close(self) -> None:
        self._stored.close()
        self._closing.close()

    @cached_property
    def gene_columns(self) -> Sequence[str]:
        with reading(f"{self.name}: {self._var}"):
            return [c for c in _columns(self._file[self._var]) if self._is_text(self._var, c)]

    @property
    def _says_types(self) -> bool:
        with reading(f"{self.name}: {self._var}"):
            return FEATURE_TYPES in _columns(self._file[self._var])

    def _names_in(self, gene_column: str | None) -> Sequence[str]:
        where = f"{self.name}: {self._var}"
        with reading(where):
            frame = self._file[self._var]
            if gene_column is None:
                names = text(self._values(frame, _index_name(frame)))
            elif gene_column in (known := _columns(frame)):
                names = text(self._values(frame, gene_column))
            else:
                raise missing_column(gene_column, known, frame="var", where=where)
        if len(names) != self._stored.shape[1]:
            raise SourceError(
                f"there are {len(names):,} gene names for {self._stored.shape[1]:,} columns",
                where=where,
            )
        return names

    @cached_property
    def obs_columns(self) -> Sequence[str]:
        with reading(f"{self.name}: obs"):
            return _columns(self._file["obs"]) if "obs" in self._file else []

    def obs(self, column: str) -> Any:
        where = f"{self.name}: obs"
        is_index = column == INDEX and column not in self.obs_columns and "obs" in self._file
        if column not in self.obs_columns and not is_index:
            raise missing_column(column, self.obs_columns, frame="obs", where=where)
        with reading(f"{where}, column {column!r}"):
            frame = self._file["obs"]
            values = self._values(frame, _index_name(frame) if is_index else column)
            if getattr(values, "ndim", None) != 1:
                raise SourceError(
                    f"the column holds a {type(values).__name__} and not one value for each cell",
                    where=f"{where}, column {column!r}",
                )
            if len(values) != self.n_rows:
                raise SourceError(
                    f"the column has {len(values):,} values for {self.n_rows:,} cells",
                    where=f"{where}, column {column!r}",
                )
        return values

    @property
    def is_log1p(self) -> bool:
        with reading(f"{self.name}: uns"):
            return "uns" in self._file and "log1p" in self._file["uns"]

    def other_samples(self, n_values: int) -> Iterator[tuple[str, NDArray[Any]]]:
        for name, option in self._matrices().items():
            if name == self._matrix_path:
                continue
            try:
                with reading(self.name):
                    matrix = self._open_matrix(name, f"{self.name}: {name}")
                # raw has columns of its own.
                has_same = matrix.shape == self._stored.shape
                values = (self._of_genes(matrix) if has_same else matrix).sample(n_values)
            except SourceError:
                continue  # it can't be chosen anyway, so it is not named
            yield option, values

    def _set_matrix(self, layer: str | None, raw: bool) -> None:
        known = self._matrices()
        if layer is not None:
            path, wanted = f"layers/{layer}", f"layer {layer!r}"
        elif raw:
            path, wanted = next((p for p in known if p.startswith("raw")), "raw/X"), "raw matrix"
        else:
            path, wanted = "X", "matrix X"
        if path not in self._file:
            layers = [p.removeprefix("layers/") for p in known if p.startswith("layers/")]
            if layer is not None and layers:
                advice = did_you_mean(layer, layers)
            else:
                advice = "it has: " + (", ".join(known) or "no matrix at all")
            raise SourceError(f"the file has no {wanted}", where=self.name, advice=advice)
        self._matrix_path = path
        self.matrix_name = path.replace("raw.", "raw/")
        self._var = {"raw/X": "raw/var", "raw.X": "raw.var"}.get(path, "var")
        self._stored = self._open_matrix(path, f"{self.name}: {self.matrix_name}")
        self.n_rows, self.n_columns = self._stored.shape
        self.n_values = self._stored.n_values

    def _matrices(self) -> dict[str, str]:
        """{its path in the file: the option that chooses it} of all matrices, X first."""
        found = {"X": "the default, X"} if "X" in self._file else {}
        if "layers" in self._file and not _is_array(self._file["layers"]):
            found |= {
                f"layers/{name}": f"--layer {name}" for name in self._listed(self._file["layers"])
            }
        for path in ("raw/X", "raw.X"):  # the latter before anndata 0.7
            if path in self._file:
                found[path] = "--raw"
        return found

    def _open_matrix(self, path: str, where: str) -> Matrix:
        node = self._file[path]
        if _is_array(node):
            return Dense(self._dense(node), where)
        kind = _attr(node, "encoding-type") or _attr(node, "h5sparse_format")
        shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
        if kind not in ("csr", "csc", "csr_matrix", "csc_matrix") or shape is None:
            raise SourceError(
                f"the matrix has the encoding {kind!r}; CSR, CSC and dense can be read", where=where
            )
        by_rows, size = kind.startswith("csr"), _size(shape)
        parts = self._parts(node, size, by_rows)
        return Csr(*parts, size, where) if by_rows else Csc(*parts, size, where, self._scratch)

    def _check_names(self) -> None:
        """The frames must fit the matrix: their sizes are the first thing that damage shows in."""
        if self._var not in self._file:
            raise SourceError(f"the file has no {self._var}", where=self.name)
        if "obs" in self._file:
            with reading(f"{self.name}: obs"):
                frame = self._file["obs"]
                index = frame if _is_array(frame) else frame[_index_name(frame)]
                n = int(index.shape[0])
            if n != self.n_rows:
                raise SourceError(
                    f"obs has {n:,} rows and the matrix has {self.n_rows:,}", where=self.name
                )

    def _values(self, frame: Any, column: str) -> Any:
        """One column of obs or var, decoded, in any of anndata's layouts."""
        if _is_array(frame):  # before anndata 0.7: one table, categories in uns
            values = self._field(frame, column)
            path = f"uns/{column}_categories"
            if path in self._file:
                import pandas as pd

                return pd.Categorical.from_codes(values, text(_read(self._file[path])))
            return np.array(text(values), object) if values.dtype.kind in "SO" else values
        node = frame[column]
        if _is_array(node) and "categories" in node.attrs:  # anndata 0.7
            import pandas as pd

            categories = _read(self._old_categories(frame, node))
            return pd.Categorical.from_codes(node[:], categories.tolist())
        return _read(node)

    def _is_text(self, frame: str, column: str) -> bool:
        """Whether a column may hold names, by its type alone where that is enough."""
        node = self._file[frame]
        if _is_array(node):
            return bool(node.dtype[column].kind in "SO")
        node = node[column]
        if _is_array(node):
            return "categories" in node.attrs or node.dtype.kind in "SOT"
        if _attr(node, "encoding-type") == "categorical":
            categories = node["categories"]
            return not _is_array(categories) or categories.dtype.kind in "SOT"
        return "string" in (_attr(node, "encoding-type") or "")


def _is_array(node: Any) -> bool:
    return hasattr(node, "dtype")  # a group has none


def _read(node: Any) -> Any:
    if (values := plain_values(node)) is not None:
        return values
    from anndata.io import read_elem

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "this file was written by an older version"
        try:
            return read_elem(node)
        except ScshardsError:
            raise
        except Exception as e:
            # anndata raises errors of its own and of its libraries for what it can't make sense of.
            raise ValueError(str(e)) from e


def _columns(frame: Any) -> list[str]:
    index = _index_name(frame)
    if _is_array(frame):
        return [c for c in frame.dtype.names if c != index]
    listed = [c.decode() if isinstance(c, bytes) else str(c) for c in frame.attrs["column-order"]]
    return [c for c in listed if c in frame]


def _index_name(frame: Any) -> str:
    if _is_array(frame):
        names = frame.dtype.names
        if not names:
            raise ValueError("this is no table")
        return next((n for n in _INDEX_NAMES if n in names), names[0])
    name = _attr(frame, "_index") or next((n for n in _INDEX_NAMES if n in frame), None)
    if name is None:
        raise KeyError("this table has no index, so its rows have no names")
    return name


def _size(shape: Any) -> tuple[int, int]:
    """The shape that a sparse matrix says it has."""
    size = np.asarray(shape)
    if size.shape != (2,) or size.dtype.kind not in "iu" or size.min() < 0:
        raise ValueError(f"{shape} is no shape of a matrix")
    return int(size[0]), int(size[1])


def _attr(node: Any, name: str) -> str | None:
    value = node.attrs.get(name)
    return value.decode() if isinstance(value, bytes) else value


class H5ad(AnnDataSource):
    """One h5ad file; see sources.open.open_source for its arguments."""

    def _dense(self, node: Any) -> Any:
        return node

    def _parts(self, node: Any, shape: tuple[int, int], by_rows: bool) -> tuple[Any, Any, Any]:
        return node["indptr"], direct(node["indices"]), direct(node["data"])

    def _old_categories(self, frame: Any, node: Any) -> Any:
        return self._file[node.attrs["categories"]]

    def _listed(self, group: Any) -> Sequence[str]:
        return list(group)

"""AnnData on disk, in HDF5 or zarr, as anndata has written it since 0.7.

Only what is asked for is read: the names of var, single obs columns, and blocks of one matrix. Columns
are read by anndata itself, whatever it writes; matrices by sources.matrix. Groups and arrays are those
of h5py or zarr, which are alike but for what the abstract methods tell.
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
from scshards.sources.hdf5 import check_filters, direct, plain_values, text
from scshards.sources.matrix import Csc, Csr, Dense
from scshards.sources.rows import (
    FEATURE_TYPES,
    INDEX,
    Matrix,
    Source,
    attribute,
    missing_column,
    reading,
)

REWRITE = (
    "if anndata reads it, have anndata write it anew: anndata.read_h5ad(FILE).write_h5ad(NEW), or "
    "anndata.read_zarr and write_zarr"
)


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
        with reading(self.name, advice=REWRITE):
            self._set_matrix(layer, raw)
            if self._var not in self._file:
                raise SourceError(f"the file has no {self._var}", where=self.name)
        with reading(f"{self.name}: obs", advice=REWRITE):
            # Their sizes are the first thing that shows what does not belong together.
            if self._obs is not None and (n := self._obs.n_rows) != self.n_rows:
                raise SourceError(
                    f"obs has {n:,} rows and the matrix has {self.n_rows:,}", where=self.name
                )

    @abc.abstractmethod
    def _dense(self, node: Any) -> Any:
        """An array of two dimensions as sources.matrix reads it."""

    def _texts(self, node: Any) -> Any:
        """An array of texts, of which slices are read."""
        return self._dense(node)

    @abc.abstractmethod
    def _parts(self, node: Any, shape: tuple[int, int], by_rows: bool) -> tuple[Any, Any, Any]:
        """indptr, indices and data of a sparse matrix as sources.matrix reads them."""

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
        with reading(f"{self.name}: {self._var}", advice=REWRITE):
            return [c for c in self._genes_frame.columns if self._genes_frame.is_text(c)]

    @property
    def _says_types(self) -> bool:
        with reading(f"{self.name}: {self._var}", advice=REWRITE):
            return FEATURE_TYPES in self._genes_frame.columns

    def _names_in(self, gene_column: str | None) -> Sequence[str]:
        where = f"{self.name}: {self._var}"
        with reading(where, advice=REWRITE):
            frame = self._genes_frame
            if gene_column is not None and gene_column not in frame.columns:
                raise missing_column(gene_column, frame.columns, frame="var", where=where)
            column = frame.index if gene_column is None else gene_column
        with reading(f"{where}, column {column!r}", advice=REWRITE):
            names = frame.names(column)
        if len(names) != self._stored.shape[1]:
            raise SourceError(
                f"there are {len(names):,} gene names for {self._stored.shape[1]:,} columns",
                where=where,
            )
        return names

    @property
    def obs_columns(self) -> Sequence[str]:
        with reading(f"{self.name}: obs", advice=REWRITE):
            return [] if self._obs is None else self._obs.columns

    def obs(self, column: str) -> Any:
        where, known = f"{self.name}: obs", self.obs_columns
        is_index = column == INDEX and column not in known and self._obs is not None
        if self._obs is None or not (is_index or column in known):
            raise missing_column(column, known, frame="obs", where=where)
        where = f"{where}, column {column!r}"
        with reading(where, advice=REWRITE):
            values = self._obs.values(self._obs.index if is_index else column)
            if getattr(values, "ndim", None) != 1:
                raise SourceError(
                    f"the column holds a {type(values).__name__} and not one value for each cell",
                    where=where,
                )
            if len(values) != self.n_rows:
                raise SourceError(
                    f"the column has {len(values):,} values for {self.n_rows:,} cells", where=where
                )
        return values

    @property
    def cell_names(self) -> Any:
        """See Source."""
        if self._obs is not None and INDEX not in self.obs_columns:
            node = self._file["obs"][self._obs.index]
            if _is_array(node) and attribute(node, "encoding-type") == "string-array":
                check_filters(node, f"{self.name}: obs, column {self._obs.index!r}")
                return self._texts(node)
        return super().cell_names

    @property
    def is_log1p(self) -> bool:
        with reading(f"{self.name}: uns", advice=REWRITE):
            return "uns" in self._file and "log1p" in self._file["uns"]

    def other_samples(self, n_values: int) -> Iterator[tuple[str, NDArray[Any]]]:
        for path, option in self._matrices().items():
            if path == self.matrix_name:
                continue
            try:
                with reading(self.name):
                    matrix = self._open_matrix(path)
                # raw has columns of its own.
                has_same = matrix.shape == self._stored.shape
                values = (self._of_genes(matrix) if has_same else matrix).sample(n_values)
            except SourceError:
                continue  # it can't be chosen anyway, so it is not named
            yield option, values

    def _set_matrix(self, layer: str | None, raw: bool) -> None:
        path = "raw/X" if raw else "X" if layer is None else f"layers/{layer}"
        if path not in self._file or _is_null(self._file[path]):
            known = self._matrices()
            layers = [p.removeprefix("layers/") for p in known if p.startswith("layers/")]
            advice = "it has: " + (", ".join(known) or "no matrix at all")
            if layer is not None and layers:
                advice = did_you_mean(layer, layers)
            wanted = "raw matrix" if raw else "matrix X" if layer is None else f"layer {layer!r}"
            raise SourceError(f"the file has no {wanted}", where=self.name, advice=advice)
        self.matrix_name = path
        self._var = "raw/var" if raw else "var"
        self._stored = self._open_matrix(path)
        self.n_rows, self.n_columns = self._stored.shape
        self.n_values = self._stored.n_values

    @cached_property
    def _genes_frame(self) -> _Frame:
        return _Frame(self._file[self._var], f"{self.name}: {self._var}")

    @cached_property
    def _obs(self) -> _Frame | None:
        return _Frame(self._file["obs"], f"{self.name}: obs") if "obs" in self._file else None

    def _matrices(self) -> dict[str, str]:
        """{its path in the file: the option that chooses it} of all matrices, X first."""
        options = {"X": "the default, X"}
        if "layers" in self._file and not _is_array(self._file["layers"]):
            options |= {f"layers/{n}": f"--layer {n}" for n in self._listed(self._file["layers"])}
        options["raw/X"] = "--raw"
        return {
            path: option
            for path, option in options.items()
            if path in self._file and not _is_null(self._file[path])
        }

    def _open_matrix(self, path: str) -> Matrix:
        where = f"{self.name}: {path}"
        with reading(where, advice=REWRITE):
            node = self._file[path]
            check_filters(node, where)
            if _is_array(node):
                return Dense(self._dense(node), where)
            kind = attribute(node, "encoding-type")
            if kind not in ("csr_matrix", "csc_matrix"):
                raise SourceError(
                    f"the matrix has the encoding {kind!r}; CSR, CSC and dense can be read",
                    where=where,
                    advice=REWRITE,
                )
            by_rows, size = kind == "csr_matrix", _size(node.attrs["shape"])
            parts = self._parts(node, size, by_rows)
        return Csr(*parts, size, where) if by_rows else Csc(*parts, size, where, self._scratch)


class H5ad(AnnDataSource):
    """One h5ad file; see sources.open.open_source for its arguments."""

    def _dense(self, node: Any) -> Any:
        return node

    def _texts(self, node: Any) -> Any:
        return node.asstr()

    def _parts(self, node: Any, shape: tuple[int, int], by_rows: bool) -> tuple[Any, Any, Any]:
        return node["indptr"], direct(node["indices"]), direct(node["data"])

    def _listed(self, group: Any) -> Sequence[str]:
        return list(group)


class _Frame:
    """obs or var: the names of its index and its columns, each of them read when it is asked for."""

    def __init__(self, group: Any, where: str) -> None:
        if _is_array(group):
            raise SourceError(
                "this is an array, as anndata before 0.7 wrote it", where=where, advice=REWRITE
            )
        self._group, self._where = group, where
        found = attribute(group, "_index") or next(
            (name for name in ("_index", "index") if name in group), None
        )
        if found is None:
            raise SourceError(
                "this table has no index, so its rows have no names", where=where, advice=REWRITE
            )
        self.index: str = found

    @cached_property
    def columns(self) -> list[str]:
        listed = np.asarray(self._group.attrs["column-order"]).ravel().tolist()
        names = [c.decode() if isinstance(c, bytes) else str(c) for c in listed]
        return [c for c in names if c in self._group]

    @property
    def n_rows(self) -> int:
        node = self._group[self.index]
        while not _is_array(node):
            # Categories lie beside their codes, and values that may be missing beside a mask.
            node = node["codes" if "codes" in node else "values"]
        return int(node.shape[0])

    def values(self, column: str) -> Any:
        """One column, or the index, as anndata reads it."""
        node = self._group[column]
        check_filters(node, f"{self._where}, column {column!r}")
        if not _is_array(node) or "categories" not in node.attrs:
            return _read(node)
        import pandas as pd

        # anndata 0.7: codes, and a path or reference to their categories.
        place = node.attrs["categories"]
        categories = _read(self._group[place] if isinstance(place, str) else node.file[place])
        return pd.Categorical.from_codes(node[:], categories.tolist())

    def names(self, column: str) -> list[str]:
        """One column, or the index, as text; "" where one is missing."""
        node = self._group[column]
        if not _is_array(node) and attribute(node, "encoding-type") == "categorical":
            # Without anndata and pandas, which take a second to load: every text column may name genes.
            check_filters(node, f"{self._where}, column {column!r}")
            known, codes = plain_values(node["categories"]), plain_values(node["codes"])
            if known is not None and codes is not None and codes.dtype.kind == "i":
                names = [*text(known), ""]
                if codes.min(initial=0) >= -1 and codes.max(initial=-1) < len(known):
                    return [names[code] for code in codes.tolist()]
        return text(self.values(column))

    def is_text(self, column: str) -> bool:
        """Whether a column may hold names, by its type alone."""
        node = self._group[column]
        if not _is_array(node) and attribute(node, "encoding-type") == "categorical":
            node = node["categories"]
        if _is_array(node):
            return "categories" in node.attrs or node.dtype.kind in "SOT"
        return "string" in (attribute(node, "encoding-type") or "")


def _is_array(node: Any) -> bool:
    return hasattr(node, "dtype")  # a group has none


def _is_null(node: Any) -> bool:
    return attribute(node, "encoding-type") == "null"


def _read(node: Any) -> Any:
    if (values := plain_values(node)) is not None:
        return values
    if np.ndim(node.attrs.get("encoding-type")):
        raise ValueError("its encoding-type is an array, where anndata has a text")
    from anndata.io import read_elem

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "this file was written by an older version"
        try:
            return read_elem(node)
        except (ScshardsError, OSError, UnicodeDecodeError):
            raise
        except Exception as e:
            # anndata raises errors of its own and of its libraries for what it can't make sense of,
            # and notes in others where they were met.
            raise ValueError(str(e)) from e


def _size(shape: Any) -> tuple[int, int]:
    """The shape that a sparse matrix says it has."""
    size = np.asarray(shape)
    if size.shape != (2,) or size.dtype.kind not in "iu" or size.min() < 0:
        raise ValueError(f"{shape} is no shape of a matrix")
    return int(size[0]), int(size[1])

"""AnnData on disk, in HDF5 or zarr, as anndata has written it since 0.7.

Only what is asked for is read: the names of var, single obs columns, and blocks of one matrix. Columns
are read by anndata itself, whatever it writes; matrices by sources.matrix. Groups and arrays are those
of h5py or zarr, which are alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, SourceError
from scshards.base.text import did_you_mean
from scshards.sources.arrays import Beside, Columns, DenseBeside, SparseBeside
from scshards.sources.hdf5 import check_filters, plain_values, text
from scshards.sources.matrix import Csc, Csr, Dense
from scshards.sources.rows import INDEX, Matrix, Opening, Source, attribute, reading


class AnnDataSource(Source):
    """One AnnData; see Source for what it offers and sources.open.open_source for its arguments.

    `file` is its root group. `direct` gives of an array of the file what sources.matrix reads.
    """

    def __init__(
        self,
        opening: Opening,
        file: Any,
        direct: Callable[..., Any],
        layer: str | None,
        raw: bool,
    ) -> None:
        self.name = name = opening.name
        self._file, self._direct, self._scratch = file, direct, opening.scratch
        path = "raw/X" if raw else "X" if layer is None else f"layers/{layer}"
        self._var = "raw/var" if raw else "var"
        with reading(name):
            self._refuse_missing(path, layer)
            super().__init__(opening, self._open_matrix(path), path)
            if self._var not in file:
                raise ValueError(f"the file has no {self._var}")
        with reading(f"{name}: obs"):
            # Their sizes are the first thing that shows what does not belong together.
            if self._cells is not None and (n := self._cells.n_rows) != self.n_rows:
                raise ValueError(f"obs has {n:,} rows and the matrix has {self.n_rows:,}")

    @property
    def is_hdf5(self) -> bool:
        """Whether it is an h5ad file."""
        return isinstance(self._file, h5py.File)

    @cached_property
    def gene_columns(self) -> Sequence[str]:
        with reading(f"{self.name}: {self._var}"):
            return [c for c in self._features.columns if self._features.is_text(c)]

    @property
    def _var_columns(self) -> Sequence[str]:
        with reading(f"{self.name}: {self._var}"):
            return self._features.columns

    def _names(self, column: str | None) -> Sequence[str]:
        return self._features.names(self._features.index if column is None else column)

    @property
    def obs_columns(self) -> Sequence[str]:
        with reading(f"{self.name}: obs"):
            return [] if self._cells is None else self._cells.columns

    def _obs(self, column: str | None) -> Any:
        if self._cells is None:
            raise SourceError("the file has no obs", where=self.name)
        return self._cells.values(self._cells.index if column is None else column)

    @property
    def cell_names(self) -> Any:
        """See Source."""
        if self._cells is not None and INDEX not in self.obs_columns:
            node = self._file["obs"][self._cells.index]
            if _is_array(node) and attribute(node, "encoding-type") == "string-array":
                check_filters(node, f"{self.name}: obs, column {self._cells.index!r}")
                return node.asstr() if self.is_hdf5 else self._direct(node)
        return super().cell_names

    def _obsm(self, name: str) -> Beside:
        known = [] if "obsm" not in self._file else sorted(self._file["obsm"])
        if name not in known:
            advice = did_you_mean(name, known) if known else "it has no obsm at all"
            raise SourceError(f"obsm has no {name!r}", where=self.name, advice=advice)
        node = self._file["obsm"][name]
        check_filters(node, f"{self.name}: obsm/{name}")
        if _is_array(node):
            return DenseBeside(self._direct(node))
        kind = attribute(node, "encoding-type")
        if kind == "csr_matrix":
            matrix = self._open_matrix(f"obsm/{name}")
            assert isinstance(matrix, Csr)
            return SparseBeside(matrix, node["data"].dtype)
        if kind != "dataframe":
            what = "dense arrays, CSR and tables of numbers can be read"
            raise ValueError(f"its encoding is {kind!r}; {what}")
        columns = _Frame(node, f"{self.name}: obsm/{name}").columns
        for column in columns:
            part = node[column]
            if not _is_array(part) or part.dtype.kind not in "iufb" or "categories" in part.attrs:
                raise ValueError(f"its column {column!r} does not hold plain numbers")
        return DenseBeside(Columns([self._direct(node[c]) for c in columns]), columns)

    @property
    def is_log1p(self) -> bool:
        with reading(f"{self.name}: uns"):
            return "uns" in self._file and "log1p" in self._file["uns"]

    def other_samples(self, n_values: int) -> Iterator[tuple[str, NDArray[Any]]]:
        for path, option in self._matrices().items():
            if path == self.matrix_name:
                continue
            try:
                with reading(self.name):
                    values = self._open_matrix(path).sample(n_values)
            except SourceError:
                continue  # it can't be chosen anyway, so it is not named
            yield option, values

    def _refuse_missing(self, path: str, layer: str | None) -> None:
        if path in self._file and not _is_null(self._file[path]):
            return
        known = ", ".join(self._matrices())
        wanted = {"X": "matrix X", "raw/X": "raw matrix"}.get(path, f"layer {layer!r}")
        raise SourceError(
            f"the file has no {wanted}",
            where=self.name,
            advice=f"it has: {known or 'no matrix at all'}",
        )

    @cached_property
    def _features(self) -> _Frame:
        return _Frame(self._file[self._var], f"{self.name}: {self._var}")

    @cached_property
    def _cells(self) -> _Frame | None:
        return _Frame(self._file["obs"], f"{self.name}: obs") if "obs" in self._file else None

    def _matrices(self) -> dict[str, str]:
        """{its path in the file: the option that chooses it} of all matrices, X first."""
        options = {"X": "the default, X"}
        if "layers" in self._file and not _is_array(self._file["layers"]):
            options |= {f"layers/{n}": f"--layer {n}" for n in sorted(self._file["layers"])}
        options["raw/X"] = "--raw"
        return {
            path: option
            for path, option in options.items()
            if path in self._file and not _is_null(self._file[path])
        }

    def _open_matrix(self, path: str) -> Matrix:
        where = f"{self.name}: {path}"
        with reading(where):
            node = self._file[path]
            check_filters(node, where)
            if _is_array(node):
                return Dense(self._direct(node))
            kind = attribute(node, "encoding-type")
            if kind not in ("csr_matrix", "csc_matrix"):
                raise ValueError(f"its encoding is {kind!r}; CSR, CSC and dense can be read")
            shape = np.asarray(node.attrs["shape"])
            if shape.shape != (2,) or shape.dtype.kind not in "iu" or shape.min() < 0:
                raise ValueError(f"{node.attrs['shape']} is no shape of a matrix")
            size = (int(shape[0]), int(shape[1]))
            by_rows = kind == "csr_matrix"
            # Nothing but zeros is possible where there is one column to name, or no value at all.
            whole = {
                "indptr": node["data"].shape[0] > 0,
                "indices": size[by_rows] > 1,
                "data": True,
            }
            indptr, indices, data = (
                self._direct(node[n], whole=is_whole) for n, is_whole in whole.items()
            )
            if by_rows:
                return Csr(indptr, indices, data, size)
            return Csc(indptr, indices, data, size, where, self._scratch)


class _Frame:
    """obs or var: the names of its index and its columns, each of them read when it is asked for."""

    def __init__(self, group: Any, where: str) -> None:
        self._group, self._where = group, where
        index = attribute(group, "_index")
        if index is None or _is_array(group):
            raise ValueError(
                "it is no table as anndata has written it since 0.7: it names no index"
            )
        self.index = index

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
        # anndata 0.7 wrote the codes alone, with a path or a reference to their categories.
        return _read(self._group)[column].array

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

"""10x Genomics' matrices: `.h5` files of Cell Ranger 2 and later, and what mtx folders share with them.

    Cell Ranger 3 and later   /matrix/{data,indices,indptr,shape,barcodes,features/{id,name,...}}
    Cell Ranger 2             /GENOME/{data,indices,indptr,shape,barcodes,genes,gene_names}

The matrix is stored as features x cells by columns, which is cells x features by rows. Names are those
of scanpy.read_10x_h5: the index of var is the symbols, `gene_ids`, `feature_types` and `genome` are its
columns. There are no obs columns.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.sources.hdf5 import direct, text
from scshards.sources.matrix import Csr
from scshards.sources.rows import INDEX, MAKE_ANEW, Matrix, Source, missing_column, reading

_COLUMN_OF = {"id": "gene_ids", "feature_type": "feature_types"}


class TenX(Source):
    """A matrix of features with nothing around it: no obs columns, no other matrices."""

    def __init__(
        self,
        name: str,
        ordinal: int,
        features: Mapping[str | None, Sequence[str]],
        *,
        gene_column: str | None,
    ):
        self.name, self.ordinal = name, ordinal
        self._features, self._gene_column = dict(features), gene_column
        self.n_columns = len(self._features[None])

    @property
    def gene_columns(self) -> Sequence[str]:
        return [c for c in self._features if c is not None]

    def _names_in(self, gene_column: str | None) -> Sequence[str]:
        if gene_column not in self._features:
            assert gene_column is not None
            raise missing_column(
                gene_column, self.gene_columns, frame="var", where=f"{self.name}: features"
            )
        return self._features[gene_column]

    @property
    def obs_columns(self) -> Sequence[str]:
        return []

    def obs(self, column: str) -> Any:
        if column != INDEX:
            raise missing_column(column, [], frame="obs", where=f"{self.name}: barcodes")
        return np.array(self._barcodes(), object)

    @abc.abstractmethod
    def _barcodes(self) -> Sequence[str]:
        """The barcode of each cell."""

    @property
    def is_log1p(self) -> bool:
        return False

    def other_samples(self, n_values: int) -> Iterator[tuple[str, NDArray[Any]]]:
        return iter(())

    def close(self) -> None:
        """Nothing is open."""


class TenXFile(TenX):
    """One `.h5` file; see sources.open.open_source for its arguments. `closing` holds the file."""

    def __init__(
        self,
        file: h5py.File,
        closing: contextlib.ExitStack,
        name: str,
        ordinal: int,
        *,
        gene_column: str | None,
    ):
        genomes = _matrix_groups(file)
        if len(genomes) != 1:
            raise SourceError(
                f"the file holds {len(genomes)} genomes, each with cells of its own: "
                f"{', '.join(genomes)}",
                where=name,
                advice="write each to a file: "
                f"scanpy.read_10x_h5(file, genome={genomes[0]!r}).write_h5ad(...)",
            )
        self.matrix_name = genomes[0]
        where = f"{name}: {self.matrix_name}"
        group = file[self.matrix_name]
        with reading(where):
            features = _features(group)
            super().__init__(name, ordinal, features, gene_column=gene_column)
            n_features, self.n_rows = (int(n) for n in group["shape"][:])
            lengths = {len(names) for names in features.values()}
            if lengths != {n_features} or group["barcodes"].shape != (self.n_rows,):
                raise SourceError(
                    f"features or barcodes do not fit the matrix of {n_features:,} features and "
                    f"{self.n_rows:,} cells",
                    where=where,
                    advice=MAKE_ANEW,
                )
            parts = (group["indptr"], direct(group["indices"]), direct(group["data"]))
            self._rows = Csr(*parts, (self.n_rows, n_features), where)
        self.n_values = self._rows.n_values
        self._stored_barcodes = group["barcodes"]
        self._closing = closing

    @property
    def _matrix(self) -> Matrix:
        return self._rows

    def _barcodes(self) -> Sequence[str]:
        with reading(f"{self.name}: barcodes"):
            return text(self._stored_barcodes[:])

    def close(self) -> None:
        self._closing.close()


def is_10x(file: h5py.File) -> bool:
    """Whether an HDF5 file holds matrices as 10x writes them."""
    return "X" not in file and bool(_matrix_groups(file))


def refuse_choice(layer: str | None, raw: bool, name: str) -> None:
    """Raise a SourceError when a layer or `raw` is asked of 10x data."""
    if layer is not None or raw:
        raise SourceError(
            "10x data have no " + (f"layer {layer!r}" if layer is not None else "raw matrix"),
            where=name,
            advice="pack such inputs without --layer and --raw",
        )


def _matrix_groups(file: h5py.File) -> list[str]:
    return [
        name
        for name, node in file.items()
        if isinstance(node, h5py.Group) and "shape" in node and "barcodes" in node
    ]


def _features(group: h5py.Group) -> dict[str | None, list[str]]:
    """The columns of var by their names in scanpy; None is the index, the symbols."""
    if "features" not in group:
        return {None: text(group["gene_names"][:]), "gene_ids": text(group["genes"][:])}
    features = group["features"]
    columns: dict[str | None, list[str]] = {None: text(features["name"][:])}
    for name in ("id", "feature_type", "genome"):
        if name in features:
            columns[_COLUMN_OF.get(name, name)] = text(features[name][:])
    return columns

"""10x Genomics' `.h5` files of Cell Ranger 2 and later, and what mtx folders share with them.

    Cell Ranger 3 and later   /matrix/{data,indices,indptr,shape,barcodes,features/{id,name,...}}
    Cell Ranger 2             /GENOME/{data,indices,indptr,shape,barcodes,genes,gene_names}

The matrix is stored as features x cells by columns, which is cells x features by rows. Names are those
of scanpy.read_10x_h5: the index of var is the symbols, `gene_ids`, `feature_types` and `genome` are its
columns. There are no obs columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from scshards.base.errors import SourceError
from scshards.sources.hdf5 import direct, text
from scshards.sources.matrix import Csr
from scshards.sources.rows import FEATURE_TYPES, Matrix, Opening, Source, reading

_COLUMNS = (
    ("name", None),
    ("id", "gene_ids"),
    ("feature_type", FEATURE_TYPES),
    ("genome", "genome"),
)
"""What the columns of var are called in the file, and in scanpy; None is the index."""


class TenX(Source):
    """A matrix of features with nothing around it but names.

    `features` are the columns of var, with None as the index; `barcodes` reads the names of the cells.
    """

    def __init__(
        self,
        opening: Opening,
        matrix: Matrix,
        matrix_name: str,
        features: Mapping[str | None, Sequence[str]],
        barcodes: Callable[[], Sequence[str]],
    ) -> None:
        super().__init__(opening, matrix, matrix_name)
        self._features, self._barcodes = features, barcodes

    @property
    def gene_columns(self) -> Sequence[str]:
        return [c for c in self._features if c is not None]

    def _names(self, column: str | None) -> Sequence[str]:
        return self._features[column]

    def _obs(self, column: str | None) -> Any:
        return np.array(self._barcodes(), object)


def open_10x(file: h5py.File, opening: Opening) -> TenX:
    """One `.h5` file; see sources.open.open_source."""
    name = opening.name
    genomes = matrix_groups(file)
    if len(genomes) != 1:
        raise SourceError(
            f"the file holds {len(genomes)} genomes, each with cells of its own: "
            f"{', '.join(genomes)}",
            where=name,
            advice="write each to a file: "
            f"scanpy.read_10x_h5(file, genome={genomes[0]!r}).write_h5ad(...)",
        )
    where, group = f"{name}: {genomes[0]}", file[genomes[0]]
    with reading(where):
        if "features" in group:
            stored = group["features"]
            features = {c: text(stored[n][:]) for n, c in _COLUMNS if n in stored or c is None}
        else:
            features = {None: text(group["gene_names"][:]), "gene_ids": text(group["genes"][:])}
        n_features, n_cells = (int(n) for n in group["shape"][:])
        lengths, barcodes = {len(names) for names in features.values()}, group["barcodes"]
        if lengths != {n_features} or barcodes.shape != (n_cells,):
            size = f"{n_features:,} features and {n_cells:,} cells"
            raise ValueError(f"features or barcodes do not fit the matrix of {size}")
        parts = (group["indptr"], direct(group["indices"]), direct(group["data"]))
        matrix = Csr(*parts, (n_cells, n_features))
    return TenX(opening, matrix, genomes[0], features, lambda: text(barcodes[:]))


def matrix_groups(file: h5py.File) -> list[str]:
    """The matrices of an HDF5 file as 10x writes them, one for each genome."""
    return [
        name
        for name, node in file.items()
        if isinstance(node, h5py.Group) and "shape" in node and "barcodes" in node
    ]

"""Cells of a SOMA experiment, such as the CELLxGENE Census: one partition is one input.

Its rows are the cells that the address names, in the order of their soma_joinids; obs and var are as in
an h5ad file of the partition: var named by feature_id, cells by their soma_joinid. Called by
sources.open.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.base.files import Once
from scshards.base.storage import is_local
from scshards.base.text import text_of
from scshards.base.threads import read_ahead
from scshards.census.address import SomaAddress
from scshards.census.context import is_one_of_many
from scshards.census.experiment import READ_VALUES, Experiment, shared
from scshards.sources.matrix import check_dtype, cut_block
from scshards.sources.rows import Block, Matrix, Opening, Source, reading, spread

_PLACES = 2
"""Where values are looked at: for each, TileDB reads and inflates some thousand rows."""

_IDS, _SIZES = "soma_joinid.npy", "values.npy"


class SomaSource(Source):
    """One partition; see Source for what it offers.

    The ids of its cells are read once, by the pack's survey, and kept in `scratch` for its tasks.
    """

    def __init__(
        self, opening: Opening, address: SomaAddress, storage_options: Mapping[str, Any] | None
    ) -> None:
        self.name, self._address, self._options = opening.name, address, storage_options
        # A pack's tasks compare the experiment's state before they open it here; nobody else does.
        if opening.scratch is not None:
            self._experiment = shared(address, storage_options)
            folder = opening.scratch.with_name(f"cells-{self._experiment.state[:16]}")
            kept = Once(folder).made(self._keep_cells)
            self._ids = np.load(kept / _IDS)
            sizes = np.load(kept / _SIZES) if (kept / _SIZES).exists() else None
        else:
            self._experiment = Experiment(address, storage_options)
            opening.closing.callback(self._experiment.close)
            self._ids, sizes = self._cells()
        matrix_name = f"ms/{address.measurement}/X/{address.layer}"
        # A local read keeps a processor busy, and a worker has no other.
        ahead = not is_local(address.uri) or not is_one_of_many()
        with reading(f"{opening.name}: {matrix_name}"):
            rows = _Rows(self._experiment, self._ids, sizes, ahead=ahead)
        super().__init__(opening, rows, matrix_name)

    @property
    def tiles(self) -> tuple[int, int]:
        ids, tile = self._ids, self._experiment.row_tile
        # Of cells with gaps between them there are few in each tile, which costs little to read twice.
        is_stretch = len(ids) > 0 and int(ids[-1] - ids[0]) < len(ids)
        return (int(-ids[0] % tile), tile) if is_stretch else (0, 1)

    @cached_property
    def gene_columns(self) -> Sequence[str]:
        return self._experiment.text_columns_of_var

    @property
    def _var_columns(self) -> Sequence[str]:
        return self._experiment.var_columns

    def _names(self, column: str | None) -> Sequence[str]:
        column = column or self._experiment.gene_index
        if column is None:
            raise SourceError(
                "var has no feature_id or var_id: nothing says which column names the genes",
                where=f"{self.name}: var",
                advice=f"name one with --gene-column; var has: {', '.join(self._var_columns)}",
            )
        table = self._experiment.var([column])
        names = [""] * self._experiment.n_genes
        for gene, found in zip(table[0].to_pylist(), table[1].to_pylist(), strict=True):
            if gene < len(names) and found is not None:
                names[gene] = text_of(found)
        return names

    @property
    def obs_columns(self) -> Sequence[str]:
        return self._experiment.obs_columns

    def _obs(self, column: str | None) -> Any:
        if column is None:
            return self._ids.astype(str).astype(object)
        values = self._experiment.obs(self._ids, [column]).column(0).combine_chunks()
        # Categories come as pandas has them, whole numbers with gaps as floats.
        found = values.to_pandas()
        return found.array if hasattr(found, "cat") else found.to_numpy()

    def other_samples(self, n_values: int) -> Iterator[tuple[str, NDArray[Any]]]:
        for layer in self._experiment.layers:
            if layer == self._address.layer:
                continue
            address = dataclasses.replace(self._address, layer=layer)
            try:
                other = Experiment(address, self._options)
            except SourceError:
                continue  # it can't be chosen anyway, so it is not named
            with contextlib.closing(other):
                rows = _Rows(other, self._ids, None, ahead=False)
                values = rows.sample(n_values)
            yield f"layer={layer} in the address", values

    def _cells(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The ids of the cells, and how many values each has, where obs says so."""
        address = self._address
        ids = self._experiment.ids(address.filter, address.first, address.last)
        if address.cells is not None and len(ids) != address.cells:
            raise SourceError(
                f"the experiment has changed: of {address.cells:,} cells that were to be here it has "
                f"{len(ids):,}",
                where=self.name,
                advice="name the query again, or make its index anew: the numbers of cells are those "
                "of one version of an experiment",
            )
        return ids, self._experiment.n_values(ids)

    def _keep_cells(self, folder: Path) -> None:
        ids, sizes = self._cells()
        np.save(folder / _IDS, ids)
        if sizes is not None:
            np.save(folder / _SIZES, sizes)


class _Rows(Matrix):
    """The rows of some cells of an experiment."""

    def __init__(
        self,
        experiment: Experiment,
        ids: NDArray[np.int64],
        sizes: NDArray[np.int64] | None,
        *,
        ahead: bool,
    ) -> None:
        check_dtype(experiment)
        self._experiment, self._ids, self._sizes, self._ahead = experiment, ids, sizes, ahead
        self.shape = (len(ids), experiment.n_genes)
        self.n_values = (
            int(experiment.mean_values * len(ids)) if sizes is None else int(sizes.sum())
        )

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        sizes = None if self._sizes is None else self._sizes[start:stop]
        reads = self._experiment.rows(
            self._ids[start:stop], n_values=sizes, read_values=max(READ_VALUES, max_values)
        )
        with contextlib.closing(read_ahead(reads) if self._ahead else reads) as coming:
            for indptr, indices, data in coming:
                block = Block(start, indptr, indices, data)
                yield from cut_block(block, max_values, max_rows)
                start += len(indptr) - 1

    def sample(self, n_values: int) -> NDArray[Any]:
        mean = max(self.n_values / max(len(self._ids), 1), 1.0)
        places = spread(len(self._ids), max(1, int(n_values / mean)), _PLACES)
        ids = np.unique(np.concatenate([self._ids[a:b] for a, b in places]))
        parts = [rows.data for rows in self._experiment.rows(ids)]
        return np.concatenate(parts) if parts else np.zeros(0, self._experiment.dtype)

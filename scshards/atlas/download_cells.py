"""One partition's cells from a SOMA experiment into an h5ad file, block by block.

A block of rows is read while the one before is written; obs and var of a partition are held whole.
Called by atlas.download.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.atlas.h5ad_writer import H5adWriter
from scshards.atlas.index_files import IndexMark
from scshards.atlas.partitions import Partition
from scshards.atlas.soma import JOINID, NNZ, Experiment
from scshards.atlas.soma_rows import Rows
from scshards.base.ahead import read_ahead
from scshards.base.errors import SourceError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def read_var(experiment: Experiment) -> pd.DataFrame:
    """All columns of var, indexed by the gene's id; by soma_joinid where there is none."""
    table = experiment.var(experiment.var_columns)
    name = experiment.gene_index or JOINID
    return _frame(table, table.column(name).to_numpy().astype(str))


def write_cells(
    path: Path,
    experiment: Experiment,
    var: pd.DataFrame,
    index: IndexMark,
    partition: Partition,
    ids: NDArray[np.int64],
    count: Callable[[int], object],
) -> int:
    """Write the cells of a partition to `path`.

    Parameters
    ----------
    var
        See read_var.
    ids
        The cells' soma_joinids, as the index has them.
    count
        Is told how many cells a block had.

    Returns
    -------
    How many values X has.

    Raises
    ------
    SourceError
        When the query takes other cells now.
    StorageError
        When they can't be read.
    """
    _refuse_change(experiment, partition, ids)
    table = experiment.obs(ids, experiment.obs_columns)
    n_values = None
    if NNZ in table.column_names:
        n_values = table.column(NNZ).to_numpy().astype(np.int64)
    obs = _frame(table, ids.astype(str))
    place = np.full(experiment.n_genes, -1, np.int32)
    place[var[JOINID].to_numpy()] = np.arange(len(var))
    said = {"query": index.query, "version": index.version, "filter": index.filter}
    blocks = read_ahead(experiment.rows(ids, n_values=n_values))
    with H5adWriter(path, len(var), experiment.dtype) as writer, contextlib.closing(blocks):
        for rows in blocks:
            writer.add(*_by_column(rows, place, experiment.name))
            count(len(rows.indptr) - 1)
        writer.finish(obs, var, {"census": said})
    return writer.values


def _refuse_change(experiment: Experiment, partition: Partition, ids: NDArray[np.int64]) -> None:
    """Ask again which cells of this stretch the query takes: ids of another version would be others."""
    address = partition.address
    found = experiment.ids(address.filter, address.first, address.last)
    if np.array_equal(found, ids):
        return
    gone, new = len(np.setdiff1d(ids, found)), len(np.setdiff1d(found, ids))
    raise SourceError(
        f"the experiment has changed since the index was made: of {len(ids):,} cells {gone:,} are not "
        f"there or do not fit the filter any more, and {new:,} others fit it",
        where=partition.name,
        advice="make the index again, and download into another folder",
    )


def _frame(table: pa.Table, names: NDArray[Any]) -> pd.DataFrame:
    """A data frame as anndata writes it: text that repeats itself is categories."""
    import pandas as pd

    frame = table.to_pandas()
    frame.index = pd.Index(names.astype(object))
    for name in frame.columns:
        if frame[name].dtype == object:
            categories = pd.Categorical(frame[name])
            if len(categories.categories) < len(frame):
                frame[name] = categories
    return frame


def _by_column(
    rows: Rows, place: NDArray[np.int32], name: str
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """indptr, columns and values, columns ascending in each row."""
    from scipy.sparse import csr_array

    columns = place[rows.indices]
    if len(columns) and int(columns.min()) < 0:
        raise SourceError("a cell has a value of a gene that var does not have", where=name)
    shape = (len(rows.indptr) - 1, int(place.max(initial=0)) + 1)
    matrix = csr_array((rows.data, columns, rows.indptr), shape=shape)
    matrix.sort_indices()
    return rows.indptr, matrix.indices, matrix.data

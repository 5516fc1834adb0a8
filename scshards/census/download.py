"""Partitions of a query's cells as h5ad files: what scGPT's download_partition does.

    download(["heart"], "index", "atlas")  ->  atlas/heart/partition_000000.h5ad, ...

Partitions are those that pack cuts of census://heart?index=DIR; census.folder says which are whole. A
block of rows is read while the one before is written; obs and var of a partition are held whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError
from scshards.base.progress import Progress
from scshards.base.storage import Storage, is_local, path_of, redact
from scshards.base.threads import read_ahead
from scshards.census.experiment import JOINID, NNZ, Experiment
from scshards.census.folder import PartitionFolder
from scshards.census.h5ad import H5adWriter
from scshards.census.index import index_names, load_index
from scshards.census.options import DownloadOptions
from scshards.census.rows import Rows

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class DownloadedQuery:
    """A query of a report.

    Attributes
    ----------
    query, version, folder
        Which, and where its files are.
    partitions
        Of the whole query.
    made, were_there, left
        How many of them this call has made and found, and how many are missing after it.
    cells, bytes
        Of those that are there now.
    """

    query: str
    version: str
    folder: str
    partitions: int
    made: int
    were_there: int
    left: int
    cells: int
    bytes: int


def download(
    names: Sequence[str] | None,
    index: str,
    output: str,
    options: DownloadOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[DownloadedQuery, ...]:
    """Write the cells of queries as h5ad files of at most `max_cells` cells.

    X has the counts of all genes as they are in the Census, CSR; obs and var have all of its columns,
    and soma_joinid as text and feature_id for an index. The bytes are the same whoever makes them.

    Parameters
    ----------
    names
        Of the queries; None takes all of the index.
    index
        The folder of an index; see census.index.build_index.
    output
        A local folder; a query's files are in a folder of its name.
    options
        See DownloadOptions.
    storage_options
        For the index and the experiment.
    progress
        Show progress on standard error.

    Raises
    ------
    ConfigError
        When there is no such index or partition, or the output is in a store or holds partitions of
        another index, release or size.
    ChecksumError, FormatError
        When the index is damaged.
    SourceError
        When the experiment no longer has the cells of the index.
    OutputExistsError
        When another process is making the same partition.
    StorageError
        When something can't be read or written. What is done is kept.
    """
    options = options or DownloadOptions()
    if not is_local(output):
        raise ConfigError(
            "h5ad files are written to a local folder",
            where=redact(output),
            advice="name one and copy the files, or pack census://NAME into the store, without files",
        )
    if names is None:
        storage = Storage(index, storage_options)
        names = index_names(storage)
        if not names:
            raise ConfigError(
                "there is no index here",
                where=storage.at(""),
                advice="make one: scshards census index",
            )
    folders = [
        PartitionFolder(
            path_of(output) / name, load_index(index, name, storage_options), options.max_cells
        )
        for name in dict.fromkeys(names)
    ]
    jobs = [(f, n) for f in folders for n in _chosen(f, options.partitions)]
    if options.share is not None:
        jobs = jobs[options.share[0] - 1 :: options.share[1]]
    mine = {f: [n for g, n in jobs if g is f] for f, _ in jobs}
    for folder in mine:
        folder.begin()
    todo = {
        f: [n for n in numbers if not f.finished(n, check=options.check)]
        for f, numbers in mine.items()
    }
    left = sum(len(f.ids(n)) for f, numbers in todo.items() for n in numbers)
    total = sum(len(f.ids(n)) for f, n in jobs)
    made = dict.fromkeys(folders, 0)
    with Progress("download", total, shown=progress, initial=total - left) as bar:
        for folder, numbers in todo.items():
            if numbers:
                made[folder] = _download(folder, numbers, options.check, storage_options, bar.add)
    return tuple(_report(folder, n) for folder, n in made.items())


def _chosen(folder: PartitionFolder, chosen: Sequence[int] | None) -> Sequence[int]:
    """The numbers of the partitions that are asked for."""
    n = len(folder.partitions)
    numbers = range(n) if chosen is None else sorted(set(chosen))
    if numbers and not 0 <= numbers[0] <= numbers[-1] < n:
        raise ConfigError(
            f"{folder.index.mark.name} has {n:,} partitions of {folder.max_cells:,} cells, counted from "
            f"0: none is number {numbers[-1]}",
            where="--partition",
        )
    return numbers


def _report(folder: PartitionFolder, made: int) -> DownloadedQuery:
    n = len(folder.partitions)
    there = [mark for mark in map(folder.finished, range(n)) if mark is not None]
    return DownloadedQuery(
        query=folder.index.mark.query,
        version=folder.index.mark.version,
        folder=str(folder.path),
        partitions=n,
        made=made,
        were_there=len(there) - made,
        left=n - len(there),
        cells=sum(mark.cells for mark in there),
        bytes=sum(mark.bytes for mark in there),
    )


def _download(
    folder: PartitionFolder,
    numbers: Sequence[int],
    check: bool,
    storage_options: Mapping[str, Any] | None,
    count: Callable[[int], object],
) -> int:
    """Make partitions; how many of them no other process has made."""
    mark, made = folder.index.mark, 0
    try:
        experiment = Experiment(mark.address, storage_options)
    except SourceError as e:
        raise SourceError(
            f"{e.what}; the release {mark.version} may not be served any more",
            where=e.where,
            advice="`scshards census list` shows those that are; ids of one release are not those "
            "of another: make an index of that one in another folder",
        ) from None
    with experiment:
        table = experiment.var(experiment.var_columns)
        names = table.column(experiment.gene_index or JOINID)
        var = _frame(table, names.to_numpy().astype(str))
        for number in numbers:

            def write(file: int, number: int = number) -> int:
                return _write_cells(file, experiment, var, folder, number, count)

            if folder.make(number, write, check=check):
                made += 1
            else:
                count(len(folder.ids(number)))
    return made


def _write_cells(
    file: int,
    experiment: Experiment,
    var: pd.DataFrame,
    folder: PartitionFolder,
    number: int,
    count: Callable[[int], object],
) -> int:
    """Write a partition; how many values X has."""
    mark, ids = folder.index.mark, folder.ids(number)
    _refuse_change(experiment, folder, number)
    table = experiment.obs(ids, experiment.obs_columns)
    n_values = None
    if NNZ in table.column_names:
        n_values = table.column(NNZ).to_numpy().astype(np.int64)
    obs = _frame(table, ids.astype(str))
    place = np.full(experiment.n_genes, -1, np.int32)
    place[var[JOINID].to_numpy()] = np.arange(len(var))
    said = {"query": mark.query, "version": mark.version, "filter": mark.filter}
    blocks = read_ahead(experiment.rows(ids, n_values=n_values))
    with (
        H5adWriter(file, obs, var, experiment.dtype, {"census": said}) as writer,
        contextlib.closing(blocks),
    ):
        for rows in blocks:
            writer.add(*_by_column(rows, place, experiment.name))
            count(len(rows.indptr) - 1)
        writer.finish()
    return writer.values


def _refuse_change(experiment: Experiment, folder: PartitionFolder, number: int) -> None:
    """Ask again which cells of this stretch the query takes: ids of another version would be others."""
    (address, name), ids = folder.partitions[number], folder.ids(number)
    found = experiment.ids(address.filter, address.first, address.last)
    if np.array_equal(found, ids):
        return
    gone, new = len(np.setdiff1d(ids, found)), len(np.setdiff1d(found, ids))
    raise SourceError(
        f"the experiment has changed since the index was made: of {len(ids):,} cells {gone:,} are not "
        f"there or do not fit the filter any more, and {new:,} others fit it",
        where=name,
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

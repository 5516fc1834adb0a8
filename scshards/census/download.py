"""Partitions of a query's cells as h5ad files: what scGPT's download_partition does.

    download(["heart"], "index", "atlas")  ->  atlas/heart/partition_000000.h5ad, ...

Partitions are those that pack cuts of census://heart?index=DIR. A partition is written under another
name, and its own is given to it when it is whole; then its mark is written. So a second call makes what
is missing, and several can share the work.

One partition's cells from a SOMA experiment into an h5ad file, block by block.

A block of rows is read while the one before is written; obs and var of a partition are held whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError
from scshards.base.progress import Progress
from scshards.base.storage import Storage, is_local, path_of, redact
from scshards.base.threads import read_ahead
from scshards.census.experiment import JOINID, NNZ, Experiment, open_experiment
from scshards.census.folder import (
    begin_folder,
    finished,
    making,
    publish,
)
from scshards.census.h5ad import H5adWriter
from scshards.census.index import IndexMark, QueryIndex, index_names, load_index
from scshards.census.options import DownloadOptions
from scshards.census.partitions import Partition, cut
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


@dataclass(frozen=True, kw_only=True)
class DownloadReport:
    """What was downloaded."""

    queries: tuple[DownloadedQuery, ...]

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def download(
    names: Sequence[str] | None,
    index: str,
    output: str,
    options: DownloadOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> DownloadReport:
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
    wanted = list(dict.fromkeys(names)) if names is not None else _all(index, storage_options)
    works = [
        _Work(load_index(index, name, storage_options), path_of(output) / name, options)
        for name in wanted
    ]
    jobs = [(work, number) for work in works for number in work.numbers]
    if options.share is not None:
        jobs = jobs[options.share[0] - 1 :: options.share[1]]
    mine = [work for work in works if any(work is w for w, _ in jobs)]
    for work in mine:
        begin_folder(work.folder, work.index.mark, options.max_cells, len(work.partitions))
    todo = [(w, n) for w, n in jobs if not w.finished(n)]
    before = sum(w.size(n) for w, n in jobs) - sum(w.size(n) for w, n in todo)
    total = sum(w.size(n) for w, n in jobs)
    with Progress("download", total, shown=progress, initial=before) as bar:
        for work in mine:
            numbers = [n for w, n in todo if w is work]
            if numbers:
                _download(work, numbers, storage_options, bar.add)
    return DownloadReport(queries=tuple(work.report() for work in works))


class _Work:
    """A query's partitions."""

    def __init__(self, index: QueryIndex, folder: Path, options: DownloadOptions) -> None:
        mark = index.mark
        self.index, self.folder, self.check = index, folder, options.check
        self.partitions = cut(index.ids, mark.address, mark.name, options.max_cells)
        self.max_cells = options.max_cells
        self.made = 0
        n = len(self.partitions)
        self.numbers = range(n) if options.partitions is None else sorted(set(options.partitions))
        if self.numbers and not 0 <= self.numbers[0] <= self.numbers[-1] < n:
            raise ConfigError(
                f"{mark.name} has {n:,} partitions of {options.max_cells:,} cells, counted from 0: none "
                f"is number {self.numbers[-1]}",
                where="--partition",
            )

    def size(self, number: int) -> int:
        return self.partitions[number].address.cells or 0

    def ids(self, number: int) -> NDArray[np.int64]:
        start = number * self.max_cells
        return self.index.ids[start : start + self.max_cells]

    def finished(self, number: int) -> bool:
        return finished(self.folder, number, check=self.check) is not None

    def report(self) -> DownloadedQuery:
        found = [finished(self.folder, n, check=False) for n in range(len(self.partitions))]
        there = [mark for mark in found if mark is not None]
        return DownloadedQuery(
            query=self.index.mark.query,
            version=self.index.mark.version,
            folder=str(self.folder),
            partitions=len(self.partitions),
            made=self.made,
            were_there=len(there) - self.made,
            left=len(self.partitions) - len(there),
            cells=sum(mark.cells for mark in there),
            bytes=sum(mark.bytes for mark in there),
        )


def _all(index: str, storage_options: Mapping[str, Any] | None) -> list[str]:
    storage = Storage(index, storage_options)
    names = index_names(storage)
    if not names:
        raise ConfigError(
            "there is no index here",
            where=storage.at(""),
            advice="make one: scshards census index",
        )
    return names


def _download(
    work: _Work,
    numbers: Sequence[int],
    storage_options: Mapping[str, Any] | None,
    count: Callable[[int], object],
) -> None:
    with _opened(work.index.mark, storage_options) as experiment:
        var = read_var(experiment)
        for number in numbers:
            with making(work.folder, number) as path:
                # Another process may have made it since.
                if finished(work.folder, number, check=False) is not None and not work.check:
                    count(work.size(number))
                    continue
                ids = work.ids(number)
                values = write_cells(
                    path, experiment, var, work.index.mark, work.partitions[number], ids, count
                )
                publish(work.folder, path, number, ids, values)
            work.made += 1


@contextlib.contextmanager
def _opened(mark: IndexMark, storage_options: Mapping[str, Any] | None) -> Iterator[Experiment]:
    with contextlib.ExitStack() as stack:
        try:
            experiment = stack.enter_context(open_experiment(mark.address, storage_options))
        except SourceError as e:
            raise SourceError(
                f"{e.what}; the release {mark.version} may not be served any more",
                where=e.where,
                advice="`scshards census list` shows those that are; ids of one release are not those "
                "of another: make an index of that one in another folder",
            ) from None
        yield experiment


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
    with (
        H5adWriter(path, obs, var, experiment.dtype, {"census": said}) as writer,
        contextlib.closing(blocks),
    ):
        for rows in blocks:
            writer.add(*_by_column(rows, place, experiment.name))
            count(len(rows.indptr) - 1)
        writer.finish()
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

"""The index of a corpus: which cells each query takes in one release of the Census.

    report = build_index(["heart", "lung"], "index")

What scGPT's build_soma_idx does, resumable, with what two queries have in common. A query's files are
read and written by atlas.index_files. Called by the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.atlas.census import Release, find_release
from scshards.atlas.index_files import (
    FORMAT,
    IndexMark,
    encode_ids,
    index_names,
    is_whole,
    read_ids,
    read_mark,
    write_index,
)
from scshards.atlas.partitions import query_address
from scshards.atlas.queries import Queries, Query, load_queries
from scshards.atlas.soma import open_experiment
from scshards.base.errors import ConfigError, SourceError
from scshards.base.progress import Progress
from scshards.base.storage import Storage, redact

PRIMARY = "is_primary_data"
"""The column of obs that says of one of a cell's copies that it is the one to take."""

_SPAN = 1 << 22


@dataclass(frozen=True, kw_only=True)
class IndexedQuery:
    """A query of a report: its mark, and whether it was there before."""

    mark: IndexMark
    was_there: bool


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two queries that have cells in common, and how many."""

    first: str
    second: str
    cells: int


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What an index holds.

    Attributes
    ----------
    folder, version
        Where, and of which release.
    queries
        Those that were asked for.
    overlaps
        Pairs of them that share cells.
    cells, distinct
        Of all queries: with and without those that several take.
    """

    folder: str
    version: str
    queries: tuple[IndexedQuery, ...]
    overlaps: tuple[Overlap, ...]
    cells: int
    distinct: int

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        tree = dataclasses.asdict(self)
        tree["queries"] = [
            {**dataclasses.asdict(q.mark), "was_there": q.was_there} for q in self.queries
        ]
        return tree


def build_index(
    names: Sequence[str] | None,
    folder: str,
    queries_file: str | None = None,
    version: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    *,
    restart: bool = False,
) -> IndexReport:
    """Write the soma_joinids of the cells of queries into a folder.

    What is there is not asked for again: a query with the same filter of the same release.

    Parameters
    ----------
    names
        Of the queries; None takes all of the file.
    folder
        A local path or an fsspec URL.
    queries_file
        None is the shipped one.
    version
        A release, in place of the one that the file names.
    storage_options
        For the folder and the experiment.
    progress
        Show progress on standard error.
    restart
        Make again what is there.

    Raises
    ------
    ConfigError
        When there is no such query or release, a filter can't be used, the folder holds an index of
        another release, or of another filter under the same name.
    SourceError
        When no cell fits a query; those that have some are done before it is raised.
    FormatError
        When a mark in the folder is damaged.
    StorageError
        When something can't be read or written.
    """
    queries = load_queries(queries_file)
    wanted = list(dict.fromkeys(names if names is not None else queries.query))
    for name in wanted:
        queries[name]  # an unknown name is refused before anything is read
    storage = Storage(folder, storage_options)
    release = find_release(queries, version, storage_options)
    marks = _marks(storage, wanted, queries, release, restart=restart)
    done: list[IndexedQuery] = []
    empty: list[str] = []
    with Progress("index", len(wanted), "queries", shown=progress) as bar:
        for name in wanted:
            mark = marks.get(name)
            was_there = mark is not None and is_whole(storage, mark)
            if mark is None or not was_there:
                mark = _make(storage, name, queries[name], release, queries_file, storage_options)
            if mark is None:
                empty.append(name)
            else:
                done.append(IndexedQuery(mark=mark, was_there=was_there))
            bar.add(1, name)
    if empty:
        raise SourceError(
            f"no cell fits {'these queries' if len(empty) > 1 else 'the query'}: {', '.join(empty)}",
            where=release.version,
            advice="check the values that the filter compares with: they are case-sensitive; "
            f"`scshards census show {empty[0]}` shows it. All other queries are done",
        )
    overlaps, distinct = compare(
        {q.mark.query: read_ids(storage, q.mark) for q in done},
        {q.mark.query: q.mark.organism for q in done},
    )
    return IndexReport(
        folder=storage.at(""),
        version=release.version,
        queries=tuple(done),
        overlaps=tuple(overlaps),
        cells=sum(q.mark.cells for q in done),
        distinct=distinct,
    )


def count_cells(
    name: str,
    release: Release,
    queries_file: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[int, int | None, int | None]:
    """How many cells a query takes in a release, how many without duplicates, and how many with them.

    The latter two are None where obs does not say which cells are primary.
    """
    address = query_address(name, release, queries_file)
    query = load_queries(queries_file)[name]
    everything = dataclasses.replace(query, primary=False).obs_filter
    with open_experiment(address, storage_options) as experiment:
        cells = len(experiment.ids(address.filter))
        if PRIMARY not in experiment.obs_columns:
            return cells, None, None
        if query.primary:
            return cells, cells, len(experiment.ids(everything))
        primary = dataclasses.replace(query, primary=True).obs_filter
        return cells, len(experiment.ids(primary)), cells


def compare(
    ids: Mapping[str, NDArray[np.int64]], organisms: Mapping[str, str]
) -> tuple[list[Overlap], int]:
    """Which queries share cells, and how many cells they have together.

    Parameters
    ----------
    ids
        {query: ascending soma_joinids}.
    organisms
        {query: organism}; soma_joinids of two organisms are of different cells.
    """
    overlaps: dict[tuple[str, str], int] = {}
    distinct = 0
    for organism in dict.fromkeys(organisms.values()):
        names = [name for name in ids if organisms[name] == organism]
        for members in _spans([ids[name] for name in names]):
            times = members.sum(0, dtype=np.int32)
            distinct += int(np.count_nonzero(times))
            shared = members[:, times > 1]
            for a, b in combinations(range(len(names)), 2):
                both = int(np.count_nonzero(shared[a] & shared[b]))
                if both:
                    pair = names[a], names[b]
                    overlaps[pair] = overlaps.get(pair, 0) + both
    found = [Overlap(first=a, second=b, cells=n) for (a, b), n in overlaps.items()]
    return sorted(found, key=lambda o: (-o.cells, o.first, o.second)), distinct


def _spans(ids: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[np.bool_]]:
    """Stretch by stretch of soma_joinids: [queries, soma_joinids], whether a query takes a cell."""
    end = max((int(i[-1]) + 1 for i in ids if len(i)), default=0)
    for start in range(0, end, _SPAN):
        stop = min(start + _SPAN, end)
        members = np.zeros((len(ids), stop - start), np.bool_)
        for row, one in zip(members, ids, strict=True):
            low, high = np.searchsorted(one, (start, stop))
            row[one[low:high] - start] = True
        yield members


def _marks(
    storage: Storage,
    wanted: Sequence[str],
    queries: Queries,
    release: Release,
    *,
    restart: bool,
) -> dict[str, IndexMark]:
    """The marks of queries that are done, after all refusals."""
    found: dict[str, IndexMark] = {}
    for name in index_names(storage):
        if restart and name in wanted:
            continue
        mark = read_mark(storage, name)
        if mark is None:
            continue
        if mark.version != release.version:
            raise ConfigError(
                f"the folder holds an index of another release: {name} of {mark.version}, and this "
                f"would be of {release.version}",
                where=storage.at(""),
                advice=f"choose another folder, go on with --version {mark.version}, or make all of "
                "its queries again with --restart",
            )
        if name not in wanted:
            continue
        query = queries[name]
        if (mark.filter, mark.organism) != (query.obs_filter, query.organism):
            raise ConfigError(
                f"the index of {name!r} was made with another filter: {mark.organism}, {mark.filter}",
                where=storage.at(name),
                advice="make it again with --restart, or give the changed query another name",
            )
        found[name] = mark
    return found


def _make(
    storage: Storage,
    name: str,
    query: Query,
    release: Release,
    queries_file: str | None,
    storage_options: Mapping[str, Any] | None,
) -> IndexMark | None:
    """Ask for the cells of a query and write them; None when there are none."""
    address = query_address(name, release, queries_file)
    with open_experiment(address, storage_options) as experiment:
        ids = experiment.ids(address.filter)
        if not len(ids):
            return None
        primary: int | None = len(ids)
        if not query.primary:
            primary = None
            if PRIMARY in experiment.obs_columns:
                only = dataclasses.replace(query, primary=True).obs_filter
                primary = len(experiment.ids(only))
    data = encode_ids(ids)
    mark = IndexMark(
        query=name,
        version=release.version,
        experiment=redact(address.uri),
        organism=query.organism,
        filter=query.obs_filter,
        primary=query.primary,
        cells=len(ids),
        primary_cells=primary,
        sha256=hashlib.sha256(data).hexdigest(),
        region=address.region,
        anonymous=address.anonymous,
        format=FORMAT,
    )
    write_index(storage, mark, data)
    return mark

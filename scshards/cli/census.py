"""`scshards census list | show | index | download`: cells of the CELLxGENE Census, by named queries."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from scshards.base.errors import ScshardsError
from scshards.base.progress import Table, counted, size
from scshards.census.options import DownloadOptions
from scshards.cli.command import Commands, Result
from scshards.cli.options import build, option, options, output, store_options

if TYPE_CHECKING:
    from scshards.census.queries import Queries, Release


_names = click.argument("names", metavar="[NAME]...", nargs=-1)
_queries = option(
    "--queries", help="Your copy of the file of queries. Without it, the shipped one."
)
_release = option(
    "--release",
    help="The release of the Census: its date, stable or latest. Without it, that of the file.",
)


@click.group("census", cls=Commands)
def command() -> None:
    """Cells of the CELLxGENE Census: queries, index, h5ad partitions.

    A query has a name and says which cells are taken; the shipped ones are those of scGPT's human atlas.
    Copy the file that `scshards census list` names, change it, and give it with --queries. To pack cells
    without any file between: scshards pack census://NAME. Needs scshards[census].
    """


@command.command("list")
@_queries
@store_options
def list_(queries: str | None, storage_options: Any) -> Result:
    """List the queries, and the releases of the Census that are served.

    The queries are shown without a network too.
    """
    from scshards.census.queries import SHIPPED, load_queries, releases

    file, known = queries or SHIPPED, load_queries(queries)
    found: dict[str, Release] = {}
    aliases: dict[str, str] = {}
    problem = None
    if known.uri is None:
        try:
            found, aliases = releases(known, storage_options)
        except ScshardsError as e:
            problem = str(e)
    tree = {
        "file": str(file),
        "queries": {n: _query(known, n) for n in known.query},
        **_census(known),
        "aliases": aliases,
        "releases": {name: dataclasses.asdict(release) for name, release in found.items()},
        "problem": problem,
    }
    rows = [(n, q["organism"], q["primary"], q["filter"]) for n, q in tree["queries"].items()]
    lines = [
        (v, ", ".join(sorted(a for a in aliases if aliases[a] == v)), r.is_lts, r.retracted or "")
        for v, r in sorted(found.items(), reverse=True)
    ]
    parts: list[str | Table] = [
        Table(("query", "organism", "primary", "filter"), rows),
        f"from {file}; `scshards census show NAME` shows one in full",
    ]
    if known.uri is not None:
        parts.append(f"the Census is {tree['census']}")
    elif problem is not None:
        parts.append(f"the releases can't be shown: {problem}")
    else:
        parts.append(Table(("release", "also called", "kept for years", "retracted"), lines))
        is_served = aliases.get(known.version, known.version) in found
        served = "" if is_served else ", which is not served"
        parts.append(f"the queries mean {known.version}{served}")
    return Result(tree, parts)


@command.command("show")
@click.argument("name")
@_queries
@_release
@option("--offline", is_flag=True, help="Ask nothing: do not count the cells.")
@store_options
def show(
    name: str, queries: str | None, release: str | None, offline: bool, storage_options: Any
) -> Result:
    """Show a query in full, and how many cells it takes now."""
    from scshards.base.storage import redact
    from scshards.census.experiment import Experiment
    from scshards.census.queries import find_release, load_queries

    known = load_queries(queries)
    query = known[name]
    tree = {"name": name, **_query(known, name), **_census(known)}
    if release is not None:
        tree["version"] = release
    if not offline:
        found = find_release(known, release, storage_options)
        address = query.address(found)
        with Experiment(address, storage_options) as experiment:
            tree["cells"] = len(experiment.ids(address.filter))
        tree |= {"version": found.version, "experiment": redact(address.uri)}
    lines = {
        "query": name,
        "organism": query.organism,
        "cells": "primary ones only" if query.primary else "primary ones and their duplicates",
        "Census": tree["census"],
        "release": tree["version"],
        "experiment": tree.get("experiment"),
        "takes now": counted(tree["cells"], "cells") if "cells" in tree else None,
    }
    told = [f"{key + ':':<12}{value}" for key, value in lines.items() if value is not None]
    return Result(tree, ["\n".join(told), query.obs_filter])


@command.command("index")
@_names
@output("DIR", "The folder of the index, local or in a store.")
@_queries
@_release
@option("--restart", is_flag=True, help="Ask again for what is there.")
@store_options
def index(names: tuple[str, ...], output: str, progress: bool, **chosen: Any) -> Result:
    """Write which cells queries take: DIR/NAME.idx, a soma_joinid a line, and its mark DIR/NAME.json.

    Without a NAME it is all queries of the file. A folder holds queries of one release. What is there
    with the same filter is not asked for again. The tables show how many cells queries have, which are
    duplicates of primary ones, and which queries take the same cells.

    \b
    scshards census index heart lung -o index
    """
    from scshards.census.index import build_index

    report = build_index(names, output, progress=progress, **chosen)
    marks = report.queries
    rows = [
        (
            mark.query,
            mark.organism,
            mark.cells,
            None if mark.primary_cells is None else mark.cells - mark.primary_cells,
            "was there" if mark.query in report.were_there else "made",
        )
        for mark in marks
    ]
    parts: list[str | Table] = [Table(("query", "organism", "cells", "duplicates", "index"), rows)]
    if report.overlaps:
        shared = [(f"{o.first} and {o.second}", o.cells) for o in report.overlaps]
        parts.append(Table(("queries that share cells", "cells"), shared))
    cells = sum(mark.cells for mark in marks)
    several = "" if report.distinct == cells else f", {cells:,} with those of several"
    distinct = counted(report.distinct, "distinct cells")
    parts.append(f"{output}: {distinct} of the Census {marks[0].version}{several}")
    tree = dataclasses.asdict(report)
    there = tree.pop("were_there")
    tree["queries"] = [mark | {"was_there": mark["query"] in there} for mark in tree["queries"]]
    return Result(tree, parts)


@command.command("download")
@_names
@output("DIR", "A local folder; files go to DIR/NAME.")
@option("--index", required=True, help="The folder of the index.")
@options(DownloadOptions)
@store_options
def download(
    names: tuple[str, ...], index: str, output: str, progress: bool, **chosen: Any
) -> Result:
    """Write the cells of an index as h5ad files, DIR/NAME/partition_000000.h5ad and so on.

    Without a NAME it is all queries of the index. Raw counts of all genes, all columns of obs and var.
    The same command again makes what is missing. To train you need no such files: scshards pack
    'census://NAME?index=DIR' takes the same partitions.

    \b
    scshards census download heart --index index -o atlas --share 3/16
    """
    from scshards.census.download import download as run

    asked = build(DownloadOptions, chosen)
    report = run(names, index, output, asked, progress=progress, **chosen)
    header = ("query", "partitions", "made", "before", "missing", "cells", "size")
    rows = [
        (q.query, q.partitions, q.made, q.were_there, q.left, q.cells, size(q.bytes))
        for q in report
    ]
    parts: list[str | Table] = [Table(header, rows)]
    left = sum(q.left for q in report)
    if left:
        others = "other shares make them, or the same without one"
        parts.append(f"{counted(left, 'partitions')} missing: {others}")
    return Result({"queries": report}, parts)


def _query(queries: Queries, name: str) -> dict[str, Any]:
    query = queries[name]
    tree = dataclasses.asdict(query) | {"filter": " ".join(query.filter.split())}
    return tree | {"obs_filter": query.obs_filter}


def _census(queries: Queries) -> dict[str, Any]:
    """Where the Census is, without credentials."""
    from scshards.base.storage import redact

    version = queries.version if queries.uri is None else None
    return {"census": redact(queries.uri or queries.directory), "version": version}

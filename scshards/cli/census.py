"""`scshards census list | show | index | download`: cells of the CELLxGENE Census, by named queries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from scshards.base.errors import ConfigError, ScshardsError
from scshards.cli.pack import interruptible, parse_share

if TYPE_CHECKING:
    from scshards.census.download import DownloadReport
    from scshards.census.index import IndexReport
    from scshards.census.queries import Queries
    from scshards.census.releases import Release

_queries = click.option(
    "--queries",
    "file",
    metavar="FILE",
    help="Your copy of the file of queries; else the shipped one.",
)
_version = click.option(
    "--version", metavar="V", help="A release: its date, stable or latest; else that of the file."
)
_storage_options = click.option(
    "--storage-options",
    metavar="JSON",
    help="For the index and the experiment. S3 takes endpoint and credentials from the AWS variables "
    "and profiles otherwise.",
)
_json = click.option("--json", "as_json", is_flag=True, help="The same as JSON on standard output.")


@click.group("census")
def command() -> None:
    """Cells of the CELLxGENE Census: queries, index, h5ad partitions.

    A query has a name and says which cells are taken; the shipped ones are those of scGPT's human atlas.
    Copy the file that `scshards census list` names, change it, and give it with --queries. To pack cells
    without any file between: scshards pack census://NAME. Needs scshards[census].
    """


@command.command("list")
@_queries
@_json
def list_(file: str | None, as_json: bool) -> None:
    """List the queries, and the releases of the Census that are served.

    The queries are shown without a network too.
    """
    from scshards.base.progress import shorten, table
    from scshards.census.queries import SHIPPED, load_queries
    from scshards.census.releases import releases

    queries = load_queries(file)
    found: dict[str, Release] = {}
    aliases: dict[str, str] = {}
    problem = None
    if queries.uri is None:
        try:
            found, aliases = releases(queries)
        except ScshardsError as e:
            problem = e
    if as_json:
        tree = {
            "file": str(file or SHIPPED),
            "queries": {n: _query_tree(queries, n) for n in queries.query},
            **_census_tree(queries),
            "aliases": aliases,
            "releases": {
                name: {"uri": r.uri, "region": r.region, "lts": r.is_lts, "retracted": r.retracted}
                for name, r in found.items()
            },
            "problem": None if problem is None else str(problem),
        }
        click.echo(json.dumps(tree, indent=1, ensure_ascii=False))
        return
    rows = [
        (name, q.organism, q.primary, shorten(" ".join(q.filter.split()), 70))
        for name, q in queries.query.items()
    ]
    click.echo(table(("query", "organism", "primary", "filter"), rows))
    click.echo(f"\nfrom {file or SHIPPED}; `scshards census show NAME` shows one in full")
    if queries.uri is not None:
        click.echo(f"\nthe Census is {_census_tree(queries)['census']}")
    elif problem is not None:
        click.echo(f"\nthe releases can't be shown: {problem}", err=True)
    else:
        names = {v: [a for a, of in sorted(aliases.items()) if of == v] for v in found}
        lines = [
            (v, ", ".join(names[v]), r.is_lts, r.retracted or "")
            for v, r in sorted(found.items(), reverse=True)
        ]
        click.echo("\n" + table(("release", "also called", "kept for years", "retracted"), lines))
        meant = aliases.get(queries.version, queries.version)
        known = "" if meant in found else ", which is not served"
        click.echo(f"\nthe queries mean {queries.version}" + known)


@command.command("show")
@click.argument("name")
@_queries
@_version
@_storage_options
@click.option("--offline", is_flag=True, help="Ask nothing: do not count the cells.")
@_json
def show(
    name: str,
    file: str | None,
    version: str | None,
    storage_options: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Show a query in full, and how many cells it takes now."""
    from scshards.base.storage import parse_options, redact
    from scshards.census.index import count_cells
    from scshards.census.queries import load_queries
    from scshards.census.releases import find_release

    queries = load_queries(file)
    tree: dict[str, Any] = {"name": name, **_query_tree(queries, name), **_census_tree(queries)}
    if version is not None:
        tree["version"] = version
    if not offline:
        options = parse_options(storage_options)
        release = find_release(queries, version, options)
        tree["version"] = release.version
        tree["experiment"] = redact(release.experiment(queries[name].organism))
        tree["cells"], tree["primary_cells"], tree["all_cells"] = count_cells(
            name, release, file, options
        )
    if as_json:
        click.echo(json.dumps(tree, indent=1, ensure_ascii=False))
        return
    lines = {
        "query": name,
        "organism": tree["organism"],
        "cells": "primary ones only" if tree["primary"] else "primary ones and their duplicates",
        "Census": tree["census"],
        "release": tree["version"],
        "experiment": tree.get("experiment"),
    }
    if not offline:
        lines["takes now"] = f"{tree['cells']:,} cells"
        if tree["primary_cells"] is not None:
            lines["takes now"] += (
                f"; {tree['primary_cells']:,} primary ones of {tree['all_cells']:,} with duplicates"
            )
    for key, value in lines.items():
        if value is not None:
            click.echo(f"{key + ':':<12}{value}")
    click.echo(f"\n{tree['obs_filter']}")


@command.command("index")
@click.option("--query", "names", metavar="NAME", multiple=True, help="A query. Repeatable.")
@click.option("--all", "is_all", is_flag=True, help="All queries of the file.")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    help="The folder of the index, local or in a store.",
)
@_queries
@_version
@click.option("--restart", is_flag=True, help="Ask again for what is there.")
@_storage_options
@_json
def index(
    names: tuple[str, ...],
    is_all: bool,
    output: str,
    file: str | None,
    version: str | None,
    restart: bool,
    storage_options: str | None,
    as_json: bool,
) -> None:
    """Write which cells queries take: DIR/NAME.idx, a soma_joinid a line, and its mark DIR/NAME.json.

    A folder holds queries of one release. What is there with the same filter is not asked for again. The
    tables show how many cells queries have, which are duplicates of primary ones, and which queries take
    the same cells.
    """
    from scshards.base.storage import parse_options
    from scshards.census.index import build_index

    with interruptible():
        report = build_index(
            _names(names, is_all),
            output,
            file,
            version,
            parse_options(storage_options),
            restart=restart,
        )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        _show_index(report)


@command.command("download")
@click.option("--query", "names", metavar="NAME", multiple=True, help="A query. Repeatable.")
@click.option("--all", "is_all", is_flag=True, help="All queries of the index.")
@click.option("--index", "folder", required=True, metavar="DIR", help="The folder of the index.")
@click.option(
    "-o", "--output", required=True, metavar="DIR", help="A local folder; files go to DIR/NAME."
)
@click.option(
    "--partition",
    "partitions",
    metavar="I",
    multiple=True,
    type=click.IntRange(min=0),
    help="Only this partition, counted from 0. Repeatable.",
)
@click.option(
    "--max-cells",
    default=200_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Cells of a partition.",
)
@click.option(
    "--task",
    metavar="I/N",
    help="Only every N-th partition from the I-th on, beside other processes that do the others, such "
    "as the tasks of a Slurm array.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Read the files that are there and make again those that are damaged; else only their sizes "
    "are looked at.",
)
@_storage_options
@_json
def download(
    names: tuple[str, ...],
    is_all: bool,
    folder: str,
    output: str,
    partitions: tuple[int, ...],
    max_cells: int,
    task: str | None,
    check: bool,
    storage_options: str | None,
    as_json: bool,
) -> None:
    """Write the cells of an index as h5ad files, DIR/NAME/partition_000000.h5ad and so on.

    Raw counts of all genes, all columns of obs and var. The same command again makes what is missing. To
    train you need no such files: scshards pack 'census://NAME?index=DIR' takes the same partitions.
    """
    from scshards.base.storage import parse_options
    from scshards.census.download import DownloadOptions
    from scshards.census.download import download as run

    options = DownloadOptions(
        partitions=partitions or None,
        max_cells=max_cells,
        share=None if task is None else parse_share(task),
        check=check,
    )
    with interruptible():
        report = run(
            _names(names, is_all),
            folder,
            output,
            options,
            parse_options(storage_options),
        )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        _show_download(report, task)


def _names(names: tuple[str, ...], is_all: bool) -> tuple[str, ...] | None:
    """The queries that are meant; None is all."""
    if bool(names) == is_all:
        raise ConfigError("give --query NAME, once or more often, or --all")
    return None if is_all else names


def _query_tree(queries: Queries, name: str) -> dict[str, Any]:
    query = queries[name]
    return {
        "organism": query.organism,
        "primary": query.primary,
        "filter": " ".join(query.filter.split()),
        "obs_filter": query.obs_filter,
    }


def _census_tree(queries: Queries) -> dict[str, Any]:
    """Where the Census is, without credentials."""
    from scshards.base.storage import redact

    if queries.uri is not None:
        return {"census": redact(queries.uri), "version": None}
    return {"census": redact(queries.directory), "version": queries.version}


def _show_index(report: IndexReport) -> None:
    from scshards.base.progress import table

    rows = [
        (
            q.mark.query,
            q.mark.organism,
            q.mark.cells,
            None if q.mark.primary_cells is None else q.mark.cells - q.mark.primary_cells,
            "was there" if q.was_there else "made",
        )
        for q in report.queries
    ]
    click.echo(table(("query", "organism", "cells", "duplicates", "index"), rows))
    if report.overlaps:
        shared = [(f"{o.first} and {o.second}", o.cells) for o in report.overlaps]
        click.echo("\n" + table(("queries that share cells", "cells"), shared))
    click.echo(
        f"\n{report.folder}: {report.distinct:,} distinct cells of the Census {report.version}"
        + ("" if report.distinct == report.cells else f", {report.cells:,} with those of several")
    )


def _show_download(report: DownloadReport, task: str | None) -> None:
    from scshards.base.progress import size, table

    rows = [
        (q.query, q.partitions, q.made, q.were_there, q.left, q.cells, size(q.bytes))
        for q in report.queries
    ]
    header = ("query", "partitions", "made now", "there before", "missing", "cells there", "size")
    click.echo(table(header, rows))
    left = sum(q.left for q in report.queries)
    if left:
        who = "" if task is None else f"task {task.replace('/', ' of ')}: "
        click.echo(
            f"\n{who}{left:,} partitions are missing: other tasks make them, or run without one"
        )

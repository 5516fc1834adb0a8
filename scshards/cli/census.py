"""`scshards census list | show | index | download`: cells of the CELLxGENE Census, by named queries."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from scshards.base.errors import ScshardsError
from scshards.census.options import DownloadOptions
from scshards.cli.command import Commands
from scshards.cli.options import as_json, build, option, options, store_options

if TYPE_CHECKING:
    from scshards.census.download import DownloadedQuery
    from scshards.census.index import IndexReport
    from scshards.census.queries import Queries
    from scshards.census.releases import Release

_queries = option(
    "--queries", help="Your copy of the file of queries. Without it, the shipped one."
)
_release = option(
    "--release",
    help="The release of the Census: its date, stable or latest. Without it, that of the file.",
)
_names = click.argument("names", metavar="[NAME]...", nargs=-1)


@click.group("census", cls=Commands)
def command() -> None:
    """Cells of the CELLxGENE Census: queries, index, h5ad partitions.

    A query has a name and says which cells are taken; the shipped ones are those of scGPT's human atlas.
    Copy the file that `scshards census list` names, change it, and give it with --queries. To pack cells
    without any file between: scshards pack census://NAME. Needs scshards[census].
    """


@command.command("list")
@_queries
@as_json
def list_(queries: str | None, as_json: bool) -> None:
    """List the queries, and the releases of the Census that are served.

    The queries are shown without a network too.
    """
    from scshards.base.progress import shorten, table
    from scshards.census.queries import SHIPPED, load_queries
    from scshards.census.releases import releases

    file, known = queries or SHIPPED, load_queries(queries)
    found: dict[str, Release] = {}
    aliases: dict[str, str] = {}
    problem = None
    if known.uri is None:
        try:
            found, aliases = releases(known)
        except ScshardsError as e:
            problem = e
    if as_json:
        tree = {
            "file": str(file),
            "queries": {n: _query_tree(known, n) for n in known.query},
            **_census_tree(known),
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
        for name, q in known.query.items()
    ]
    click.echo(table(("query", "organism", "primary", "filter"), rows))
    click.echo(f"\nfrom {file}; `scshards census show NAME` shows one in full")
    if known.uri is not None:
        click.echo(f"\nthe Census is {_census_tree(known)['census']}")
    elif problem is not None:
        click.echo(f"\nthe releases can't be shown: {problem}", err=True)
    else:
        names = {v: [a for a, of in sorted(aliases.items()) if of == v] for v in found}
        lines = [
            (v, ", ".join(names[v]), r.is_lts, r.retracted or "")
            for v, r in sorted(found.items(), reverse=True)
        ]
        click.echo("\n" + table(("release", "also called", "kept for years", "retracted"), lines))
        meant = aliases.get(known.version, known.version)
        served = "" if meant in found else ", which is not served"
        click.echo(f"\nthe queries mean {known.version}{served}")


@command.command("show")
@click.argument("name")
@_queries
@_release
@option("--offline", is_flag=True, help="Ask nothing: do not count the cells.")
@store_options
@as_json
def show(
    name: str,
    queries: str | None,
    release: str | None,
    offline: bool,
    storage_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Show a query in full, and how many cells it takes now."""
    from scshards.base.storage import redact
    from scshards.census.index import count_cells
    from scshards.census.queries import load_queries
    from scshards.census.releases import find_release

    known = load_queries(queries)
    tree: dict[str, Any] = {"name": name, **_query_tree(known, name), **_census_tree(known)}
    if release is not None:
        tree["version"] = release
    if not offline:
        found = find_release(known, release, storage_options)
        tree["version"] = found.version
        tree["experiment"] = redact(found.experiment(known[name].organism))
        counts = count_cells(known[name], found, storage_options)
        tree["cells"], tree["primary_cells"], tree["all_cells"] = counts
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
@_names
@option("--all", is_flag=True, help="Take all queries of the file.")
@option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    help="The folder of the index, local or in a store.",
)
@_queries
@_release
@option("--restart", is_flag=True, help="Ask again for what is there.")
@store_options
@as_json
def index(
    names: tuple[str, ...],
    all: bool,
    output: str,
    queries: str | None,
    release: str | None,
    restart: bool,
    storage_options: dict[str, Any],
    as_json: bool,
    progress: bool,
) -> None:
    """Write which cells queries take: DIR/NAME.idx, a soma_joinid a line, and its mark DIR/NAME.json.

    A folder holds queries of one release. What is there with the same filter is not asked for again. The
    tables show how many cells queries have, which are duplicates of primary ones, and which queries take
    the same cells.

    \b
    scshards census index heart lung -o index
    """
    from scshards.census.index import build_index

    report = build_index(
        _chosen(names, all), output, queries, release, storage_options, progress, restart=restart
    )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        _show_index(report)


@command.command("download")
@_names
@option("--all", is_flag=True, help="Take all queries of the index.")
@option("--index", required=True, help="The folder of the index.")
@option(
    "-o", "--output", required=True, metavar="DIR", help="A local folder; files go to DIR/NAME."
)
@options(DownloadOptions)
@store_options
@as_json
def download(
    names: tuple[str, ...],
    all: bool,
    index: str,
    output: str,
    storage_options: dict[str, Any],
    as_json: bool,
    progress: bool,
    **chosen: Any,
) -> None:
    """Write the cells of an index as h5ad files, DIR/NAME/partition_000000.h5ad and so on.

    Raw counts of all genes, all columns of obs and var. The same command again makes what is missing. To
    train you need no such files: scshards pack 'census://NAME?index=DIR' takes the same partitions.

    \b
    scshards census download heart --index index -o atlas --share 3/16
    """
    from scshards.census.download import download as run

    asked = build(DownloadOptions, chosen)
    report = run(_chosen(names, all), index, output, asked, storage_options, progress)
    if as_json:
        tree = {"queries": [dataclasses.asdict(query) for query in report]}
        click.echo(json.dumps(tree, indent=1, ensure_ascii=False))
    else:
        _show_download(report, asked.share)


def _chosen(names: tuple[str, ...], all: bool) -> tuple[str, ...] | None:
    """The queries that are meant; None is all."""
    if bool(names) == all:
        raise click.UsageError("name queries, or say --all")
    return None if all else names


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


def _show_download(report: Sequence[DownloadedQuery], share: tuple[int, int] | None) -> None:
    from scshards.base.progress import counted, size, table

    rows = [
        (q.query, q.partitions, q.made, q.were_there, q.left, q.cells, size(q.bytes))
        for q in report
    ]
    header = ("query", "partitions", "made now", "there before", "missing", "cells there", "size")
    click.echo(table(header, rows))
    left = sum(q.left for q in report)
    if left:
        who = "" if share is None else f"share {share[0]} of {share[1]}: "
        what = f"{counted(left, 'partitions')} {'is' if left == 1 else 'are'} missing"
        click.echo(f"\n{who}{what}: other shares make them, or run without one")

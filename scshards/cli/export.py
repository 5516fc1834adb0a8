"""`scshards export`: the cells of a shard set -> scBank, AnnData or parquet."""

from __future__ import annotations

import json
from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, build, option, options
from scshards.exporting.options import ExportOptions


@click.command("export", cls=Command)
@click.argument("root")
@options(ExportOptions)
@option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="Not there yet: NAME.scb; NAME.h5ad, or a folder for several files; a folder of parquet files.",
)
@option(
    "--restart",
    is_flag=True,
    help="Throw away what an unfinished export has left at OUT in an object store.",
)
@as_json
def command(
    root: str, output: str, restart: bool, as_json: bool, progress: bool, **chosen: Any
) -> None:
    """Write the cells of the shard set ROOT as scBank, AnnData or parquet.

    Every gene and value comes out as it was packed. OUT is there only when it is whole.

    \b
    scshards export shards --to scbank -o counts.scb
    scshards export shards --to h5ad --order source -o cells.h5ad
    scshards export s3://bucket/shards --to parquet -o s3://bucket/tables
    """
    from scshards.base.progress import printable, size, table
    from scshards.exporting.export import export

    report = export(root, output, build(ExportOptions, chosen), restart=restart, progress=progress)
    if as_json:
        click.echo(json.dumps(report.to_json(), ensure_ascii=False))
        return
    rows = [(s, n) for s, n in report.splits.items()]
    click.echo(table(("split", "cells"), rows, total=("all", report.cells)))
    n = len(report.files)
    left_out = f"; {report.left_out:,} left out by --where" if report.left_out else ""
    click.echo(
        f"\n{report.values:,} values ({report.dtype}) in {n:,} file{'s' if n > 1 else ''}, "
        f"{size(sum(f.bytes for f in report.files))}: {printable(report.output)}{left_out}"
    )

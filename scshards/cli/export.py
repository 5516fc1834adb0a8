"""`scshards export`: the cells of a shard set -> scBank, AnnData or parquet."""

from __future__ import annotations

import json
from typing import Any

import click

from scshards.cli.pack import interruptible


@click.command("export")
@click.argument("root")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["scbank", "h5ad", "parquet"]),
    help="scbank: scGPT's genes and expressions. h5ad: AnnData. parquet: list columns and labels.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="Not there yet: NAME.scb; NAME.h5ad, or a folder for several files; a folder of parquet files.",
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME",
    help="Take the cells of this split only. Repeatable.",
)
@click.option(
    "--where",
    metavar="EXPR",
    help="Take the cells this is true for: an expression over labels, n_genes, total (the sum of a "
    "cell's values) and source (the input's number), such as \"tissue == 'lung' and n_genes > 500\".",
)
@click.option(
    "--order",
    type=click.Choice(["shard", "source"]),
    default="shard",
    show_default=True,
    help="As cells lie in the shards, or as they were in the inputs: that takes temporary files about "
    "as large as the shards.",
)
@click.option(
    "--max-cells",
    metavar="N",
    type=click.IntRange(min=1),
    help="Cells of a file at most, in a folder of h5ad or parquet files; default: 100000.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float64", "int64"]),
    default="auto",
    show_default=True,
    help="Of the values. auto: the first of these that holds all of them exactly.",
)
@click.option(
    "--scratch",
    metavar="DIR",
    help="Folder for temporary files; without it, beside a local OUT, or the system's.",
)
@click.option(
    "--storage-options", metavar="JSON", help="For the file systems of ROOT and OUT, as for pack."
)
@click.option(
    "--restart",
    is_flag=True,
    help="Throw away what an unfinished export has left at OUT in an object store.",
)
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on standard output.")
def command(root: str, output: str, restart: bool, as_json: bool, **chosen: Any) -> None:
    """Write the cells of the shard set ROOT as scBank, AnnData or parquet.

    Every gene and value comes out as it was packed. OUT is there only when it is whole.

    \b
    scshards export shards --to scbank -o counts.scb
    scshards export shards --to h5ad --order source -o cells.h5ad
    scshards export s3://bucket/shards --to parquet -o s3://bucket/tables
    """
    from scshards.base.progress import printable, size, table
    from scshards.base.storage import parse_options
    from scshards.exporting.export import export
    from scshards.exporting.options import ExportOptions

    chosen["splits"] = chosen["splits"] or None
    chosen["storage_options"] = parse_options(chosen["storage_options"])
    with interruptible():
        report = export(root, output, ExportOptions(**chosen), restart=restart)
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

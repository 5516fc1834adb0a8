"""`scshards export`: the cells of a shard set -> scBank, AnnData or parquet."""

from __future__ import annotations

from typing import Any

import click

from scshards.base.progress import Table, counted, printable, size
from scshards.cli.command import Command, Result
from scshards.cli.options import build, options, output
from scshards.exporting.options import ExportOptions


@click.command("export", cls=Command)
@click.argument("root")
@options(ExportOptions)
@output(
    "OUT",
    "Not there yet: NAME.scb; NAME.h5ad, or a folder for several files; a folder of parquet files.",
)
def command(root: str, output: str, progress: bool, **chosen: Any) -> Result:
    """Write the cells of the shard set ROOT as scBank, AnnData or parquet.

    Every gene and value comes out as it was packed. OUT is there only when it is whole.

    \b
    scshards export shards --to scbank -o counts.scb
    scshards export shards --to h5ad --split valid -o cells.h5ad
    scshards export s3://bucket/shards --to parquet -o s3://bucket/tables
    """
    from scshards.exporting.export import export

    report = export(root, output, build(ExportOptions, chosen), progress=progress)
    rows = list(report.splits.items())
    left_out = f"; {report.left_out:,} left out by --where" if report.left_out else ""
    values, files = counted(report.values, "values"), counted(len(report.files), "files")
    text = (
        f"{values} ({report.dtype}) in {files}, {size(sum(f.bytes for f in report.files))}: "
        f"{printable(report.output)}{left_out}"
    )
    return Result(report, [Table(("split", "cells"), rows, ("all", report.cells)), text])

"""What `scshards embed` and `scshards annotate` have in common: options, and the lines at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from scshards.cli.table_options import TABLE_OPTIONS

_OPTIONS = (
    click.option("-o", "--output", required=True, metavar="OUT", help="Not there yet."),
    click.option("--split", metavar="NAME", help="Of a shard set; default: all of them."),
    click.option("--gene-column", metavar="COL", help="Column of var with the gene names."),
    click.option("--layer", metavar="NAME", help="Read this layer in place of X."),
    click.option("--raw", is_flag=True, help="Read raw.X in place of X."),
    *TABLE_OPTIONS,
    click.option("--max-length", type=int, help="Tokens of a cell; default: the checkpoint's."),
    click.option(
        "--min-match", default=0.5, show_default=True, help="Share of genes that must match."
    ),
    click.option(
        "--domain-column", metavar="COL", help="Domains, for a model that normalises by domain."
    ),
    click.option(
        "--seed", default=0, show_default=True, help="Of the sample of genes in long cells."
    ),
    click.option("--key", default="X_scshards", show_default=True, help="Name in obsm."),
    click.option(
        "--batch-size", default=64, show_default=True, help="Cells prepared at a time."
    ),
    click.option("--threads", type=int, help="Cells computed at a time on CPU; default: all cores."),
    click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
    ),
    click.option(
        "--precision", default="auto", show_default=True, help="auto, fp32 or bf16."
    ),
    click.option(
        "--storage-options", metavar="JSON", help="For the file systems of all inputs."
    ),
    click.option("--json", "as_json", is_flag=True, help="The summary as JSON on standard output."),
)  # fmt: skip


def apply_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command its arguments CHECKPOINT and INPUT... and the options that both have."""
    for option in reversed(_OPTIONS):
        command = option(command)
    command = click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)(command)
    return click.argument("checkpoint")(command)


def echo_report(report: Any, as_json: bool) -> None:
    """Say what was written, on the first process."""
    from scshards.train.setup import is_first_process

    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(report.tables()))
        return
    for file in report.files:
        click.echo(
            f"{file.cells:,} cells as {report.dimensions} numbers each in {file.output} "
            f"({', '.join(report.names)}); {file.matched:,} of {file.columns:,} gene columns matched"
        )
        if file.replaced:
            click.echo(f"the input's own {', '.join(file.replaced)} were replaced there")
    if report.empty_cells:
        click.echo(f"{report.empty_cells:,} cells have no gene in the vocabulary: <cls> alone")

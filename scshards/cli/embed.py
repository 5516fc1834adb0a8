"""`scshards embed`: a model's cell embeddings, in a copy of an h5ad file or in a new one."""

from __future__ import annotations

import json
from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, build, option, options, store_options
from scshards.train.apply_options import EmbedOptions


@click.command("embed", cls=Command)
@click.argument("checkpoint")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@option(
    "-o", "--output", required=True, metavar="OUT", help="What is made; it must not be there yet."
)
@options(EmbedOptions)
@store_options
@as_json
def command(
    checkpoint: str,
    inputs: tuple[str, ...],
    output: str,
    storage_options: dict[str, Any],
    as_json: bool,
    progress: bool,
    **chosen: Any,
) -> None:
    """Embed the cells of INPUT... with the model in the folder CHECKPOINT.

    CHECKPOINT is a run's folder or any folder in scGPT's layout (args.json, vocab.json,
    best_model.pt). An INPUT is what `scshards pack` takes, such as an h5ad file, or the root of a shard
    set. For one, OUT is a file: the input with obsm["X_scshards"], a unit vector for each
    cell; without X unless the input is an h5ad file. For several, OUT is a folder with a file for
    each. Under torchrun each process takes its share of the cells; the result is the same.

    \b
      scshards embed run cells.h5ad -o embedded.h5ad
      torchrun --nproc-per-node 8 -m scshards embed run shards -o shards_embedded.h5ad
    """
    from scshards.train.embed import embed

    asked = build(EmbedOptions, chosen)
    show_applied(
        embed(checkpoint, inputs, output, asked, storage_options=storage_options, shown=progress),
        as_json,
    )


def show_applied(report: Any, as_json: bool) -> None:
    """Say what was written, on the first process."""
    from scshards.base.progress import counted
    from scshards.train.setup import is_first_process

    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(report.tables()))
        return
    for file in report.files:
        click.echo(
            f"{counted(file.cells, 'cells')} as {report.dimensions} numbers each in {file.output} "
            f"({', '.join(report.names)}); {file.matched:,} of {file.columns:,} gene columns matched"
        )
        if file.replaced:
            click.echo(f"the input's own {', '.join(file.replaced)} were replaced there")
    if report.empty_cells:
        cells = counted(report.empty_cells, "cells")
        click.echo(f"{cells} without a gene in the vocabulary: <cls> alone")

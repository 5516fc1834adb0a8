"""`scshards embed`: a model's cell embeddings, in a copy of an h5ad file or in a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from scshards.applying.options import EmbedOptions
from scshards.base.progress import counted
from scshards.cli.command import Command, Result
from scshards.cli.options import build, options, output, store_options

if TYPE_CHECKING:
    from scshards.applying.apply import ApplyReport


@click.command("embed", cls=Command)
@click.argument("checkpoint")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@output("OUT", "What is made; it must not be there yet.")
@options(EmbedOptions)
@store_options
def command(progress: bool, **chosen: Any) -> Result | None:
    """Embed the cells of INPUT... with the model in the folder CHECKPOINT.

    CHECKPOINT is a run's folder or any folder in scGPT's layout (args.json, vocab.json,
    best_model.pt). An INPUT is what `scshards pack` takes, such as an h5ad file, or the root of a shard
    set. For one, OUT is a file: the input with obsm["X_scshards"], a unit vector for each
    cell; without X unless the input is an h5ad file. For several, OUT is a folder with a file for
    each. Under torchrun each process takes its share of the cells; the result is the same.

    \b
    scshards embed run cells.h5ad -o embedded.h5ad
    torchrun --nproc-per-node 8 -m scshards embed run shards -o embedded.h5ad
    """
    from scshards.applying.embed import embed

    asked = build(EmbedOptions, chosen)
    return applied(embed(options=asked, shown=progress, **chosen))


def applied(report: ApplyReport) -> Result | None:
    """What was written, of the first process."""
    from scshards.ranks.launch import is_first_process

    if not is_first_process():
        return None
    lines = []
    for file in report.files:
        lines.append(
            f"{counted(file.cells, 'cells')} as {counted(report.dimensions, 'numbers')} each in "
            f"{file.output} ({', '.join(report.names)}); {file.matched:,} of "
            f"{counted(file.columns, 'gene columns')} matched{_by(file.gene_column)}"
        )
        if file.replaced:
            lines.append(f"the input's own {', '.join(file.replaced)} were replaced there")
    if report.empty_cells:
        cells = counted(report.empty_cells, "cells")
        lines.append(f"{cells} without a gene in the vocabulary: <cls> alone")
    return Result(report, ["\n".join(lines)])


def _by(gene_column: str | None) -> str:
    """Which column of var named the genes, where it was not the index."""
    from scshards.sources.rows import INDEX

    return "" if gene_column in (None, INDEX) else f", by var's column {gene_column}"

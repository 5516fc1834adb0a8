"""`scshards annotate`: the classes that a fine-tuned model predicts, as a new h5ad file."""

from __future__ import annotations

from typing import Any

import click

from scshards.applying.options import AnnotateOptions
from scshards.cli.command import Command, Result
from scshards.cli.embed import applied
from scshards.cli.options import build, options, output, store_options


@click.command("annotate", cls=Command)
@click.argument("checkpoint")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@output("OUT", "What is made; it must not be there yet.")
@options(AnnotateOptions)
@store_options
def command(progress: bool, **chosen: Any) -> Result | None:
    """Predict the class of the cells of INPUT... with the model in the folder CHECKPOINT.

    CHECKPOINT has a class head and classes.json: the folder of scshards train --task annotate. INPUT
    and OUT are as of scshards embed. OUT has all that embed writes, and in obs the predicted class,
    by default named predicted_ and the column that the model was trained on, and its probability.
    How many cells each class has is told, and how many are below a --confidence; with --truth, what
    share of them is right, and what each true class is taken for.

    \b
    scshards annotate run cells.h5ad -o annotated.h5ad --truth cell_type
    """
    from scshards.applying.annotate import annotate

    asked = build(AnnotateOptions, chosen)
    report = annotate(options=asked, shown=progress, **chosen)
    written = applied(report.applied)
    return written and Result(report.tables(), [*written.parts, *report.text()])

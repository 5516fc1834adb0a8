"""`scshards annotate`: the classes that a fine-tuned model predicts, as a new h5ad file."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.embed import show_applied
from scshards.cli.options import as_json, build, option, options, store_options
from scshards.train.apply_options import AnnotateOptions


@click.command("annotate", cls=Command)
@click.argument("checkpoint")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@option(
    "-o", "--output", required=True, metavar="OUT", help="What is made; it must not be there yet."
)
@options(AnnotateOptions)
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
    """Predict the class of the cells of INPUT... with the model in the folder CHECKPOINT.

    CHECKPOINT has a class head and classes.json: the folder of scshards train --task annotate. INPUT
    and OUT are as of scshards embed. OUT has all that embed writes, and in obs the predicted class,
    by default named predicted_ and the column that the model was trained on, and its probability.

    \b
      scshards annotate run cells.h5ad -o annotated.h5ad
    """
    from scshards.train.annotate import annotate

    asked = build(AnnotateOptions, chosen)
    show_applied(
        annotate(
            checkpoint, inputs, output, asked, storage_options=storage_options, shown=progress
        ),
        as_json,
    )

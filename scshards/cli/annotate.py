"""`scshards annotate`: the classes that a fine-tuned model predicts, as a new h5ad file."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.apply_options import apply_options, echo_report


@click.command("annotate")
@apply_options
@click.option("--column", metavar="COL", help="The new obs column; default: predicted_...")
@click.option("--probabilities", is_flag=True, help="Every class's probability, in obsm, too.")
def command(
    checkpoint: str,
    inputs: tuple[str, ...],
    output: str,
    storage_options: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Predict the class of the cells of INPUT... with the model in the folder CHECKPOINT.

    CHECKPOINT has a class head and classes.json: the folder of scshards train --task annotate. INPUT
    and OUT are as of scshards embed. OUT has all that embed writes, and in obs the predicted class,
    by default named predicted_ and the column that the model was trained on, and its probability.

    \b
      scshards annotate run cells.h5ad -o annotated.h5ad
    """
    from scshards.base.storage import parse_options
    from scshards.train.annotate import AnnotateOptions, annotate

    report = annotate(
        checkpoint,
        inputs,
        output,
        AnnotateOptions(**options),
        storage_options=parse_options(storage_options),
    )
    echo_report(report, as_json)

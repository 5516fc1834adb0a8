"""`scshards evaluate`: a run's best model beside two baselines, on held-out cells."""

from __future__ import annotations

from typing import Any

import click

from scshards.applying.options import EmbedOptions
from scshards.cli.command import Command, Result
from scshards.cli.options import option, options, store_options


@click.command("evaluate", cls=Command)
@click.argument("folder", metavar="RUN")
@click.argument("root")
@option("--split", default="valid", help="The cells to score.")
@options(EmbedOptions, only="batch_size device")
@option(
    "--precision",
    help="How it is computed: auto, fp32 or bf16. Without it, as the run was trained.",
)
@store_options
def command(progress: bool, **chosen: Any) -> Result | None:
    """Score the best model of RUN on the shard set ROOT, by the task it was trained for.

    Masked (or unknown) values: beside the model stand two predictions that need none: each gene's mean
    over the training cells that express it, and each cell's mean over its values that are not hidden.
    All three are mean squared errors over the same values, the same in every evaluation. A run of
    --task integrate is scored as an embedding too, beside PCA; one of --task annotate by accuracy and
    macro F1, beside the most frequent class, with what each class is taken for. The figures go to
    RUN/evaluation.json too.
    """
    from scshards.applying.evaluate import evaluate_run
    from scshards.ranks.launch import is_first_process

    found = evaluate_run(shown=progress, **chosen)
    return Result(found.tables(), found.text()) if is_first_process() else None

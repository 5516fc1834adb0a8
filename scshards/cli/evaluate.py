"""`scshards evaluate`: a run's best model beside two baselines, on held-out cells."""

from __future__ import annotations

import json
from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, option, store_options


@click.command("evaluate", cls=Command)
@click.argument("run")
@click.argument("root")
@option("--split", default="valid", help="The cells to score.")
@option(
    "--batch-size",
    default=64,
    type=click.IntRange(min=1),
    help="Cells of a forward pass.",
)
@option("--device", default="auto", help="Where it is computed: auto, cpu, cuda or cuda:N.")
@store_options
@as_json
def command(
    run: str,
    root: str,
    split: str,
    batch_size: int,
    device: str,
    storage_options: dict[str, Any],
    as_json: bool,
    progress: bool,
) -> None:
    """Score the best model of RUN on the shard set ROOT, by the task it was trained for.

    Masked (or unknown) values: beside the model stand two predictions that need none: each gene's mean
    over the training cells that express it, and each cell's mean over its values that are not hidden.
    All three are mean squared errors over the same values, the same in every evaluation. A run of
    --task integrate is scored as an embedding too, beside PCA; one of --task annotate by accuracy and
    macro F1, beside the most frequent class. The figures go to RUN/evaluation.json too.
    """
    from scshards.base.progress import table
    from scshards.train.evaluate import Annotation, evaluate_run
    from scshards.train.setup import is_first_process

    e = evaluate_run(
        run,
        root,
        split=split,
        batch_size=batch_size,
        device=device,
        storage_options=storage_options,
        shown=progress,
    )
    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(e.tables()))
        return
    if isinstance(e, Annotation):
        lines = [
            ("model", f"{100 * e.accuracy:.1f}%", f"{e.macro_f1:.3f}", f"{e.class_ce:.4g}"),
            (f"always {e.majority!r}", f"{100 * e.majority_accuracy:.1f}%", "", ""),
        ]
        click.echo(table(("prediction", "accuracy", "macro F1", "cross-entropy"), lines))
        click.echo(
            f"\n{e.n_cells:,} {e.split} cells with a class ({e.n_other:,} of classes that the model "
            f"does not know); {e.n_without:,} more have none"
        )
        return
    better = min(e.gene_mean, e.cell_mean)
    rows = [
        (name, mse, f"{100 * (mse / better - 1):+.1f}%")
        for name, mse in (
            ("model", e.model),
            ("each gene's mean", e.gene_mean),
            ("each cell's mean", e.cell_mean),
        )
    ]
    click.echo(table(("prediction", f"{e.what} MSE", "to the better baseline"), rows))
    side = "below" if e.margin >= 0 else "above"
    click.echo(
        f"\n{e.n_masked:,} {e.what} values of {e.n_cells:,} {e.split} cells: the model is "
        f"{100 * abs(e.margin):.1f}% {side} the better baseline"
    )
    if e.figures:
        names = [n for n in e.figures if f"pca_{n}" in e.figures]
        scores = [(n, f"{e.figures[n]:.4f}", f"{e.figures[f'pca_{n}']:.4f}") for n in names]
        click.echo(f"\nintegration of {e.figures['metric_cells']:,} {e.split} cells; 1 is best")
        click.echo(table(("score", "embedding", "PCA"), scores))

"""`scshards evaluate`: a run's best model beside two baselines, on held-out cells."""

from __future__ import annotations

from typing import Any

import click

from scshards.base.progress import Table
from scshards.cli.command import Command, Result
from scshards.cli.options import option, options, store_options
from scshards.train.apply_options import EmbedOptions


@click.command("evaluate", cls=Command)
@click.argument("folder", metavar="RUN")
@click.argument("root")
@option("--split", default="valid", help="The cells to score.")
@options(EmbedOptions, only="batch_size device")
@store_options
def command(progress: bool, **chosen: Any) -> Result | None:
    """Score the best model of RUN on the shard set ROOT, by the task it was trained for.

    Masked (or unknown) values: beside the model stand two predictions that need none: each gene's mean
    over the training cells that express it, and each cell's mean over its values that are not hidden.
    All three are mean squared errors over the same values, the same in every evaluation. A run of
    --task integrate is scored as an embedding too, beside PCA; one of --task annotate by accuracy and
    macro F1, beside the most frequent class. The figures go to RUN/evaluation.json too.
    """
    from scshards.train.evaluate import Annotation, evaluate_run
    from scshards.train.setup import is_first_process

    e = evaluate_run(shown=progress, **chosen)
    if not is_first_process():
        return None
    if isinstance(e, Annotation):
        rows: list[tuple[object, ...]] = [
            ("model", f"{100 * e.accuracy:.1f}%", f"{e.macro_f1:.3f}", f"{e.class_ce:.4g}"),
            (f"always {e.majority!r}", f"{100 * e.majority_accuracy:.1f}%", None, None),
        ]
        parts: list[str | Table] = [
            Table(("prediction", "accuracy", "macro F1", "cross-entropy"), rows),
            f"{e.n_cells:,} {e.split} cells with a class ({e.n_other:,} of classes that the model "
            f"does not know); {e.n_without:,} more have none",
        ]
        return Result(e.tables(), parts)
    better = min(e.gene_mean, e.cell_mean)
    predictions = {
        "model": e.model,
        "each gene's mean": e.gene_mean,
        "each cell's mean": e.cell_mean,
    }
    rows = [(name, mse, f"{100 * (mse / better - 1):+.1f}%") for name, mse in predictions.items()]
    side = "below" if e.margin >= 0 else "above"
    parts = [
        Table(("prediction", f"{e.what} MSE", "to the better baseline"), rows),
        f"{e.n_masked:,} {e.what} values of {e.n_cells:,} {e.split} cells: the model is "
        f"{100 * abs(e.margin):.1f}% {side} the better baseline",
    ]
    if e.figures:
        names = [n for n in e.figures if f"pca_{n}" in e.figures]
        rows = [(n, f"{e.figures[n]:.4f}", f"{e.figures[f'pca_{n}']:.4f}") for n in names]
        parts.append(f"integration of {e.figures['metric_cells']:,} {e.split} cells; 1 is best")
        parts.append(Table(("score", "embedding", "PCA"), rows))
    return Result(e.tables(), parts)

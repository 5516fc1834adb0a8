"""`scshards evaluate`: a run's best model beside two baselines, on held-out cells."""

from __future__ import annotations

import json

import click


@click.command("evaluate")
@click.argument("run")
@click.argument("root")
@click.option("--split", default="valid", show_default=True, help="The cells to score.")
@click.option(
    "--batch-size",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Cells per forward pass.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--storage-options", metavar="JSON", help="For the file system of ROOT.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on standard output.")
def command(
    run: str,
    root: str,
    split: str,
    batch_size: int,
    device: str,
    storage_options: str | None,
    as_json: bool,
) -> None:
    """Score the best model of RUN on masked values of the shard set ROOT.

    Beside it stand two predictions that need no model: each gene's mean over the training cells that
    express it, and each cell's mean over its values that are not masked. All three are mean squared
    errors over the same masked values, which are the same in every evaluation. The figures go to
    RUN/evaluation.json too.
    """
    from scshards.base.progress import table
    from scshards.base.storage import parse_options
    from scshards.train.evaluate import evaluate_run
    from scshards.train.setup import is_first_process

    e = evaluate_run(
        run,
        root,
        split=split,
        batch_size=batch_size,
        device=device,
        storage_options=parse_options(storage_options),
    )
    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(e.tables()))
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
    click.echo(table(("prediction", "masked MSE", "to the better baseline"), rows))
    side = "below" if e.margin >= 0 else "above"
    click.echo(
        f"\n{e.n_masked:,} masked values of {e.n_cells:,} {e.split} cells: the model is "
        f"{100 * abs(e.margin):.1f}% {side} the better baseline"
    )

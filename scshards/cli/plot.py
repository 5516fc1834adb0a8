"""`scshards plot`: a run's loss curve, and cell embeddings, in one picture."""

from __future__ import annotations

import click


@click.command("plot")
@click.argument("run")
@click.option("-o", "--output", required=True, metavar="FILE.png", help="The picture.")
@click.option(
    "--embedding",
    "embeddings",
    metavar="OUT.h5ad",
    multiple=True,
    help="Cells with obsm['X_scshards'] to show in two dimensions. Repeatable.",
)
@click.option(
    "--color",
    "colors",
    metavar="COL",
    multiple=True,
    help="The obs column that colours the cells; one for each --embedding, or one for all.",
)
def command(run: str, output: str, embeddings: tuple[str, ...], colors: tuple[str, ...]) -> None:
    """Draw the loss curve of RUN, with the baselines that `scshards evaluate` found.

    Each --embedding adds a panel: the first two principal components of the cells' embeddings.
    """
    from scshards.train.plot import plot

    click.echo(plot(run, output, embeddings=embeddings, colors=colors))

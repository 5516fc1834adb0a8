"""`scshards plot`: the curves of runs, and cell embeddings, in one picture."""

from __future__ import annotations

import click

from scshards.cli.command import Command
from scshards.cli.options import option


@click.command("plot", cls=Command)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@option("-o", "--output", metavar="FILE.png", help="The picture. Without it, RUN/curves.png.")
@option(
    "--embedding",
    "embeddings",
    metavar="OUT.h5ad",
    multiple=True,
    help="Cells with obsm['X_scshards'] to show in two dimensions.",
)
@option(
    "--color",
    "colors",
    metavar="COL",
    multiple=True,
    help="The obs column that colours the cells; one for each --embedding, or one for all.",
)
def command(
    runs: tuple[str, ...],
    output: str | None,
    embeddings: tuple[str, ...],
    colors: tuple[str, ...],
) -> None:
    """Draw the curves of RUN: losses, learning rate, gradient norm, throughput, validation.

    The baselines that `scshards evaluate` found are drawn too. Several runs come in one picture, each
    in a colour of its own. Each --embedding adds a panel: the first two principal components of the
    cells' embeddings.

    \b
      scshards plot run
      scshards plot run other-run -o both.png
    """
    from scshards.train.plot import plot

    click.echo(plot(runs, output, embeddings=embeddings, colors=colors))

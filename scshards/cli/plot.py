"""`scshards plot`: the curves of runs, and cell embeddings, in one picture."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.command import Command, Result
from scshards.cli.options import option, output


@click.command("plot", cls=Command)
@click.argument("folders", metavar="RUN...", nargs=-1, required=True)
@output("FILE.png", "The picture. Without it, RUN/curves.png.", required=False)
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
@option(
    "--layout",
    help="Where cells are: an obsm of two columns, such as a UMAP. Without it, principal components.",
)
def command(**chosen: Any) -> Result:
    """Draw the curves of RUN: losses, learning rate, gradient norm, throughput, validation.

    The baselines that `scshards evaluate` found are drawn too. Several runs come in one picture, each
    in a colour of its own. Each --embedding adds a panel: the first two principal components of the
    cells' embeddings, or with --layout what another program has made of them.

    \b
    scshards plot run
    scshards plot run other-run -o both.png
    """
    from scshards.report.plot import plot

    picture = str(plot(**chosen))
    return Result({"picture": picture}, [picture])

"""`scshards replay`: the cells that a run took a step with."""

from __future__ import annotations

from typing import Any

import click

from scshards.applying.options import EmbedOptions
from scshards.cli.command import Command, Result
from scshards.cli.options import option, options, store_options


@click.command("replay", cls=Command)
@click.argument("folder", metavar="RUN")
@click.argument("step", type=click.IntRange(min=1))
@option(
    "--root",
    help="The shard set. Without it, the one that the run was started with.",
)
@options(EmbedOptions, only="device")
@store_options
def command(progress: bool, **chosen: Any) -> Result | None:
    """Show the cells that RUN took step STEP with, and the loss of each: what made a loss jump.

    STEP is counted as in metrics.jsonl. The losses are those of each cell alone, by the weights of the
    latest checkpoint before the step. With --json all cells, else those with the largest losses.
    """
    from scshards.applying.replay import replay
    from scshards.ranks.launch import is_first_process

    found = replay(**chosen)
    return Result(found, found.text()) if is_first_process() else None

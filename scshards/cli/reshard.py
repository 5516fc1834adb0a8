"""`scshards reshard`: a shard set -> another one."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.command import Command, Result
from scshards.cli.options import build, options, output
from scshards.cli.pack import PackRun
from scshards.packing.options import ReshardOptions


@click.command("reshard", cls=Command)
@click.argument("root")
@output("NEW", "The shard set to make.")
@options(ReshardOptions, but="same_names")
@options(PackRun, only="restart")
def command(root: str, output: str, restart: bool, progress: bool, **chosen: Any) -> Result:
    """Make a shard set at NEW of the one at ROOT: other shards, order, splits, or a part of its cells.

    It streams from shards to shards; the inputs of ROOT are not needed. What no option changes is as it
    is in ROOT, which stays untouched. NEW must be absent or empty. When it was stopped, the same command
    goes on.

    \b
    scshards reshard shards -o lung --where "tissue == 'lung'" --compression zstd
    """
    from scshards.cli import contents
    from scshards.packing.reshard import reshard

    asked = build(ReshardOptions, chosen)
    manifest = reshard(root, output, asked, restart=restart, progress=progress)
    return contents.made(manifest, output)

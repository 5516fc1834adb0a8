"""`scshards reshard`: a shard set -> another one. Its options are those of `scshards merge` too."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, build, option, options
from scshards.cli.pack import split_file, with_split_file
from scshards.cli.shown import show_manifest, wide
from scshards.packing.options import ReshardOptions

output = option("-o", "--output", required=True, metavar="NEW", help="The shard set to make.")
restart = option(
    "--restart",
    is_flag=True,
    help="Throw away what an unfinished call has left at NEW. Without it, the same command goes on.",
)


@click.command("reshard", cls=Command)
@click.argument("root")
@output
@options(ReshardOptions, but="held_out same_names")
@split_file
@restart
@wide
@as_json
def command(
    root: str, output: str, restart: bool, wide: bool, as_json: bool, progress: bool, **chosen: Any
) -> None:
    """Make a shard set at NEW of the one at ROOT: other shards, order, splits, or a part of its cells.

    It streams from shards to shards; the inputs of ROOT are not needed. What no option changes is as it
    is in ROOT, which stays untouched. NEW must be absent or empty. When it was stopped, the same command
    goes on.

    \b
    scshards reshard shards -o lung --where "tissue == 'lung'" --compression zstd
    """
    from scshards.packing.reshard import reshard

    asked = build(ReshardOptions, with_split_file(chosen))
    manifest = reshard(root, output, asked, restart=restart, progress=progress)
    show_manifest(manifest, None, as_json, wide)

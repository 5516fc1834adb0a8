"""`scshards merge`: several shard sets -> one."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.command import Command, Result
from scshards.cli.options import build, options, output
from scshards.cli.pack import PackRun
from scshards.packing.options import ReshardOptions


@click.command("merge", cls=Command)
@click.argument("roots", metavar="ROOT...", nargs=-1, required=True)
@output("NEW", "The shard set to make.")
@options(ReshardOptions)
@options(PackRun, only="restart")
def command(roots: Any, output: str, restart: bool, progress: bool, **chosen: Any) -> Result:
    """Make one shard set at NEW of the sets at two or more ROOTs.

    They must have the same vocabulary, kind of values and labels; --obs names the labels that all of
    them have. Categories are united. Each cell stays in its split, unless all are split anew; what no
    option says is as it is in the first set. NEW must be absent or empty. When it was stopped, the same
    command goes on.

    \b
    scshards merge lung gut s3://bucket/blood -o atlas --obs cell_type,donor_id
    """
    from scshards.cli import contents
    from scshards.packing.reshard import merge

    asked = build(ReshardOptions, chosen)
    manifest = merge(roots, output, asked, restart=restart, progress=progress)
    return contents.made(manifest, output)

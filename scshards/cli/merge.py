"""`scshards merge`: several shard sets -> one."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, build, options
from scshards.cli.pack import split_file, with_split_file
from scshards.cli.reshard import output, restart
from scshards.cli.shown import show_manifest, wide
from scshards.packing.options import ReshardOptions


@click.command("merge", cls=Command)
@click.argument("roots", metavar="ROOT...", nargs=-1, required=True)
@output
@options(ReshardOptions, but="held_out")
@split_file
@restart
@wide
@as_json
def command(
    roots: tuple[str, ...],
    output: str,
    restart: bool,
    wide: bool,
    as_json: bool,
    progress: bool,
    **chosen: Any,
) -> None:
    """Make one shard set at NEW of the sets at two or more ROOTs.

    They must have the same vocabulary, kind of values and labels; --obs names the labels that all of
    them have. Categories are united. Each cell stays in its split, unless all are split anew; what no
    option says is as it is in the first set. NEW must be absent or empty. When it was stopped, the same
    command goes on.

    \b
    scshards merge lung gut s3://bucket/blood -o atlas --obs cell_type,donor_id
    """
    from scshards.packing.reshard import merge

    asked = build(ReshardOptions, with_split_file(chosen))
    manifest = merge(roots, output, asked, restart=restart, progress=progress)
    show_manifest(manifest, None, as_json, wide)

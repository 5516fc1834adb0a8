"""`scshards merge`: several shard sets -> one."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.pack import interruptible, show
from scshards.cli.reshard import common_options, read_options


@click.command("merge")
@click.argument("roots", metavar="ROOT...", nargs=-1, required=True)
@common_options
@click.option(
    "--same-names",
    is_flag=True,
    help="Inputs of the same name in two sets are different files; else they are refused.",
)
def command(roots: tuple[str, ...], new: str, restart: bool, as_json: bool, **chosen: Any) -> None:
    """Make one shard set at NEW of the sets at two or more ROOTs.

    They must have the same vocabulary, kind of values and labels; --obs names the labels that all of
    them have. Categories are united. Each cell stays in its split, unless all are split anew; what no
    option says is as it is in the first set. NEW must be absent or empty. When it was stopped, the same
    command goes on.

    \b
    scshards merge lung gut s3://bucket/blood -o atlas --obs cell_type,donor_id
    """
    from scshards.packing.reshard import merge

    options = read_options(chosen)
    with interruptible():
        manifest = merge(roots, new, options, restart=restart)
    show(manifest, None, as_json)

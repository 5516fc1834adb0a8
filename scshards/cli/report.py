"""`scshards report`: one page of HTML that shows a shard set, and runs on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from scshards.base.progress import size
from scshards.cli.command import Command, Result
from scshards.cli.options import output, store_options


@click.command("report", cls=Command)
@click.argument("root")
@output("FILE.html", "The page.")
@store_options
def command(root: str, output: str, progress: bool, storage_options: Any) -> Result:
    """Write a page of HTML that shows the shard set ROOT: inputs, genes, labels, splits, batches, cells.

    It is one file that needs no network. Its numbers are of the manifest and the indexes, which are read
    shard by shard; of the cells a few hundred are decoded. What is amiss comes first. Needs the extra
    `report`.

    \b
    scshards report shards -o shards.html
    """
    from scshards.cli.contents import rebuilt_by
    from scshards.report.page.page import report
    from scshards.shards.shardset import ShardSet

    rebuild = rebuilt_by(ShardSet(root, storage_options).manifest, root)
    made = report(root, output, rebuild=rebuild, storage_options=storage_options, shown=progress)
    told = [f"warning: {w}" for w in made.warnings]
    return Result(
        dataclasses.asdict(made), ["\n".join([*told, f"wrote {made.page} ({size(made.bytes)})"])]
    )

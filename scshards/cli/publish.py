"""`scshards publish`: a run's best model as a folder to hand on, with a model card."""

from __future__ import annotations

from typing import Any

import click

from scshards.base.progress import Table, printable, size
from scshards.cli.command import Command, Result
from scshards.cli.options import output, store_options


@click.command("publish", cls=Command)
@click.argument("folder", metavar="RUN")
@output("DIR", "A folder or the address of one in a store; not there yet.")
@store_options
def command(folder: str, output: str, storage_options: Any) -> Result:
    """Write the best model of RUN as safetensors, with a model card, into DIR.

    DIR holds model.safetensors, args.json, vocab.json, names of classes and domains where the model has
    them, and README.md: what it was trained on, by which settings, its scores, how to use it; without
    paths and credentials. `scshards embed`, `annotate` and `train --start` take DIR as they take RUN.

    \b
    scshards evaluate run shards && scshards publish run -o model
    scshards publish run -o s3://bucket/models/heart
    """
    from scshards.applying.publish import publish

    found = publish(folder, output, storage_options=storage_options)
    rows = [(name, size(n)) for name, n in found.files.items()]
    text = (
        f"{found.parameters:,} parameters of step {found.step:,} are in {printable(found.output)}; "
        "README.md is its model card: name a licence in it before you hand it on"
    )
    return Result(found, [Table(("file", "size"), rows), text])

"""`scshards card`: a README.md by which Hugging Face's load_dataset takes the cells of a set."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.command import Command, Result
from scshards.cli.options import store_options


@click.command("card", cls=Command)
@click.argument("root")
@store_options
def command(root: str, storage_options: Any) -> Result:
    """Write a dataset card, README.md, into the shard set ROOT.

    Without one, Hugging Face's load_dataset takes the indexes for the data, and no cell. The shards
    must be plain tars.
    """
    from scshards.exporting.card import CARD, write_card

    write_card(root, storage_options)
    return Result({"card": CARD}, [f"wrote {CARD}: load_dataset takes the cells now"])

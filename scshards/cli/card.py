"""`scshards card`: a README.md by which Hugging Face's load_dataset takes the cells of a set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import store_options


@click.command("card", cls=Command)
@click.argument("root")
@store_options
def command(root: str, storage_options: Mapping[str, Any]) -> None:
    """Write a dataset card, README.md, into the shard set ROOT.

    Without one, Hugging Face's load_dataset takes the indexes for the data, and no cell. The shards
    must be plain tars.
    """
    from scshards.packing.card import CARD, write_card

    write_card(root, storage_options)
    click.echo(f"wrote {CARD}: load_dataset takes the cells now")

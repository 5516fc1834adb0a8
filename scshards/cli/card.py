"""`scshards card`: a README.md by which Hugging Face's load_dataset takes the cells of a set."""

from __future__ import annotations

import click


@click.command("card")
@click.argument("root")
@click.option("--storage-options", metavar="JSON", help="For the file system of ROOT.")
def command(root: str, storage_options: str | None) -> None:
    """Write a dataset card, README.md, into the shard set ROOT.

    Without one, Hugging Face's load_dataset takes the indexes for the data, and no cell. The shards
    must be plain tars.
    """
    from scshards.base.storage import parse_options
    from scshards.packing.card import CARD, write_card

    write_card(root, parse_options(storage_options))
    click.echo(f"wrote {CARD}: load_dataset takes the cells now")

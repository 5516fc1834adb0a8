"""What commands print when they have done their work: one line of JSON, or tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from scshards.cli.options import option

if TYPE_CHECKING:
    from scshards.shards.manifest import Manifest


wide = option("--wide", is_flag=True, help="Show all columns, however wide the table is.")


def show_manifest(
    manifest: Manifest, seconds: Mapping[int, float] | None, as_json: bool, wide: bool
) -> None:
    """The summary of a set that was made."""
    from scshards.packing import report

    if as_json:
        click.echo(report.to_json(report.summary(manifest, seconds)))
        return
    click.echo(report.source_table(manifest, seconds, wide=wide))
    click.echo()
    click.echo(report.split_table(manifest))

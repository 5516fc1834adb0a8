"""`scshards status`: how far a pack is, who works on it, and what to run next."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, option, store_options

if TYPE_CHECKING:
    from scshards.packing.status import Status

MOST = 20
"""So many shares, or tasks that are missing, are named."""


@click.command("status", cls=Command)
@click.argument("root")
@option("--scratch", help="The folder of temporary files, where the pack was given one.")
@store_options
@as_json
def command(
    root: str, scratch: str | None, storage_options: Mapping[str, Any], as_json: bool
) -> None:
    """Show how far the pack, reshard or merge is that writes to ROOT.

    Nothing is changed, and whoever works there is not disturbed. Of a complete set it is one line.
    """
    from scshards.packing.status import status

    show_status(status(root, scratch, storage_options), as_json)


def show_status(found: Status, as_json: bool) -> None:
    """How far a pack is, as JSON or in lines."""
    text = json.dumps(_tree(found), ensure_ascii=False) if as_json else "\n".join(_lines(found))
    click.echo(text)


def _tree(found: Status) -> dict[str, Any]:
    tree = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    tree["manifest"] = found.manifest is not None
    tree["shares"] = [dataclasses.asdict(part) for part in found.shares]
    return tree


def _lines(found: Status) -> list[str]:
    from scshards.base.progress import table

    lines = []
    if found.manifest is not None:
        splits = found.manifest.splits
        cells = sum(found.manifest.cells(split) for split in splits)
        shards = sum(map(len, splits.values()))
        lines.append(f"{found.root} is complete: {cells:,} cells in {shards:,} shards")
    if found.asked is None:
        return lines or [f"{found.root}: {found.next}"]
    what = "what is added to it is" if found.manifest is not None else f"{found.root} is"
    lines.append(f"{what} not finished")
    rows = [("1/3 reading headers", "inputs", found.inputs_done, found.inputs)]
    if found.slices is not None:
        rows.append(("2/3 reading cells", "slices", found.slices_done, found.slices))
    if found.shards is not None:
        rows.append(("3/3 writing shards", "shards", found.shards_done, found.shards))
    lines += ["", table(("phase", "of", "done", "all"), rows)]
    if found.shares:
        left = [(f"{p.number}/{found.n_shares}", p.slices, p.shards) for p in found.shares[:MOST]]
        lines += ["", table(("share", "slices left", "shards left"), left)]
    if found.missing:
        names = ", ".join(found.missing[:MOST]) + (", ..." if len(found.missing) > MOST else "")
        lines += ["", *_wrapped(f"missing: {names}")]
    holders = "; ".join(found.holders) or "nobody"
    return [*lines, "", *_wrapped(f"held by: {holders}"), *_wrapped(f"next: {found.next}")]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False)

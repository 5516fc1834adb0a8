"""`scshards status`: how far a pack is, who works on it, and what to run next."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from scshards.base.progress import Table, counted
from scshards.base.text import first_of
from scshards.cli.command import Command, Result
from scshards.cli.options import option, store_options

if TYPE_CHECKING:
    from scshards.packing.status import Status


@click.command("status", cls=Command)
@click.argument("root")
@option("--scratch", help="The folder of temporary files, where the pack was given one.")
@store_options
def command(root: str, scratch: str | None, storage_options: Any) -> Result:
    """Show how far the pack, reshard or merge is that writes to ROOT.

    Nothing is changed, and whoever works there is not disturbed. Of a complete set it is one line.
    """
    from scshards.packing.status import status

    return progress_of(status(root, scratch, storage_options))


def progress_of(found: Status, share: tuple[int, int] | None = None) -> Result:
    """How far a pack is; behind a share that has just ended well, that it did."""
    tree = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return Result(tree | {"manifest": found.manifest is not None}, _parts(found, share))


def _parts(found: Status, share: tuple[int, int] | None) -> list[str | Table]:
    from scshards.packing.status import MOST

    first = []
    if found.manifest is not None:
        splits = found.manifest.splits
        cells = sum(map(found.manifest.cells, splits))
        shards = sum(map(len, splits.values()))
        told = f"{counted(cells, 'cells')} in {counted(shards, 'shards')}"
        first.append(f"{found.root} is complete: {told}")
    if found.asked is None:
        return ["\n".join(first or [f"{found.root}: {found.next}"])]
    what = "what is added to it is" if found.manifest is not None else f"{found.root} is"
    if share is None:
        first.append(f"{what} not finished")
    else:
        idle = f"has nothing to do in this round: {found.idle}"
        first.append(
            f"share {share[0]}/{share[1]} {idle if found.idle else 'is done for this round'}; the whole "
            f"is not finished yet: {found.root}"
        )
        if found.idle:
            return [f"{first[0]}\nnext: {found.next}"]
    rows = [
        ("1/3 reading headers", "inputs", found.inputs_done, found.inputs),
        ("2/3 reading cells", "slices", found.slices_done, found.slices),
        ("3/3 writing shards", "shards", found.shards_done, found.shards),
    ]
    known = [row for row in rows if row[-1] is not None]
    parts: list[str | Table] = ["\n".join(first), Table(("phase", "of", "done", "all"), known)]
    if found.shares:
        left = [(f"{i}/{found.n_shares}", *both) for i, both in list(found.shares.items())[:MOST]]
        parts.append(Table(("share", "slices left", "shards left"), left))
    if found.missing:
        parts.append(f"missing: {first_of(found.missing, MOST)}")
    holders = "; ".join(found.holders) or "nobody"
    return [*parts, f"held by: {holders}\nnext: {found.next}"]

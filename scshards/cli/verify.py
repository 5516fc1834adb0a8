"""`scshards verify`: is a shard set what its manifest says? Exit code 1 when it is not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import click

from scshards.base.progress import Table, counted, size
from scshards.cli.command import Command, Result
from scshards.cli.options import AtLeast1, build, options, store_options

LISTED = 20
"""So many faults stand in the table."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What is looked at, and what is made again.

    Attributes
    ----------
    repair
        Make damaged shards again, from the inputs that follow ROOT: the same bytes, or none.
    repair_from
        Copy damaged files from another copy of the set.
    workers
        Threads that check. Without it, one for each core.
    quick
        Look at the manifest, the size of every file and a sample of chunks alone.
    """

    repair: bool = False
    repair_from: str | None = None
    workers: AtLeast1 | None = None
    quick: bool = False


@click.command("verify", cls=Command)
@click.argument("root")
@click.argument("inputs", nargs=-1, metavar="[--repair INPUT...]")
@options(VerifyOptions)
@store_options
def command(
    root: str, inputs: tuple[str, ...], storage_options: Any, progress: bool, **chosen: Any
) -> Result:
    """Check every checksum, count, index row and payload of the shard set ROOT.

    Each fault is named with its shard and its cell. The exit code is 0 when there is none, else 1.
    """
    from scshards.packing.verify.repair import repair
    from scshards.packing.verify.whole import verify

    o = build(VerifyOptions, chosen)
    if inputs and not o.repair:
        raise click.UsageError("inputs after ROOT are for --repair alone")
    if o.quick and (o.repair or o.repair_from):
        raise click.UsageError("--quick finds too little to repair by")
    if o.repair or o.repair_from:
        done = repair(root, inputs, o.repair_from, storage_options, progress, workers=o.workers)
        for path, origin in done.repaired.items():
            click.echo(f"repaired {path} from {origin}", err=True)
        for path, why in done.left.items():
            click.echo(f"not repaired: {path}: {why}", err=True)
        report = done.report
    else:
        report = verify(root, storage_options, progress, workers=o.workers, quick=o.quick)
    tree = {"ok": report.ok, **dataclasses.asdict(report)}
    if not report.ok:
        rows = [(f.shard or "(all)", f.cell or "-", f.what) for f in report.faults[:LISTED]]
        more = report.n_faults - len(rows)
        text = f"faults: {report.n_faults:,}" + (f", {more:,} of them not listed" if more else "")
        return Result(tree, [Table(("shard", "cell", "fault"), rows), text], exit_code=1)
    verdict = "every byte, count and cell is as it was packed"
    if o.quick:
        verdict = (
            f"the size of every file and {report.chunks_checked:,} of "
            f"{counted(report.chunks, 'chunks')} are as they were packed; --quick looks at no more"
        )
    cells, shards = counted(report.cells, "cells"), counted(report.shards, "shards")
    lines = [f"{cells} in {shards} ({size(report.bytes)}): {verdict}"]
    return Result(tree, ["\n".join([*lines, *report.unchecked, *report.notes])])

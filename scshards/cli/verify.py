"""`scshards verify`: is a shard set what its manifest says? Exit code 1 when it is not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from scshards.base.progress import Table, counted, size
from scshards.cells.group_options import GroupOptions
from scshards.cli.command import Command, Result
from scshards.cli.options import build, option, options, store_options

if TYPE_CHECKING:
    from scshards.packing.verify.whole import VerifyReport

LISTED = 20
"""So many faults are printed."""


@click.command("verify", cls=Command)
@click.argument("root")
@click.argument("inputs", nargs=-1, metavar="[--repair INPUT...]")
@option(
    "--repair",
    is_flag=True,
    help="Make damaged shards again, from the inputs that follow ROOT: the same bytes, or none.",
)
@option(
    "--repair-from",
    help="Copy damaged files from another copy of the set, its manifest and vocabulary included.",
)
@option(
    "--workers",
    type=click.IntRange(min=1),
    help="Threads that check. Without it, one for each core.",
)
@option(
    "--quick",
    is_flag=True,
    help="Look at the manifest, the size of every file and a sample of chunks alone.",
)
@options(GroupOptions, optional=True)
@store_options
def command(
    root: str,
    inputs: tuple[str, ...],
    repair: bool,
    repair_from: str | None,
    workers: int | None,
    quick: bool,
    storage_options: Any,
    progress: bool,
    **chosen: Any,
) -> Result:
    """Check every checksum, count, index row and payload of the shard set ROOT.

    Each fault is named with its shard and its cell. The exit code is 0 when there is none, else 1.

    With --holdout, --by and --control it checks what `SetOptions` of a loader hold out, too: that each
    name is that of some cells, that no group is in two parts, and that each has controls that match.
    """
    from scshards.packing.verify import repair as repairing
    from scshards.packing.verify.whole import verify

    if inputs and not repair:
        raise click.UsageError("inputs after ROOT are for --repair alone")
    groups = _groups(chosen)
    if groups is not None and (quick or repair or repair_from):
        raise click.UsageError("--holdout goes without --quick and --repair: it reads all labels")
    if quick and (repair or repair_from):
        raise click.UsageError("--quick finds too little to repair by")
    if repair or repair_from:
        done = repairing.repair(
            root, inputs, repair_from, storage_options, progress, workers=workers
        )
        for path, origin in done.repaired.items():
            click.echo(f"repaired {path} from {origin}", err=True)
        for path, why in done.left.items():
            click.echo(f"not repaired: {path}: {why}", err=True)
        report = done.report
    else:
        report = verify(root, storage_options, progress, workers=workers, quick=quick, sets=groups)
    tree = {"ok": report.ok, **dataclasses.asdict(report)}
    if not report.ok:
        # As lines, which are wrapped: what is wrong is never cut out of the middle.
        lines = [
            f"{f.shard or '(all)'}{f', cell {f.cell}' if f.cell else ''}: {f.what}"
            for f in report.faults[:LISTED]
        ]
        more = report.n_faults - len(lines)
        text = f"faults: {report.n_faults:,}" + (f", {more:,} of them not listed" if more else "")
        mending = ""
        if not (repair or repair_from):  # else it is said of each file why it is left
            mending = repairing.how_to_mend(root, report, storage_options)
        parts = [*_parts(report), "\n".join(lines), "\n".join(filter(None, [text, mending]))]
        return Result(tree, parts, exit_code=1)
    verdict = "every byte, count and cell is as it was packed"
    if quick:
        verdict = (
            f"the size of every file and {report.chunks_checked:,} of "
            f"{counted(report.chunks, 'chunks')} are as they were packed; --quick looks at no more"
        )
    cells, shards = counted(report.cells, "cells"), counted(report.shards, "shards")
    lines = [f"{cells} in {shards} ({size(report.bytes)}): {verdict}"]
    return Result(tree, [*_parts(report), "\n".join([*lines, *report.unchecked, *report.notes])])


def _groups(chosen: dict[str, Any]) -> GroupOptions | None:
    """What the holdout is of; None without one."""
    asked = {name: value for name, value in chosen.items() if value is not None}
    if not asked:
        return None
    missing = [name for name in ("holdout", "by", "control") if name not in asked]
    if missing:
        said = " and ".join(f"--{name}" for name in missing)
        raise click.UsageError(
            f"a holdout is checked by --holdout, --by and --control: give {said}"
        )
    return build(GroupOptions, asked)


def _parts(report: VerifyReport) -> list[str | Table]:
    """The parts of a holdout, if there is one."""
    names = ("split", "part", "groups", "cells", "controls")
    rows = [tuple(getattr(part, name) for name in names) for part in report.parts]
    return [Table(names, rows)] if rows else []

"""`scshards verify`: is a shard set what its manifest says? Exit code 1 when it is not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, option, store_options


@click.command("verify", cls=Command)
@click.argument("root")
@click.argument("inputs", nargs=-1, metavar="[--repair INPUT...]")
@option(
    "--repair",
    is_flag=True,
    help="Make damaged shards again, from the inputs that follow ROOT: the same bytes, or none.",
)
@option("--repair-from", metavar="ROOT2", help="Copy damaged files from another copy of the set.")
@option(
    "--show",
    default=20,
    type=click.IntRange(min=0, max=1000),
    help="How many faults to list; all are counted.",
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
@store_options
@as_json
@click.pass_context
def command(
    ctx: click.Context,
    root: str,
    inputs: tuple[str, ...],
    repair: bool,
    repair_from: str | None,
    show: int,
    workers: int | None,
    quick: bool,
    storage_options: dict[str, Any],
    as_json: bool,
    progress: bool,
) -> None:
    """Check every checksum, count, index row and payload of the shard set ROOT.

    Each fault is named with its shard and its cell. The exit code is 0 when there is none, else 1.
    """
    from scshards.base.progress import size, table
    from scshards.packing.verify.whole import verify

    if inputs and not repair:
        raise click.UsageError("inputs after ROOT are for --repair alone")
    if quick and (repair or repair_from):
        raise click.UsageError("--quick finds too little to repair by")
    if repair or repair_from is not None:
        from scshards.packing.verify.repair import repair as repair_set

        done = repair_set(root, inputs, repair_from, storage_options, progress, workers=workers)
        for path, origin in done.repaired.items():
            click.echo(f"repaired {path} from {origin}", err=True)
        for path, why in done.left.items():
            click.echo(f"not repaired: {path}: {why}", err=True)
        report = done.report
    else:
        report = verify(root, storage_options, progress, workers=workers, quick=quick)
    if as_json:
        tree = dataclasses.asdict(report)
        tree["faults"] = tree["faults"][:show]
        click.echo(json.dumps({"ok": report.ok, **tree}, ensure_ascii=False))
    elif report.ok:
        verdict = "every byte, count and cell is as it was packed"
        if quick:
            verdict = (
                f"the size of every file and {report.chunks_checked:,} of {report.chunks:,} chunks "
                "are as they were packed; --quick looks at no more"
            )
        click.echo(
            f"{report.cells:,} cells in {report.shards:,} shards ({size(report.bytes)}): {verdict}"
        )
        for line in (*report.unchecked, *report.notes):
            click.echo(line)
    else:
        if show:
            rows = [(f.shard or "(all)", f.cell or "-", f.what) for f in report.faults[:show]]
            click.echo(table(("shard", "cell", "fault"), rows))
        more = report.n_faults - min(show, len(report.faults))
        click.echo(
            f"\nfaults: {report.n_faults:,}" + (f", {more:,} of them not listed" if more else ""),
            err=True,
        )
    if not report.ok:
        ctx.exit(1)

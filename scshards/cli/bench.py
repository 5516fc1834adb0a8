"""`scshards bench`: how fast a shard set streams here, and whether that is enough for a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from scshards.base.progress import Table, duration
from scshards.cli.command import Command, Result
from scshards.cli.options import option, store_options

if TYPE_CHECKING:
    from scshards.report.bench import BenchReport


@click.command("bench", cls=Command)
@click.argument("root")
@option(
    "--demand",
    type=float,
    help="Cells a second that a model takes: is the loader fast enough, and what would the model wait?",
)
@option("--split", default="train", help="The cells to stream.")
@option("--seconds", default=10.0, help="How long to measure; with --demand, as long once more.")
@option("--threads", default=2, help="Threads that make batches.")
@option("--batch-size", default=64, help="Cells of a batch, of each rank.")
@option("--max-length", default=1200, help="Tokens of a cell at most.")
@option("--n-bins", default=51, help="Bins of values; 0 leaves values alone.")
@store_options
def command(
    root: str, demand: float | None, seconds: float, progress: bool, **chosen: Any
) -> Result:
    """Measure how fast the shard set ROOT streams on this machine, and where the time goes.

    Batches are made as for training: read, checked, shuffled, decoded, binned, sampled, masked and
    padded. The first pass over shards that are not in the page cache measures the disk too.
    """
    from scshards.report.bench import bench
    from scshards.streaming.loader import CellLoader

    report = bench(
        lambda: CellLoader(root, rank=0, world_size=1, **chosen),
        seconds=seconds,
        demand=demand,
        progress=progress,
    )
    first = "batches of {batch_size} cells of at most {max_length:,} tokens, threads: {threads}"
    return Result(report.tables(), [first.format(**chosen), *_parts(report)])


_CORES = "more --threads help as long as there are idle cores"
STAGES = {
    "fetch": ("read chunks", "a nearer or faster disk, or a cache on one, would help"),
    "check": ("compare checksums, inflate", _CORES),
    "index": ("read shards' indexes", "larger shards would help"),
    "store": ("copy cells out of chunks", _CORES),
    "deal": ("shuffle", _CORES),
    "collate": ("decode, bin, sample, mask, pad", _CORES),
}
"""{stage: what it does, and what can be done when it takes too long}."""


def _parts(report: BenchReport) -> Iterator[str | Table]:
    """The report for people, part by part."""
    took = report.seconds
    figures = {
        "cells/s": report.cells_per_s,
        "tokens/s": report.tokens / took,
        "tokens/s, padding included": report.padded_tokens / took,
        "MB/s read": report.bytes / took / 1e6,
        "first batch, s": report.made_s + report.first_batch_s,
        "memory, MB": report.memory_bytes / 1e6,
    }
    yield Table(("figure", "value"), list(figures.items()))
    if report.compile_s:
        yield (
            f"the first batch waited {duration(report.compile_s)} for kernels to be compiled, which "
            "happens once: measure again for its time without that"
        )
    per_cell = 1e6 / max(report.cells, 1)
    rows: list[tuple[object, ...]] = [
        (name, STAGES[name][0], getattr(report.stages, name) * per_cell, round(100 * share, 1))
        for name, share in report.shares.items()
    ]
    rows.append(("wait", "whoever takes batches waits", report.stages.wait * per_cell, None))
    yield Table(("stage", "what it does", "µs a cell", "% of the work"), rows)
    if report.demand is None or report.headroom is None or report.stall is None:
        return
    yield (
        f"the loader gives {report.headroom:.1f} times the {report.demand:,.0f} cells/s that are "
        f"wanted; taken at that pace, batches were waited for {100 * report.stall:.2f}% of the time"
    )
    if report.headroom < 1:
        slowest = max(report.shares, key=report.shares.__getitem__)
        does, remedy = STAGES[slowest]
        yield f"that is too slow: most of the work is {slowest} ({does}); {remedy}"

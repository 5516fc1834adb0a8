"""`scshards bench`: how fast a shard set streams here, and whether that is enough for a model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from scshards.base.progress import Table, duration
from scshards.cli.command import Command, Result
from scshards.cli.options import build, option, options, store_options
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.read.options import THREADS, ReadOptions

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
@option("--batch-size", default=64, help="Cells of a batch, of each rank.")
@options(ChoiceOptions)
@options(CollateOptions, only="max_length n_bins include_zero_genes tokens_per_batch")
@options(ReadOptions, only="lanes shuffle_buffer threads cache_dir cache_size")
@store_options
def command(
    root: str,
    demand: float | None,
    split: str,
    seconds: float,
    batch_size: int,
    progress: bool,
    **chosen: Any,
) -> Result:
    """Measure how fast the shard set ROOT streams on this machine, and where the time goes.

    Batches are made as for training: read, checked, shuffled, decoded, binned, sampled, masked and
    padded. The first pass over shards that are not in the page cache measures the disk too.
    """
    from scshards.report.bench import bench
    from scshards.streaming.loader import CellLoader

    collate, read = build(CollateOptions, chosen), build(ReadOptions, chosen)
    choose = build(ChoiceOptions, chosen)
    size = None if collate.tokens_per_batch is not None else batch_size
    make = partial(
        CellLoader, root, split=split, batch_size=size, choose=choose, collate=collate, read=read,
        rank=0, world_size=1,
    )  # fmt: skip
    report = bench(
        make,
        seconds=seconds,
        demand=demand,
        progress=progress,
    )
    batches = f"{batch_size} cells" if size else f"{collate.tokens_per_batch:,} tokens, cells"
    first = (
        f"batches of {batches} of at most {collate.max_length:,} tokens, threads: "
        f"{read.threads or THREADS}"
    )
    return Result(report.tables(), [first, *_parts(report)])


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

"""`scshards bench`: how fast a shard set streams here, and whether that is enough for a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, option, store_options

if TYPE_CHECKING:
    from scshards.stream.bench import BenchReport


@click.command("bench", cls=Command)
@click.argument("root")
@option(
    "--demand",
    type=click.FloatRange(min=0, min_open=True),
    help="Cells a second that a model takes: is the loader fast enough, and what would the model wait?",
)
@option("--split", default="train", help="The cells to stream.")
@option(
    "--seconds",
    default=10.0,
    type=click.FloatRange(min=0, min_open=True),
    help="How long to measure; with --demand, as long once more.",
)
@option("--threads", default=2, type=click.IntRange(min=1), help="Threads that make batches.")
@option("--batch-size", default=64, type=click.IntRange(min=1), help="Cells of a batch.")
@option(
    "--max-length",
    default=1200,
    type=click.IntRange(min=2),
    help="Tokens of a cell at most.",
)
@option("--n-bins", default=51, help="Bins of values; 0 leaves values alone.")
@store_options
@as_json
def command(
    root: str,
    demand: float | None,
    split: str,
    seconds: float,
    threads: int,
    batch_size: int,
    max_length: int,
    n_bins: int,
    storage_options: dict[str, Any],
    as_json: bool,
    progress: bool,
) -> None:
    """Measure how fast the shard set ROOT streams on this machine, and where the time goes.

    Batches are made as for training: read, checked, shuffled, decoded, binned, sampled, masked and
    padded. The first pass over shards that are not in the page cache measures the disk too.
    """
    from scshards.stream.bench import bench
    from scshards.stream.loader import CellLoader

    report = bench(
        lambda: CellLoader(
            root,
            split=split,
            batch_size=batch_size,
            max_length=max_length,
            n_bins=n_bins,
            threads=threads,
            rank=0,
            world_size=1,
            storage_options=storage_options,
        ),
        seconds=seconds,
        demand=demand,
        progress=progress,
    )
    if as_json:
        click.echo(json.dumps(report.tables()))
        return
    click.echo(
        f"batches of {batch_size} cells of at most {max_length:,} tokens, threads: {threads}\n"
    )
    click.echo("\n\n".join(_text(report)))


WHAT = {
    "fetch": "read chunks",
    "check": "compare checksums, inflate",
    "index": "read shards' indexes",
    "store": "copy cells out of chunks",
    "deal": "shuffle",
    "collate": "decode, bin, sample, mask, pad",
}
"""What each stage does, in a few words."""

_CORES = "more --threads help as long as there are idle cores"
REMEDY = {
    "fetch": "a nearer or faster disk, or a cache on one, would help",
    "check": _CORES,
    "index": "larger shards would help",
    "store": _CORES,
    "deal": _CORES,
    "collate": _CORES,
}
"""What can be done about a stage that takes too long."""


def _text(report: BenchReport) -> Iterator[str]:
    """The report for people, part by part."""
    from scshards.base.progress import duration, table

    took = report.seconds
    yield table(
        ("figure", "value"),
        [
            ("cells/s", report.cells_per_s),
            ("tokens/s", report.tokens / took),
            ("tokens/s, padding included", report.padded_tokens / took),
            ("MB/s read", report.bytes / took / 1e6),
            ("first batch, s", report.made_s + report.first_batch_s),
            ("memory, MB", report.memory_bytes / 1e6),
        ],
    )
    if report.compiled:
        yield (
            f"the first batch waited {duration(report.compile_s)} for {report.compiled} kernels to be "
            "compiled, which happens once: measure again for its time without that"
        )
    per_cell = 1e6 / max(report.cells, 1)
    rows: list[tuple[object, ...]] = [
        (name, WHAT[name], getattr(report.stages, name) * per_cell, 100 * share)
        for name, share in report.shares.items()
    ]
    rows.append(("wait", "whoever takes batches waits", report.stages.wait * per_cell, None))
    yield table(("stage", "what it does", "µs a cell", "% of the work"), rows)
    if report.demand is None or report.headroom is None or report.stall is None:
        return
    yield (
        f"the loader gives {report.headroom:.1f} times the {report.demand:,.0f} cells/s that are "
        f"wanted; taken at that pace, batches were waited for {100 * report.stall:.2f}% of the time"
    )
    if report.headroom < 1:
        slowest = max(report.shares, key=report.shares.__getitem__)
        yield (
            f"that is too slow: most of the work is {slowest} ({WHAT[slowest]}); {REMEDY[slowest]}"
        )

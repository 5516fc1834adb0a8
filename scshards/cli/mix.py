"""`scshards mix`: how well the batches of a shard set mix donors, tissues, ..., before any training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import click

from scshards.base.progress import Table, counted
from scshards.cli.bench import BenchOptions
from scshards.cli.command import Command, Result
from scshards.cli.options import AtLeast1, build, options, store_options, wide
from scshards.packing.options import ReshardOptions

if TYPE_CHECKING:
    from scshards.stream.mixing import MixOptions, MixReport


@dataclass(frozen=True, kw_only=True)
class MixChoice:
    """Which batches are looked at.

    Attributes
    ----------
    by
        Labels of categories, or source. Without it, all labels of categories.
    split, batch_size
        As in BenchOptions.
    world_size
        Ranks that train.
    lanes
        Shuffle buffers that cells are read through.
    shuffle_buffer
        Cells in the buffers of all lanes together.
    shuffle
        Read in random order, or that of the shards.
    where
        As in ReshardOptions.
    balanced
        Draw the values of this label equally often.
    seed
        The seed of the order.
    epoch
        The epoch that is looked at.
    batches
        How many batches of the epoch are looked at.
    plot
        Draw the entropies along the epoch.
    """

    by: tuple[str, ...] = ()
    split: str = BenchOptions.split
    batch_size: AtLeast1 = BenchOptions.batch_size
    world_size: AtLeast1 = 1
    lanes: AtLeast1 = 64
    shuffle_buffer: AtLeast1 = 8192
    shuffle: bool = True
    where: str | None = ReshardOptions.where
    balanced: str | None = None
    seed: int = 0
    epoch: Annotated[int, click.IntRange(min=0)] = 0
    batches: AtLeast1 = 256
    plot: str | None = None


@click.command("mix", cls=Command)
@click.argument("root")
@options(MixChoice)
@wide
@store_options
def command(root: str, storage_options: Any, progress: bool, **chosen: Any) -> Result:
    """Show how well batches of the shard set ROOT mix its labels, before anything is trained.

    The order is the one that training with these options would read, worked out on integers; only the
    shards' indexes are read. Entropy is in bits: that of a batch drawn at random, and of the batches
    that will come, their mean and what one in twenty does not reach; with --wide, that of all cells too.
    """
    from scshards.stream.mixing import MixOptions, mix

    asked = dataclasses.asdict(build(MixChoice, chosen))
    by, split, plot, balanced = (asked.pop(name) for name in ("by", "split", "plot", "balanced"))
    options = MixOptions(**asked, weights=None if balanced is None else {balanced: "balanced"})
    report = mix(root, by, options, split=split, storage_options=storage_options, progress=progress)
    tree: dict[str, Any] = {name: getattr(report, name) for name in OF_ALL}
    tree["columns"] = [{name: getattr(m, name) for name in OF_COLUMNS} for m in report.columns]
    buffer = f"a shuffle buffer of {options.shuffle_buffer:,}" if options.shuffle else "no shuffle"
    first = (
        f"{report.sampled:,} of {counted(report.steps, 'steps')} of an epoch of "
        f"{counted(report.cells, 'cells')}: batches of {options.batch_size} on "
        f"{counted(options.world_size, 'ranks')}, {counted(options.lanes, 'lanes')}, {buffer}"
    )
    parts: list[str | Table] = [first, _table(report), _advice(report, options)]
    if plot is not None:
        from scshards.stream import mix_plot

        tree["plot"] = str(mix_plot.plot(report, plot))
        parts.append(tree["plot"])
    return Result(tree, parts)


OF_ALL = ("cells", "steps", "sampled", "is_packed_shuffled")
OF_COLUMNS = ("column", "cells", "categories", "whole", "ideal", "mean", "low", "score")
"""What of the report is in the JSON."""

GOOD, FAIR = 0.95, 0.8
"""Scores from which batches count as well mixed, and as mixed somewhat."""


def _table(report: MixReport) -> Table:
    header = ("column", "categories", "all cells", "batch", "at random", "mean", "low",
              "% of random")  # fmt: skip
    rows = [
        (
            m.column,
            m.categories,
            *(round(bits, 3) for bits in (m.whole, m.cells, m.ideal, m.mean, m.low)),
            None if m.score is None else round(100 * m.score, 1),
        )
        for m in report.columns
    ]
    return Table(header, rows, more=("all cells",))


def _advice(report: MixReport, options: MixOptions) -> str:
    """What the figures mean, and what can be done, in plain words."""
    if all(m.score is None for m in report.columns):
        return "all cells are of one category: there is nothing to mix"
    bad = list(dict.fromkeys(m.column for m in report.columns if (m.score or 1.0) < GOOD))
    if not bad:
        return "batches mix as well as batches drawn at random"
    badly = report.worst < FAIR
    text = f"{', '.join(bad)}: batches mix {'badly' if badly else 'less than'}"
    text += ", " if badly else " batches drawn at random would, "
    if not options.shuffle:
        return text + "because cells are read in the order of the shards: leave out --no-shuffle"
    if not report.is_packed_shuffled:
        return text + (
            "because the shards were packed without shuffling, in the order of the inputs: `scshards "
            "reshard --shuffle` makes a shuffled set of them; a larger --shuffle-buffer helps somewhat"
        )
    return text + (
        f"with a shuffle buffer of {options.shuffle_buffer:,} of {report.cells:,} cells: make "
        "--shuffle-buffer or --lanes larger"
    )

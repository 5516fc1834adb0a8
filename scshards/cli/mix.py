"""`scshards mix`: how well the batches of a shard set mix donors, tissues, ..., before any training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, option, store_options

if TYPE_CHECKING:
    from scshards.stream.mixing import MixOptions, MixReport

_AT_LEAST_1 = click.IntRange(min=1)


@click.command("mix", cls=Command)
@click.argument("root")
@option(
    "--by",
    help="Labels of categories, or source. Without it, all labels of categories.",
)
@option("--split", default="train", help="The cells to stream.")
@option("--batch-size", default=64, type=_AT_LEAST_1, help="Cells of a batch of one rank.")
@option("--world-size", default=1, type=_AT_LEAST_1, help="Ranks that train.")
@option(
    "--lanes", default=64, type=_AT_LEAST_1, help="Shuffle buffers that cells are read through."
)
@option(
    "--shuffle-buffer",
    default=8192,
    type=_AT_LEAST_1,
    help="Cells in the buffers of all lanes together.",
)
@option("--shuffle/--no-shuffle", default=True, help="Read in random order, or that of the shards.")
@option("--where", help="Take the cells this is true for, as for scshards pack.")
@option("--balanced", help="Draw the values of this label equally often.")
@option("--seed", default=0, help="The seed of the order.")
@option("--epoch", default=0, type=click.IntRange(min=0), help="The epoch that is looked at.")
@option(
    "--batches",
    default=256,
    type=_AT_LEAST_1,
    help="How many batches of the epoch are looked at.",
)
@option("--plot", help="Draw the entropies along the epoch.")
@store_options
@as_json
def command(
    root: str,
    by: str | None,
    split: str,
    batch_size: int,
    world_size: int,
    lanes: int,
    shuffle_buffer: int,
    shuffle: bool,
    where: str | None,
    balanced: str | None,
    seed: int,
    epoch: int,
    batches: int,
    plot: str | None,
    storage_options: dict[str, Any],
    as_json: bool,
    progress: bool,
) -> None:
    """Show how well batches of the shard set ROOT mix its labels, before anything is trained.

    The order is the one that training with these options would read, worked out on integers; only the
    shards' indexes are read. Entropy is in bits: that of all cells, of a batch drawn at random, and of
    the batches that will come, their mean and what one in twenty does not reach.
    """
    from scshards.stream.mixing import MixOptions, mix

    options = MixOptions(
        batch_size=batch_size,
        world_size=world_size,
        lanes=lanes,
        shuffle=shuffle,
        shuffle_buffer=shuffle_buffer,
        seed=seed,
        epoch=epoch,
        batches=batches,
        where=where,
        weights=None if balanced is None else {balanced: "balanced"},
    )
    report = mix(
        root,
        [name.strip() for name in by.split(",") if name.strip()] if by else (),
        options,
        split=split,
        storage_options=storage_options,
        progress=progress,
    )
    if plot is not None:
        from scshards.stream import mix_plot

        click.echo(mix_plot.plot(report, plot), err=True)
    if as_json:
        click.echo(json.dumps(_tree(report)))
        return
    click.echo(
        f"{report.sampled:,} of {report.steps:,} steps of an epoch of {report.cells:,} cells: batches "
        f"of {batch_size} on {world_size} ranks, {lanes} lanes, "
        + (f"a shuffle buffer of {shuffle_buffer:,}\n" if shuffle else "no shuffle\n")
    )
    click.echo(_table(report))
    click.echo("\n" + _advice(report, options))


GOOD, FAIR = 0.95, 0.8
"""Scores from which batches count as well mixed, and as mixed somewhat."""


def _table(report: MixReport) -> str:
    from scshards.base.progress import table

    return table(
        (
            "column", "categories", "all cells", "cells of a batch", "drawn at random", "mean",
            "low", "% of random",
        ),
        [
            (
                m.column,
                m.categories,
                round(m.whole, 3),
                m.cells,
                round(m.ideal, 3),
                round(m.mean, 3),
                round(m.low, 3),
                None if m.score is None else round(100 * m.score, 1),
            )
            for m in report.columns
        ],
    )  # fmt: skip


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


def _tree(report: MixReport) -> dict[str, object]:
    """The report as plain JSON."""
    return {
        "cells": report.cells,
        "steps": report.steps,
        "sampled": report.sampled,
        "is_packed_shuffled": report.is_packed_shuffled,
        "columns": [
            {
                "column": m.column,
                "cells": m.cells,
                "categories": m.categories,
                "whole": m.whole,
                "ideal": m.ideal,
                "mean": m.mean,
                "low": m.low,
                "score": m.score,
            }
            for m in report.columns
        ],
    }

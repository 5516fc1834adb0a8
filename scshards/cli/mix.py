"""`scshards mix`: how well the batches of a shard set mix donors, tissues, ..., before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from scshards.base.progress import Table, counted
from scshards.cli.command import Command, Result
from scshards.cli.options import build, options, store_options
from scshards.report.mix_options import MixOptions
from scshards.streaming.order.options import BALANCED, ChoiceOptions
from scshards.streaming.read.options import ReadOptions

if TYPE_CHECKING:
    from scshards.report.mixing import MixReport


@dataclass(frozen=True, kw_only=True)
class MixRun(MixOptions):
    """What is looked at, and drawn.

    Attributes
    ----------
    by
        Labels of categories, or source. Without it, all labels of categories.
    balanced
        Draw the values of this label equally often.
    split
        The cells to stream.
    plot
        Draw the entropies along the epoch.
    """

    by: tuple[str, ...] = ()
    balanced: str | None = None
    split: str = "train"
    plot: str | None = None


@click.command("mix", cls=Command)
@click.argument("root")
@options(MixRun)
@options(ChoiceOptions, only="where take epoch_cells stratify")
@options(ReadOptions, only="lanes shuffle_buffer")
@store_options
def command(root: str, progress: bool, **chosen: Any) -> Result:
    """Show how well batches of the shard set ROOT mix its labels, before anything is trained.

    The order is the one that training with these options would read, worked out on integers; only the
    shards' indexes are read. Windows of 1, 10, 100 and 1,000 batches in a row are looked at: a batch
    that mixes well says little of a stretch of training. Entropy is in bits: that of as many cells drawn
    at random, and of the windows that will come, their mean and what one in twenty does not reach;
    with --wide, that of all cells too. Of the sets and additions, and of the categories of --stratify,
    it shows how their shares go along the epoch.
    """
    from scshards.report.mixing import mix

    o, read = build(MixRun, chosen), build(ReadOptions, chosen)
    if o.balanced is not None:
        chosen["weights"] = {o.balanced: BALANCED}
    choose = build(ChoiceOptions, chosen)
    report = mix(root, o.by, o, split=o.split, choose=choose, read=read, progress=progress)
    tree: dict[str, Any] = {name: getattr(report, name) for name in OF_ALL}
    tree["columns"] = [{name: getattr(m, name) for name in OF_COLUMNS} for m in report.columns]
    tree["drift"] = [
        {name: getattr(d, name) for name in OF_DRIFT} | {"shares": d.shares.tolist()}
        for d in report.drift
    ]
    buffer = f"a shuffle buffer of {read.shuffle_buffer:,}" if o.shuffle else "no shuffle"
    first = (
        f"{report.sampled:,} of {counted(report.steps, 'steps')} of an epoch of "
        f"{counted(report.cells, 'cells')}: batches of {o.batch_size} on "
        f"{counted(o.world_size, 'ranks')}, {counted(read.lanes, 'lanes')}, {buffer}"
    )
    parts: list[str | Table] = [
        first,
        _table(report),
        *([_drift(report)] if report.drift else []),
        _advice(report, o.shuffle, read.shuffle_buffer),
    ]
    if o.plot is not None:
        from scshards.report import mixing_plot

        tree["plot"] = str(mixing_plot.plot(report, o.plot))
        parts.append(tree["plot"])
    return Result(tree, parts)


OF_ALL = ("cells", "steps", "sampled", "is_packed_shuffled", "grouped_by")
OF_COLUMNS = ("column", "window", "cells", "categories", "whole", "ideal", "mean", "low", "score")
OF_DRIFT = ("stratum", "share", "low", "high")
"""What of the report is in the JSON."""

GOOD, FAIR = 0.95, 0.8
"""Scores from which windows count as well mixed, and as mixed somewhat."""


def _table(report: MixReport) -> Table:
    header = ("column", "categories", "all cells", "batches", "cells", "at random", "mean", "low",
              "% of random")  # fmt: skip
    rows = []
    for m in report.columns:
        bits = (round(b, 3) for b in (m.ideal, m.mean, m.low))
        score = None if m.score is None else round(100 * m.score, 1)
        whole = round(m.whole, 3)
        rows.append((m.column, m.categories, whole, m.window, m.cells, *bits, score))
    return Table(header, rows, more=("all cells",))


def _drift(report: MixReport) -> Table:
    header = ("share of", "% of the epoch", "least", "most")
    rows = [
        (d.stratum, *(round(100 * share, 2) for share in (d.share, d.low, d.high)))
        for d in report.drift
    ]
    return Table(header, rows)


def _advice(report: MixReport, shuffle: bool, shuffle_buffer: int) -> str:
    """What the figures mean, and what can be done, in plain words."""
    if all(m.score is None for m in report.columns):
        return "all cells are of one category: there is nothing to mix"
    bad: dict[str, int] = {}  # the smallest window in which a column mixes less well
    for m in report.columns:
        if m.score is not None and m.score < GOOD:
            bad.setdefault(m.column, m.window)
    if not bad:
        return "batches, and batches in a row, mix as well as cells drawn at random"
    how = "badly" if report.worst < FAIR else "less well than cells drawn at random would"
    whats = [
        f"{column}: {'batches' if w == 1 else f'{w:,} batches in a row'}"
        for column, w in bad.items()
    ]
    text = f"{'; '.join(whats)} mix {how}, "
    if not shuffle:
        return text + "because cells are read in the order of the shards: leave out --no-shuffle"
    if report.grouped_by:
        return text + (
            f"because the shards are grouped by {', '.join(report.grouped_by)}: sets of cells are read "
            "best so (CellLoader(sets=...)), and for single cells `scshards reshard --shuffle` makes a "
            "shuffled set of them"
        )
    if not report.is_packed_shuffled:
        return text + (
            "because the shards were packed without shuffling, in the order of the inputs: `scshards "
            "reshard --shuffle` makes a shuffled set of them; a larger --shuffle-buffer helps somewhat"
        )
    return text + (
        f"with a shuffle buffer of {shuffle_buffer:,} of {report.cells:,} cells: make "
        "--shuffle-buffer or --lanes larger"
    )

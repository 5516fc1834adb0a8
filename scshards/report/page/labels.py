"""Sections of a shard set: its labels across splits, and how long cells are, by any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from scshards.base.progress import counted
from scshards.base.text import first_of
from scshards.report.page.cells import BINS, EDGES, INPUT, MEASURES, Numbers, quantiles
from scshards.report.page.figures import (
    Axis,
    Figure,
    Row,
    bars,
    columns,
    grouped,
    histogram,
    strips,
)
from scshards.report.page.html import Html, Section, para, table
from scshards.report.page.known import SetFacts

MOST = 24
"""Categories of a label that have a bar of their own: the most frequent ones."""

MOST_LABELS = 24
"""Labels that can be chosen."""

RARE = 50
"""Cells, of which a category with fewer is rare."""

MISSING = "(missing)"
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 40
Bin = tuple[float, float, int]
"""From, below, cells."""


def length_section(f: SetFacts) -> Section:
    """Genes and counts of cells, over all and by label."""
    c = f.counts
    what = "counts" if f.shardset.manifest.value_kind == "counts" else "values"
    genes = {s: _binned_lengths(c.lengths[s]) for s in c.splits if c.lengths[s].sum()}
    totals = {s: c.totals[s] for s in c.splits if c.totals[s].sum()}
    parts: list[Html | Figure] = []
    if genes:
        parts += [
            _histogram(
                "genes-per-cell",
                "Genes of a cell",
                "How many genes of the vocabulary cells have a value of, by split.",
                Axis(of="from", title="genes"),
                {"": _histograms(genes)},
            ),
            _histogram(
                "counts-per-cell",
                f"{what.capitalize()} of a cell",
                f"The sum of a cell's {what} over the genes of the vocabulary, by split.",
                Axis(of="from", title=what, log=True),
                {"": _histograms({s: _rebinned(n) for s, n in totals.items()})},
            ),
        ]
    for measure, name, title in zip(
        MEASURES, ("genes-by-label", "counts-by-label"), ("Genes", what.capitalize()), strict=True
    ):
        choices = {
            _called(label): _strip_rows(f, label, f.counts.spread[label][measure])
            for label in _ordered(f)
            if label in f.counts.spread
        }
        parts.append(
            Figure(
                name=name,
                title=f"{title} of a cell, by label",
                about="Of the cells of each category the middle half (thick), nine in ten (thin) and "
                "the median (line); to within 4%.",
                spec=strips("category", Axis(of="q05", title=title.lower(), log=True)),
                columns=columns(
                    category="text",
                    cells="number",
                    **{f"q{100 * q:02.0f}": (f"{100 * q:.0f}%", "number") for q in SHARES},
                ),
                choices={k: rows for k, rows in choices.items() if rows} or {"": []},
                choose="Label",
            )
        )
    return Section(name="lengths", title="How long cells are", parts=parts)


def label_section(f: SetFacts) -> Section:
    """Categories across splits, values that are in several, and labels of numbers."""
    c = f.counts
    parts: list[Html | Figure] = [
        Figure(
            name="splits",
            title="Cells of each split",
            about="How many cells are for training, and how many are held out.",
            spec=bars("split", Axis(of="cells", title="cells")),
            columns=columns(split="text", cells="number", share="percent"),
            choices={
                "": [
                    (s, int(c.lengths[s].sum()), int(c.lengths[s].sum()) / max(c.cells, 1))
                    for s in c.splits
                ]
            },
        ),
        Figure(
            name="balance",
            title="Categories across splits",
            about="The share of each split's cells that a category has. Even bars are an even split.",
            spec=grouped(
                "category",
                Axis(of="share", form="%", title="of the split's cells"),
                "split",
                tips=("category", "split", "cells", "share"),
            ),
            columns=columns(
                category="text",
                split="text",
                cells="number",
                share=("share of the split", "percent"),
                order=("", "number"),
            ),
            choices={_called(n): _balance_rows(f, n) for n in _ordered(f)},
            choose="Label",
        ),
    ]
    parts.append(leak_table(f))
    numbers = {n: _number_rows(of) for n, of in list(c.numbers.items())[:MOST_LABELS]}
    numbers = {n: rows for n, rows in numbers.items() if rows}
    if numbers:
        parts.append(
            _histogram(
                "numbers",
                "Labels of numbers",
                "How the numbers of a label are spread, by split; each to within 1%.",
                Axis(of="from", title="value"),
                numbers,
            )
        )
    return Section(name="labels", title="Labels and splits", parts=parts)


def leaks(f: SetFacts, label: str) -> tuple[int, int, list[str]]:
    """Of a label's categories: in one split only; in several; and the names of these."""
    in_splits = (f.counts.categories[label][:, 1:] > 0).sum(axis=0)
    several = np.flatnonzero(in_splits > 1)
    return int((in_splits == 1).sum()), len(several), [f.names[label][i] for i in several.tolist()]


def leak_table(f: SetFacts) -> Html:
    """A row per label: categories, those that are in several splits, missing cells, rare categories."""
    m, rows = f.shardset.manifest, []
    for label in _ordered(f):
        counts = f.counts.categories[label]
        one, several, names = leaks(f, label)
        per = counts.sum(axis=0)
        rows.append(
            (
                _called(label),
                len(f.names[label]),
                one,
                several,
                first_of(names, 3),
                int(per[0]) / max(int(per.sum()), 1),
                int(((per[1:] > 0) & (per[1:] < RARE)).sum()),
            )
        )
    header = ("label", "categories", "in one split only", "in several", "such as", "cells without",
              f"rare (below {RARE} cells)")  # fmt: skip
    kinds = ("text", "number", "number", "number", "text", "percent", "number")
    by = m.options.get("split_by")
    told = "Cells were split one by one: a value may be in several splits."
    if isinstance(by, str) and by in f.names:
        n = leaks(f, by)[1]
        told = f"The cells were split by {by}. " + (
            f"{counted(n, 'of its values')} are in more than one split, which should not be."
            if n
            else "None of its values is in two splits."
        )
    elif len(m.splits) == 1:
        told = "There is one split."
    return Html(para(told) + table(header, rows, kinds, label="Labels across splits"))


def _histogram(
    name: str, title: str, about: str, x: Axis, choices: Mapping[str, Sequence[Row]]
) -> Figure:
    """Shares of each split's cells along an axis; `choices` are by label, or the one of ""."""
    return Figure(
        name=name,
        title=title,
        about=about,
        spec=histogram(x, Axis(of="share", form="%", title="cells"), color="split"),
        columns=columns(
            **{"from": "number"},
            end=("below", "number"),
            cells="number",
            split="text",
            share=("share of the split", "percent"),
        ),
        choices=choices,
        choose="" if "" in choices else "Label",
    )


def _ordered(f: SetFacts) -> list[str]:
    """The labels of categories, and the input where there are several."""
    names = [n for n in f.names if n != INPUT][: MOST_LABELS - 1]
    return [*names, INPUT] if len(f.names[INPUT]) > 1 or not names else names


def _called(label: str) -> str:
    return "input file" if label == INPUT else label


def _shown(f: SetFacts, label: str) -> tuple[list[tuple[str, list[int]]], NDArray[np.int64]]:
    """(name, places in the counts) of the most frequent categories and of the others together."""
    per = f.counts.categories[label].sum(axis=0)
    order = [i for i in np.argsort(-per, kind="stable").tolist() if per[i]]
    names = (MISSING, *f.names[label])
    first, rest = order[:MOST], order[MOST:]
    shown = [(names[i], [i]) for i in first]
    return [*shown, (counted(len(rest), "others"), rest)] if rest else shown, per


def _strip_rows(f: SetFacts, label: str, counts: NDArray[np.int64]) -> list[Row]:
    shown, per = _shown(f, label)
    rows: list[Row] = []
    for name, places in shown:
        qs = [max(q, 1.0) for q in quantiles(counts[places].sum(axis=0), SHARES)]
        rows.append((name, int(per[places].sum()), *qs))
    return rows


def _balance_rows(f: SetFacts, label: str) -> list[Row]:
    counts = f.counts.categories[label]
    shown, _ = _shown(f, label)
    whole = counts.sum(axis=1)
    return [
        (name, split, n, n / max(int(whole[s]), 1), s)
        for name, places in shown
        for s, split in enumerate(f.counts.splits)
        if whole[s]
        for n in [int(counts[s, places].sum())]
    ]


def _binned_lengths(lengths: NDArray[np.int64]) -> list[Bin]:
    """Cells by equal bins of numbers of genes, at most _BINS of them."""
    longest = int(np.flatnonzero(lengths).max())
    width = max(1, _round(longest / _BINS))
    at = np.arange(len(lengths)) // width
    counts = np.bincount(at, lengths).astype(np.int64)
    of_bins = counts[: longest // width + 1].tolist()
    return [(float(i * width), float((i + 1) * width), n) for i, n in enumerate(of_bins)]


def _rebinned(counts: NDArray[np.int64]) -> list[Bin]:
    """Bins of four of those that were counted, from the first that has a cell to the last."""
    merged = counts[1 : BINS - 1].reshape(-1, 4).sum(axis=1)
    there = np.flatnonzero(merged)
    out: list[Bin] = []
    if len(there):
        out = [
            (float(EDGES[4 * i]), float(EDGES[4 * i + 4]), int(merged[i]))
            for i in range(there[0], there[-1] + 1)
        ]
    return out


def _histograms(of_splits: dict[str, list[Bin]]) -> list[Row]:
    return [
        (low, high, n, split, n / max(sum(n for _, _, n in bins), 1))
        for split, bins in of_splits.items()
        for low, high, n in bins
    ]


def _number_rows(of: dict[str, Numbers]) -> list[Row]:
    """Histograms of the numbers of all splits, over one range."""
    there = {split: n for split, n in of.items() if n.by_key.any()}
    low = min((n.low for n in there.values()), default=0.0)
    high = max((n.high for n in there.values()), default=0.0)
    rows: list[Row] = []
    for split, numbers in there.items():
        edges, cells = numbers.histogram(low, high, _BINS)
        whole = max(int(cells.sum()), 1)
        for a, b, n in zip(edges[:-1].tolist(), edges[1:].tolist(), cells.tolist(), strict=True):
            rows.append((a, b, n, split, n / whole))
    return rows


def _round(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    steps: Sequence[int] = [m * 10**e for e in range(6) for m in (1, 2, 5)]
    return next((s for s in steps if s >= width), steps[-1])

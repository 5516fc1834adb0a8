"""Embeddings of cells as points, coloured by any label. Called by report.page.runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.progress import counted
from scshards.report.page.figures import Figure, Row, columns
from scshards.report.plot import KEY, first_two_components, read_cells

MOST_CELLS, MOST_LABELS, MOST_CATEGORIES = 1500, 8, 9
"""Points, labels to choose from, and categories with a colour; the smaller ones share one."""

_PARTS = 5
"""Ranges of a label of numbers, of about as many cells each."""


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Cells in two dimensions.

    Attributes
    ----------
    title
        Whose they are.
    at
        float64 [cells, 2].
    axes
        What the two dimensions are.
    labels
        {label: of each cell a text, or a number}.
    """

    title: str
    at: NDArray[np.float64]
    axes: tuple[str, str]
    labels: Mapping[str, NDArray[Any]]


def read_cloud(path: str, layout: str | None) -> Cloud:
    """The cells of an h5ad file: an obsm of two columns, or principal components of its embedding.

    Raises
    ------
    SourceError
        When the file has no embedding, or no such layout.
    """
    x, labels = read_cells(path, layout or KEY, None)
    title = path.rstrip("/").rpartition("/")[2]
    if layout is not None:
        at = np.asarray(x, np.float64)
        return Cloud(title=title, at=at, axes=(f"{layout} 1", f"{layout} 2"), labels=labels)
    return of_vectors(title, x, labels)


def of_vectors(title: str, vectors: NDArray[Any], labels: Mapping[str, NDArray[Any]]) -> Cloud:
    """The first two principal components of embeddings."""
    at, share = first_two_components(vectors)
    axes = f"PC 1 ({share[0]:.0%} of the variance)", f"PC 2 ({share[1]:.0%})"
    return Cloud(title=title, at=at, axes=axes, labels=labels)


def cloud_figure(cloud: Cloud, name: str) -> Figure:
    """The cells, or MOST_CELLS of them drawn by hash, with buttons for the categories."""
    n = len(cloud.at)
    shown = np.sort(seeds.permutation(seeds.key(0, "report"), n)[:MOST_CELLS])
    at = cloud.at[shown]
    labels = {k: _named(v) for k, v in cloud.labels.items()}
    # The labels that tell cells apart best come first: those of more categories than one, and not of
    # one for each cell.
    usable = {k: v for k, v in labels.items() if 1 < len(np.unique(v)) <= max(n // 3, 2)}
    choices: dict[str, list[Row]] = {}
    counts: dict[str, list[Row]] = {}
    for label, of_all in list(usable.items())[:MOST_LABELS] or [("all cells", np.full(n, "cell"))]:
        names, sizes = np.unique(of_all, return_counts=True)
        order = np.lexsort((names, -sizes))
        own = [str(names[i]) for i in order[:MOST_CATEGORIES]]
        rest = counted(len(order) - len(own), "others")
        rank = {c: i for i, c in enumerate(own)}
        kind = [c if c in rank else rest for c in of_all[shown].tolist()]
        rows = [(float(x), float(y), c) for (x, y), c in zip(at.tolist(), kind, strict=True)]
        choices[label] = sorted(rows, key=lambda row: rank.get(row[2], len(rank)))
        counts[label] = [(str(names[i]), int(sizes[i])) for i in order]
    x, y = (
        {"field": f, "type": "quantitative", "title": t, "axis": {"labels": False, "ticks": False},
         "scale": {"zero": False}}
        for f, t in zip(("x", "y"), cloud.axes, strict=True)
    )  # fmt: skip
    part = "" if n <= MOST_CELLS else f" ({MOST_CELLS:,} of them, drawn at random, are shown)"
    return Figure(
        name=name,
        title=f"Embedding: {cloud.title}",
        about=f"{counted(n, 'cells')}{part}. Cells that the model takes for alike lie close together. "
        "The buttons hide and show categories.",
        spec={
            "height": 420,
            "mark": {"type": "point", "filled": True, "size": 30, "opacity": 0.75, "aria": False,
                     "tooltip": True},
            "encoding": {
                "x": x,
                "y": y,
                "color": {"field": "category", "type": "nominal", "sort": None, "legend": None},
                "tooltip": [{"field": "category", "type": "nominal"}],
            },
        },
        columns=columns(x="number", y="number", category="text"),
        choices=choices,
        choose="Colour by",
        legend="category",
        is_wide=True,
        told=(columns(category="text", cells="number"), counts),
    )  # fmt: skip


def _named(values: NDArray[Any]) -> NDArray[Any]:
    """Texts as they are; of numbers the range that each is in, or the number where there are few."""
    if values.dtype.kind != "f":
        return values
    there = values[np.isfinite(values)]
    known = np.unique(there)
    if len(known) <= MOST_CATEGORIES:
        return np.array([f"{v:g}" if np.isfinite(v) else "missing" for v in values])
    edges = np.unique(np.quantile(there, np.arange(1, _PARTS) / _PARTS))
    bounds = [known[0], *edges, known[-1]]
    names = [f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(bounds)]
    at = np.searchsorted(edges, values, side="left")
    return np.array(
        [names[i] if np.isfinite(v) else "missing" for i, v in zip(at, values, strict=True)]
    )

"""Runs as a picture: their curves with the baselines, and embeddings in two dimensions.

Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError
from scshards.base.pictures import STYLE, pyplot, save
from scshards.base.text import did_you_mean
from scshards.report.curves import Curves, draw, legend, panels, read_runs

KEY = "X_scshards"
PALETTE = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#bcbd22", "#17becf", "#1b3a6b"),
)
"""For the largest categories; the smaller ones share grey."""


def plot(
    folders: str | Sequence[str],
    output: str | None = None,
    *,
    embeddings: Sequence[str] = (),
    colors: Sequence[str] = (),
    layout: str | None = None,
) -> Path:
    """Draw the curves of one or more runs, and one panel for each embedding; returns the picture.

    Parameters
    ----------
    folders
        What `scshards train -o` wrote; with evaluation.json, the baselines are drawn too.
    output
        The picture; its suffix names the format. None: curves.png in the folder of the only run.
    embeddings
        h5ad files with `obsm["X_scshards"]`.
    colors
        The obs column of each embedding, one for all, or none.
    layout
        The obsm of the files that says where cells are, of two columns, such as a UMAP of the embedding;
        None: the first two principal components of the embedding.

    Raises
    ------
    ConfigError
        When matplotlib is not installed, a folder is no run or has no metrics yet, colours and
        files do not pair, or there is no output for several runs.
    SourceError
        When a file lacks the embedding, the layout or the column.
    """
    plt = pyplot()
    folders = [folders] if isinstance(folders, str) else list(folders)
    if output is None and len(folders) > 1:
        raise ConfigError("several runs in one picture need a name for it", advice="give one: -o")
    if len(colors) not in (0, 1, len(embeddings)):
        raise ConfigError(
            f"{len(colors)} --color for {len(embeddings)} --embedding",
            advice="give one --color for each --embedding, one for all, or none",
        )
    per_panel = list(colors) if len(colors) == len(embeddings) else [*colors] * len(embeddings)
    runs = read_runs(folders)
    path = Path(output) if output is not None else Path(folders[0]) / "curves.png"
    with plt.rc_context(STYLE):
        _draw(plt, runs, embeddings, per_panel, layout, str(path))
    return path


def _draw(
    plt: Any,
    runs: list[Curves],
    embeddings: Sequence[str],
    colors: Sequence[str],
    layout: str | None,
    output: str,
) -> None:
    """All curves in one grid; or embeddings beside the first curve, large, and the others below."""
    curves = panels(runs)
    top = 1 + len(embeddings) if embeddings else 0
    width = 6.4 * top if top else 4.8 * min(3 if len(curves) <= 12 else 4, len(curves))
    below = curves[1:] if top else curves
    columns = min(round(width / 4.6), len(below))
    rows = -(-len(below) // columns) if below else 0
    heights = ([5.0] if top else []) + ([3.3 * rows] if rows else [])
    names = 0.4 * -(-(len(runs) + 2) // 5) if len(runs) > 1 else 0.0
    figure = plt.figure(figsize=(width, sum(heights) + names), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if top:
        first, *rest = parts[0].subplots(1, top, squeeze=False)[0]
        draw(first, curves[0], runs)
        for i, (ax, path) in enumerate(zip(rest, embeddings, strict=True)):
            _embedding(ax, path, colors[i] if colors else None, layout)
    if rows:
        grid = parts[-1].subplots(rows, columns, squeeze=False).ravel()
        for ax, panel in zip(grid, below, strict=False):
            draw(ax, panel, runs)
        for ax in grid[len(below) :]:
            ax.set_axis_off()
    if names:
        legend(figure, runs, plt.Line2D)
    else:
        (run,) = runs
        step = max(m["step"] for m in run.metrics)
        figure.suptitle(f"{run.name} on {run.data}, step {step:,}, {run.day}", x=0.01, ha="left")
    save(figure, output)


def first_two_components(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Each row's first two principal components, float64 [N, 2], and their shares of the variance.

    By the singular values of the D x D scatter matrix, so that any number of cells will do. Signs
    are fixed: the largest loading of a component is positive.
    """
    centred = np.asarray(x, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    axes, variance, _ = np.linalg.svd(centred.T @ centred)
    axes = axes[:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return centred @ axes, variance[:2] / max(variance.sum(), 1e-300)


def _embedding(ax: Any, path: str, column: str | None, layout: str | None) -> None:
    """A file's cells: the first two principal components of their embeddings, or an obsm of the file."""
    x, found = read_cells(path, layout or KEY, [] if column is None else [column])
    labels = None if column is None else found[column]
    if layout is not None:
        xy, axes = x, (f"{layout} 1", f"{layout} 2")
    else:
        xy, share = first_two_components(x)
        axes = f"PC 1 ({100 * share[0]:.0f}% of the variance)", f"PC 2 ({100 * share[1]:.0f}%)"
    size = float(np.clip(6000 / max(len(xy), 1), 2, 26))
    dots: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.85, "rasterized": True}
    if labels is None:
        ax.scatter(*xy.T, color="#08519c", **dots)
    elif labels.dtype.kind == "f":
        points = ax.scatter(*xy.T, c=labels, cmap="viridis", **dots)
        ax.figure.colorbar(points, ax=ax, shrink=0.8).outline.set_visible(False)
    else:
        _categories(ax, xy, labels, dots)
    ax.set(
        xlabel=axes[0],
        ylabel=axes[1],
        title=f"{len(xy):,} cells" + (f" by {column}" if column else ""),
        xticks=[],
        yticks=[],
    )


def _categories(ax: Any, xy: NDArray[Any], labels: NDArray[Any], dots: dict[str, Any]) -> None:
    names, counts = np.unique(labels, return_counts=True)
    names = names[np.argsort(-counts, kind="stable")]
    own, rest = names[: len(PALETTE)], names[len(PALETTE) :]
    if len(rest):
        at = np.isin(labels, rest)
        ax.scatter(*xy[at].T, color="#c8c8c8", label=f"{len(rest)} others", **dots)
    of = dict(zip(names.tolist(), np.sort(counts)[::-1].tolist(), strict=True))
    for color, name in zip(PALETTE, own.tolist(), strict=False):
        label = f"{_short(name)} ({of[name]:,})"
        ax.scatter(*xy[labels == name].T, color=color, label=label, **dots)
    handles, texts = ax.get_legend_handles_labels()
    if len(rest):
        handles, texts = handles[1:] + handles[:1], texts[1:] + texts[:1]
    legend = ax.legend(
        handles,
        texts,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        handletextpad=0.2,
        fontsize=10,
    )
    for handle in legend.legend_handles:
        handle.set_sizes([45])
        handle.set_alpha(1)


def read_cells(
    path: str, key: str, columns: Sequence[str] | None
) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """An obsm of an h5ad, and columns of its obs: float64 where they hold numbers, else strings.

    Parameters
    ----------
    columns
        Which ones; None: all.

    Raises
    ------
    SourceError
        When the file can't be read, or lacks one of them.
    """
    import anndata
    import pandas as pd

    try:
        data = anndata.read_h5ad(path, backed="r")
    except OSError:
        raise SourceError("no h5ad file can be read here", where=path) from None
    try:
        if key not in data.obsm:
            advice = did_you_mean(key, map(str, data.obsm))
            raise SourceError(
                f"the file has no obsm[{key!r}]",
                where=path,
                advice="make it with `scshards embed`" if key == KEY else advice,
            )
        x = np.asarray(data.obsm[key])
        if key != KEY and (x.ndim != 2 or x.shape[1] != 2):
            raise SourceError(
                f"obsm[{key!r}] has the shape {x.shape}, and a layout has two columns", where=path
            )
        found: dict[str, NDArray[Any]] = {}
        for column in map(str, data.obs.columns) if columns is None else columns:
            if column not in data.obs:
                raise SourceError(
                    f"there is no obs column {column!r}",
                    where=path,
                    advice=did_you_mean(column, map(str, data.obs.columns)),
                )
            values = data.obs[column]
            if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
                found[column] = values.to_numpy(dtype=np.float64, na_value=np.nan)
            else:
                texts = values.astype(str).to_numpy(dtype=str)
                found[column] = np.where(values.isna().to_numpy(), "missing", texts)
        return x, found
    finally:
        data.file.close()


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"

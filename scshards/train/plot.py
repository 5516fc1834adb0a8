"""A run as a picture: the loss curve with its baselines, and embeddings in two dimensions.

Needs matplotlib (the extra `plot`). Called by `scshards plot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError, SourceError
from scshards.base.pictures import GRID, STYLE, pyplot, save
from scshards.train.folder import RunFolder
from scshards.train.metrics import read_metrics

KEY = "X_scshards"
PALETTE = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#bcbd22", "#17becf", "#1b3a6b"),
)
"""For the largest categories; the smaller ones share grey."""


def plot(
    folder: str,
    output: str,
    *,
    embeddings: Sequence[str] = (),
    colors: Sequence[str] = (),
) -> Path:
    """Draw a run's loss curve, and one panel for each embedding; returns the picture's path.

    Parameters
    ----------
    folder
        What `scshards train -o` wrote; with evaluation.json, the baselines are drawn too.
    output
        The picture; its suffix names the format.
    embeddings
        h5ad files with `obsm["X_scshards"]`.
    colors
        The obs column of each embedding, one for all, or none.

    Raises
    ------
    ConfigError
        When matplotlib is not installed, the folder is no run, or colours and files do not pair.
    SourceError
        When a file lacks the embedding or the column.
    """
    plt = pyplot()
    run = RunFolder(folder)
    run.config()  # refuses a folder that is no run
    if len(colors) not in (0, 1, len(embeddings)):
        raise ConfigError(
            f"{len(colors)} --color for {len(embeddings)} --embedding",
            advice="give one --color for each --embedding, one for all, or none",
        )
    per_panel = list(colors) if len(colors) == len(embeddings) else [*colors] * len(embeddings)
    metrics = read_metrics(run.metrics)
    if not metrics:
        raise ConfigError("the run has no metrics yet", where=run.metrics)
    baselines = run.read("evaluation.json") if run.evaluation.exists() else {}

    n = 1 + len(embeddings)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, n, figsize=(6.4 * n, 5.0), layout="constrained", squeeze=False
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        _loss(axes[0][0], metrics, baselines)
        for i, path in enumerate(embeddings):
            _embedding(axes[0][1 + i], path, per_panel[i] if per_panel else None)
        save(figure, output)
    return Path(output)


def principal_components(x: NDArray[Any], n: int = 2) -> tuple[NDArray[Any], NDArray[Any]]:
    """Each row's first `n` principal components, float64 [N, n], and their shares of the variance.

    By the singular values of the D x D scatter matrix, so that any number of cells will do. Signs
    are fixed: the largest loading of a component is positive.
    """
    centred = np.asarray(x, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    axes, variance, _ = np.linalg.svd(centred.T @ centred)
    axes = axes[:, :n]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return centred @ axes, variance[:n] / max(variance.sum(), 1e-300)


def _loss(ax: Any, metrics: list[dict[str, Any]], baselines: dict[str, Any]) -> None:
    """Training and validation error over the steps; the baselines as dashed lines."""
    train, valid = (
        [(m["step"], m["masked_mse"]) for m in metrics if m["kind"] == kind and m["masked_mse"]]
        for kind in ("train", "valid")
    )
    ax.plot(*_columns(train), color="#7fb3d5", lw=1.6, label="training cells")
    best = f" (best {min(mse for _, mse in valid):.1f})" if valid else ""
    ax.plot(
        *_columns(valid), color="#08519c", lw=2.2, marker="o", ms=4.5, label="held-out cells" + best
    )
    levels = []
    for key, label, color in (
        ("gene_mean", "each gene's mean", "#d95f0e"),
        ("cell_mean", "each cell's mean", "#8c6bb1"),
    ):
        if key in baselines:
            levels.append(baselines[key])
            label = f"{label} ({baselines[key]:.1f})"
            ax.axhline(baselines[key], color=color, lw=1.6, ls="--", label=label)
    # A fresh model's first losses are many times the rest and would flatten it: they leave the top.
    shown = [mse for _, mse in train[len(train) // 10 :] + valid] + levels
    if shown:
        low, high = min(shown), max(shown)
        room = max(high - low, 0.02 * high)
        ax.set_ylim(max(0.0, low - 0.1 * room), high + 0.1 * room)
    ax.set(xlabel="step", ylabel="mean squared error", title="Masked values")
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    if ax.lines:
        ax.legend(loc="upper right")


def _embedding(ax: Any, path: str, column: str | None) -> None:
    """The first two principal components of a file's cell embeddings."""
    x, labels = _read(path, column)
    xy, share = principal_components(x)
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
        xlabel=f"PC 1 ({100 * share[0]:.0f}% of the variance)",
        ylabel=f"PC 2 ({100 * share[1]:.0f}%)",
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
    for color, name in zip(PALETTE, own, strict=False):
        ax.scatter(*xy[labels == name].T, color=color, label=_short(name), **dots)
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


def _read(path: str, column: str | None) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The embeddings of an h5ad, and a column: float64 when it holds numbers, else strings."""
    import anndata
    import pandas as pd

    try:
        data = anndata.read_h5ad(path, backed="r")
    except OSError:
        raise SourceError("no h5ad file can be read here", where=path) from None
    try:
        if KEY not in data.obsm:
            raise SourceError(
                f"the file has no obsm[{KEY!r}]",
                where=path,
                advice="make it with `scshards embed`",
            )
        x = np.asarray(data.obsm[KEY])
        if column is None:
            return x, None
        if column not in data.obs:
            raise SourceError(
                f"there is no obs column {column!r}",
                where=path,
                advice=did_you_mean(column, map(str, data.obs.columns)),
            )
        values = data.obs[column]
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            return x, values.to_numpy(dtype=np.float64)
        missing = values.isna().to_numpy()
        return x, np.where(missing, "missing", values.astype(str).to_numpy(dtype=str))
    finally:
        data.file.close()


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [mse for _, mse in points]


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"

"""How batches mix, as a picture: entropies and shares along the epoch. Called by `scshards mix`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scshards.base.pictures import GRID, STYLE, pyplot, save
from scshards.report.mixing import Drift, Mixed, MixReport

_WINDOWS = {1: "#08519c", 10: "#d95f0e", 100: "#31a354", 1000: "#8c6bb1"}
_STRATA = 8
"""Strata that are drawn, at most: the largest ones."""


def plot(report: MixReport, output: str) -> Path:
    """Draw a panel for each column, and one for the shares of strata; returns the picture's path.

    Raises
    ------
    ConfigError
        When matplotlib is not installed.
    StorageError
        When the picture can't be written.
    """
    plt = pyplot()
    by_column: dict[str, list[Mixed]] = {}
    for mixed in report.columns:
        by_column.setdefault(mixed.column, []).append(mixed)
    with plt.rc_context(STYLE):
        n = len(by_column) + bool(report.drift)
        figure, axes = plt.subplots(
            n, 1, figsize=(8.0, 2.9 * n), layout="constrained", squeeze=False, sharex=True
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        for ax, (column, windows) in zip(axes[:, 0], by_column.items(), strict=False):
            _entropies(ax, column, windows, report.steps)
        if report.drift:
            _shares(axes[-1][0], report.drift)
        axes[-1][0].set_xlabel("% of the epoch")
        save(figure, output)
    return Path(output)


def _entropies(ax: Any, column: str, windows: list[Mixed], steps: int) -> None:
    for mixed in windows:
        score = mixed.score
        if score is None:
            continue
        name = "batches" if mixed.window == 1 else f"{mixed.window:,} in a row"
        ax.plot(
            100 * (mixed.steps + mixed.window / 2) / steps,
            100 * mixed.entropies / mixed.ideal,
            ls="",
            marker="o",
            ms=3.5 if mixed.window == 1 else 5,
            color=_WINDOWS[mixed.window],
            alpha=0.6,
            label=f"{name} ({mixed.cells:,} cells): {100 * score:.0f}%",
        )
    ax.axhline(100, color="#444444", lw=1.2, ls="--")
    ax.set(xlim=(0, 100), ylim=(0, None), ylabel="% of random", title=f"{column}: entropy")
    _finish(ax)


def _shares(ax: Any, drift: tuple[Drift, ...]) -> None:
    for each in sorted(drift, key=lambda d: -d.share)[:_STRATA]:
        at = 100 * (np.arange(len(each.shares)) + 0.5) / len(each.shares)
        ax.plot(at, 100 * each.shares, lw=1.6, label=f"{each.stratum} ({100 * each.share:.1f}%)")
    ax.set(xlim=(0, 100), ylim=(0, None), ylabel="% of the cells", title="shares along the epoch")
    _finish(ax)


def _finish(ax: Any) -> None:
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

"""How batches mix, as a picture: each column's entropy along the epoch. Called by `scshards mix`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scshards.base.pictures import GRID, STYLE, pyplot, save
from scshards.report.mixing import Mixed, MixReport

_BATCH, _IDEAL, _WHOLE = "#08519c", "#d95f0e", "#8c6bb1"


def plot(report: MixReport, output: str) -> Path:
    """Draw one panel for each column and batch size; returns the picture's path.

    Raises
    ------
    ConfigError
        When matplotlib is not installed.
    StorageError
        When the picture can't be written.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        n = len(report.columns)
        figure, axes = plt.subplots(
            n, 1, figsize=(8.0, 2.9 * n), layout="constrained", squeeze=False, sharex=True
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        for ax, mixed in zip(axes[:, 0], report.columns, strict=True):
            _panel(ax, mixed, report.steps)
        axes[-1][0].set_xlabel("% of the epoch")
        save(figure, output)
    return Path(output)


def _panel(ax: Any, mixed: Mixed, steps: int) -> None:
    at = 100 * (mixed.steps + 0.5) / steps
    ax.plot(at, mixed.batches, ls="", marker="o", ms=3.5, color=_BATCH, alpha=0.6, label="batches")
    for level, color, style, label in (
        (mixed.ideal, _IDEAL, "-", f"drawn at random ({mixed.ideal:.2f})"),
        (mixed.whole, _WHOLE, "--", f"the whole epoch ({mixed.whole:.2f})"),
    ):
        ax.axhline(level, color=color, lw=1.6, ls=style, label=label)
    ax.set(
        xlim=(0, 100),
        ylim=(min(0.0, mixed.batches.min()), 1.08 * max(mixed.whole, mixed.batches.max(), 0.1)),
        ylabel="entropy, bits",
        title=f"{mixed.column}: batches of {mixed.cells:,} (mean {mixed.mean:.2f})",
    )
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

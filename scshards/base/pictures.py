"""What all pictures share: matplotlib where it is installed, and one look.

Called by report.plot and report.mixing_plot.
"""

from __future__ import annotations

from typing import Any

from scshards.base.errors import ConfigError, StorageError

INK, SOFT, GRID = "#222222", "#777777", "#e6e6e6"
"""Text, axes and what explains them, lines behind the data."""

STYLE = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "text.color": INK,
    "legend.frameon": False,
}
"""For `pyplot().rc_context`."""


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; ConfigError when it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "matplotlib is not installed", advice="pip install 'scshards[plot]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, output: str) -> None:
    """Write a figure and forget it; StorageError when it can't be written."""
    try:
        figure.savefig(output, dpi=150, facecolor="white")
    except (OSError, ValueError) as e:
        raise StorageError(f"the picture can't be written: {e}", where=output) from None
    finally:
        pyplot().close(figure)

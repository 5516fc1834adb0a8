"""The curves of runs, off their metrics.jsonl: losses, learning rate, gradient, throughput, validation.

Every loss term that a run has gets a panel of its own, whatever its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.pictures import GRID, SOFT
from scshards.training.log.metrics import MEASURED, TERMS, read_metrics
from scshards.training.save.folder import RunFolder

COLORS = (
    *("#08519c", "#d95f0e", "#31a354", "#c51b8a", "#756bb1"),
    *("#636363", "#17becf", "#bcbd22", "#8c564b", "#e377c2"),
)
"""One for each run, in turn."""

SET_MARKERS = "sD^vPX"
"""One for each held-out set of a run, in turn."""

SMOOTHED_FROM = 120
"""Points of a curve from which on its running median is drawn over it."""

FIGURES = {
    "accuracy": "Accuracy of classes",
    "macro_f1": "F1 of classes, their mean",
    "avg_bio": "avg_bio: mean of NMI, ARI, ASW",
    "nmi": "NMI of clusters and classes",
    "ari": "ARI of clusters and classes",
    "asw": "ASW of classes",
    "asw_domain": "Domains mixed (1 - ASW)",
    "knn_accuracy": "Accuracy of a kNN probe",
    "knn_macro_f1": "F1 of a kNN probe",
    "linear_accuracy": "Accuracy of a linear probe",
    "linear_macro_f1": "F1 of a linear probe",
}
"""Titles of what else an evaluation says."""

COUNTS = ("n_", "metric_", "probe_")
"""How fields begin that are no figures."""

BESIDE = "pca_"
"""A field of this prefix is a level to compare the field without it with."""

BASELINES = (
    ("gene_mean", "each gene's mean", "#d95f0e", "--"),
    ("cell_mean", "each cell's mean", "#8c6bb1", ":"),
)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What one run wrote.

    Attributes
    ----------
    name
        What the legend calls it.
    data
        The name of its shard set.
    day
        When its last line was written.
    metrics
        The lines of its metrics.jsonl.
    baselines
        Its evaluation.json, or {}.
    """

    name: str
    data: str
    day: str
    metrics: list[dict[str, Any]]
    baselines: dict[str, Any]

    @property
    def best_step(self) -> int | None:
        """Where its best model is from, as far as evaluations say."""
        best = [m["step"] for m in self.metrics if m["kind"] == "valid" and m.get("is_best")]
        return best[-1] if best else None

    def points(self, kind: str, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Steps and values of a field, where it is a number."""
        found = [
            (m["step"], m[key])
            for m in self.metrics
            if m["kind"] == kind and isinstance(m.get(key), int | float)
        ]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes: a field of the train lines, of the valid lines, or of both.

    Attributes
    ----------
    key, title, unit
        The field, and the words over it and beside it.
    scale
        What values are multiplied by.
    is_loss
        A loss falls from a height that would flatten the rest: its beginning leaves the top.
    may_be_log
        Whether a logarithmic axis is taken when values spread far.
    is_exact
        Whether there is no noise that a running median would take out.
    top
        The axis reaches up to here at least.
    """

    key: str
    title: str
    unit: str
    scale: float = 1.0
    is_loss: bool = False
    may_be_log: bool = False
    is_exact: bool = False
    top: float = 0.0


def read_runs(folders: Sequence[str]) -> list[Curves]:
    """The runs in these folders, named by as much of their paths as tells them apart.

    Raises
    ------
    ConfigError
        When a folder is no run, or has no metrics yet.
    """
    paths = [Path(f).resolve() for f in folders]
    depth = 1
    while len({p.parts[-depth:] for p in paths}) < len(set(paths)):
        depth += 1
    out = []
    for folder, path in zip(folders, paths, strict=True):
        run = RunFolder(folder)
        run.config()  # refuses a folder that is no run
        metrics = read_metrics(run.metrics)
        if not metrics:
            raise ConfigError("the run has no metrics yet", where=run.metrics)
        out.append(
            Curves(
                name="/".join(path.parts[-depth:]),
                data=run.root().rstrip("/").rpartition("/")[2],
                day=date.fromtimestamp(run.metrics.stat().st_mtime).isoformat(),
                metrics=metrics,
                baselines=run.evaluation(),
            )
        )
    return out


def panels(runs: Sequence[Curves]) -> list[Panel]:
    """What there is to draw of these runs: the loss that chooses the best model comes first."""
    train = _fields(runs, "train")
    # What is of a set, NAME/field, is drawn beside what is of the split valid.
    valid = list(dict.fromkeys(key.rpartition("/")[2] for key in _fields(runs, "valid")))
    terms = [k for k in train if k not in MEASURED]
    terms += [k for k in valid if k in TERMS and k not in terms]
    words = {key: TERMS.get(key, (key.replace("_", " "), "loss")) for key in terms}
    found = [
        Panel(key=key, title=title, unit=unit, is_loss=True) for key, (title, unit) in words.items()
    ]
    if len(terms) > 1 and "loss" in train:
        found.append(Panel(key="loss", title="All losses, weighted", unit="loss", is_loss=True))
    for key in valid:
        if key not in terms and not key.startswith((*COUNTS, BESIDE)):
            title = FIGURES.get(key, key.replace("_", " "))
            found.append(Panel(key=key, title=title, unit="held-out cells"))
    rest = (
        Panel(key="lr", title="Learning rate", unit="", is_exact=True),
        Panel(key="grad_norm", title="Gradient norm", unit="before clipping", may_be_log=True),
        Panel(key="cells_per_s", title="Throughput", unit="cells/s"),
        Panel(key="tokens_per_s", title="Tokens", unit="thousand/s", scale=1e-3),
        Panel(key="mfu", title="Model FLOP/s utilization", unit="% of the peak", scale=100),
        Panel(key="data_wait", title="Waiting for data", unit="% of the time", scale=100, top=2),
        Panel(key="memory_bytes", title="Memory", unit="GB", scale=1e-9),
    )
    return found + [p for p in rest if p.key in train]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where to where an axis goes; None: as far as the values do."""

    low: float | None = None
    high: float | None = None
    is_log: bool = False


def limits(panel: Panel, shown: Sequence[NDArray[Any]]) -> Limits | None:
    """The axis of a panel with these values, so that few high ones do not flatten the rest.

    None where no value is finite.
    """
    values = np.concatenate([np.zeros(0), *shown])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if panel.is_loss:
        high = max(float(np.quantile(values, 0.98)), *(float(v[-1]) for v in shown if len(v)))
        room = max(high - low, 0.02 * abs(high))
        bottom = low - 0.1 * room
        return Limits(low=max(0.0, bottom) if low >= 0 else bottom, high=high + 0.1 * room)
    if panel.may_be_log and low > 0 and high > 30 * low:
        return Limits(is_log=True)
    if low >= 0:
        return Limits(low=0.0, high=max(1.12 * high, panel.top) or 1.0)
    return Limits()


def legend(figure: Any, runs: Sequence[Curves], line: Any) -> None:
    """Says over all panels which colour is which run; `line` is matplotlib's Line2D."""
    handles = [line([], [], color=c, lw=2.5) for c in _colors(runs)]
    handles.append(line([], [], color=SOFT, lw=1.1))
    handles.append(line([], [], color=SOFT, lw=2.2, marker="o", ms=4.0))
    names = [*(r.name for r in runs), "training cells", "held-out cells"]
    figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 5))


def draw(ax: Any, panel: Panel, runs: Sequence[Curves]) -> None:
    """A panel: training as a line, held-out cells as a stronger one with dots."""
    alone = len(runs) == 1
    shown: list[NDArray[Any]] = []
    for run, strong in zip(runs, _colors(runs), strict=True):
        steps, values = run.points("train", panel.key)
        held_steps, held = run.points("valid", panel.key)
        both = len(held) > 0 and len(values) > 0
        if len(values):
            color = "#7fb3d5" if alone and both else strong
            label = "training cells" if alone and both else None
            style = {"color": color, "lw": 1.7 if alone or not both else 1.1, "label": label}
            _line(ax, steps, values * panel.scale, style, smooth=not panel.is_exact)
            shown.append(values[len(values) // 10 :] * panel.scale)
        if len(held):
            best = f" (best {_short(held.min() * panel.scale)})" if panel.is_loss else ""
            label = f"held-out cells{best}" if alone else None
            ax.plot(
                *(held_steps, held * panel.scale),
                **{"color": strong, "lw": 2.2, "marker": "o", "ms": 4.0, "label": label},
            )
            # The first of several is that of a fresh model, which would flatten the rest.
            shown.append((held[1:] if len(held) > 2 else held) * panel.scale)
            if run.best_step is not None:
                label = f"best model (step {run.best_step:,})" if alone else None
                ax.axvline(
                    run.best_step, color=SOFT if alone else strong, ls=":", lw=1.4, label=label
                )
        for i, key in enumerate(k for k in _fields([run], "valid") if k.endswith(f"/{panel.key}")):
            set_steps, found = run.points("valid", key)
            name = key.removesuffix(f"/{panel.key}")
            style = {
                "color": strong,
                "lw": 1.6,
                "ls": "--",
                "marker": SET_MARKERS[i % len(SET_MARKERS)],
            }
            label = name if alone else f"{run.name}: {name}"
            ax.plot(set_steps, found * panel.scale, ms=4.0, label=label, **style)
            shown.append(found * panel.scale)
        _, beside = run.points("valid", BESIDE + panel.key)
        if len(beside):
            style = {"color": "#d95f0e" if alone else strong, "lw": 1.6, "ls": "--"}
            ax.axhline(beside[-1], label=f"PCA ({_short(beside[-1])})" if alone else None, **style)
            shown.append(beside[-1:])
    if panel.key == "masked_mse":
        shown += _baselines(ax, runs)
    _limits(ax, panel, shown)
    ax.set(xlabel="step", ylabel=panel.unit, title=panel.title)
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(loc="upper right" if panel.is_loss else "best", fontsize=9.5)


def _fields(runs: Sequence[Curves], kind: str) -> list[str]:
    """The fields that have a number in some line, in their order in the file."""
    lines: Iterable[dict[str, Any]] = (m for r in runs for m in r.metrics if m["kind"] == kind)
    names = {
        k: None
        for m in lines
        for k, v in m.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }
    return [k for k in names if k not in ("step", "epoch")]


def _line(
    ax: Any, x: NDArray[Any], y: NDArray[Any], style: dict[str, Any], *, smooth: bool
) -> None:
    """A curve; a long one that is noisy is faint, with its running median over it."""
    if not smooth or len(y) < SMOOTHED_FROM:
        ax.plot(x, y, **style)
        return
    ax.plot(x, y, color=style["color"], lw=0.7, alpha=0.3)
    half = max(2, len(y) // 80)
    middle = [np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
    ax.plot(x, middle, **style)


def _baselines(ax: Any, runs: Sequence[Curves]) -> list[NDArray[Any]]:
    """Dashed lines, of runs that were all evaluated on the same cells."""
    levels = []
    for key, label, color, dashes in BASELINES:
        found = {r.baselines[key] for r in runs if key in r.baselines}
        if len(found) == 1:
            (level,) = found
            label = f"{label} ({_short(level)})"
            color = color if len(runs) == 1 else SOFT
            ax.axhline(level, color=color, lw=1.6, ls=dashes, label=label)
            levels.append(np.array([level]))
    return levels


def _limits(ax: Any, panel: Panel, shown: list[NDArray[Any]]) -> None:
    bounds = limits(panel, shown)
    if bounds is None:
        return
    if bounds.is_log:
        ax.set_yscale("log")
    elif bounds.low is not None:
        ax.set_ylim(bounds.low, bounds.high)
    if panel.is_exact:
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _colors(runs: Sequence[Curves]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]

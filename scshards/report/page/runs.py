"""Sections of runs: what they are, verdicts beside baselines, curves beside each other, embeddings.

read_runs (report.curves) -> run_sections -> the page
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.progress import Table, counted
from scshards.evaluation.verdict import Annotation, Evaluation, read_verdict
from scshards.report.curves import BASELINES, BESIDE, Curves, Panel, limits, panels
from scshards.report.page.clouds import Cloud, cloud_figure
from scshards.report.page.figures import (
    DOTTED,
    LEVEL,
    THIN,
    Axis,
    Figure,
    Row,
    columns,
    curves,
    heat,
    lines,
)
from scshards.report.page.html import Html, Section, Warned, heading, para, table, terminal_table
from scshards.training.config import TrainConfig, differences
from scshards.training.save.folder import RunFolder

MOST_POINTS = 250
"""Points of a curve; of longer ones each is the median of a stretch."""

TRAINED, HELD_OUT = "training cells", "held-out cells"

MOST_CLASSES = 25
"""Classes of a confusion matrix: the most frequent ones."""


def run_sections(
    folders: Sequence[str], runs: Sequence[Curves], clouds: Sequence[Cloud]
) -> list[Section]:
    """What runs and embeddings are told by; none where there are none."""
    out = []
    if runs:
        out += [_verdicts(folders, runs), _curve_section(runs), _settings(folders, runs)]
    if clouds:
        figures = [cloud_figure(cloud, f"embedding-{i + 1}") for i, cloud in enumerate(clouds)]
        out.append(Section(name="embeddings", title="Embeddings", parts=figures))
    return out


def run_warnings(folders: Sequence[str], runs: Sequence[Curves]) -> Iterator[Warned]:
    """What is amiss with runs."""
    for folder, run in zip(folders, runs, strict=True):
        found = read_verdict(run.baselines)
        if found is None:
            yield Warned(
                what=f"{run.name} was not compared with the baselines",
                to_do=f"scshards evaluate {folder} ROOT",
            )
        elif isinstance(found, Evaluation) and found.margin <= 0:
            yield Warned(
                what=f"{run.name} predicts no better than means, which need no model",
                to_do="train longer, or look at its curves: a loss that still falls wants more steps",
            )
        elif isinstance(found, Annotation) and found.accuracy <= found.majority_accuracy:
            yield Warned(
                what=f"{run.name} is no better than always saying {found.majority}",
                to_do="train longer, or look at the balance of classes",
            )


def run_facts(runs: Sequence[Curves]) -> list[dict[str, Any]]:
    """The numbers of runs that stand in text, ready for JSON."""
    return [{"name": r.name, "evaluation": r.baselines, **_figures(r)} for r in runs]


def _figures(run: Curves) -> dict[str, Any]:
    """A run in a few figures; rates are medians over its log lines."""
    train = [m for m in run.metrics if m["kind"] == "train"]

    def median(key: str) -> float | None:
        _, values = run.points("train", key)
        return float(np.median(values)) if len(values) else None

    slowest, fastest = (run.points("train", f"{s}_step_s")[1] for s in ("slowest", "fastest"))
    return {
        "step": max(m["step"] for m in run.metrics),
        "epochs": train[-1].get("epoch") if train else None,
        "best_step": run.best_step,
        "cells_per_s": median("cells_per_s"),
        "data_wait": median("data_wait"),
        "memory_bytes": median("memory_bytes"),
        "rank_spread": float(np.median(slowest / fastest) - 1) if len(slowest) else None,
    }


def _verdicts(folders: Sequence[str], runs: Sequence[Curves]) -> Section:
    rows = []
    for run in runs:
        f = _figures(run)
        rows.append(
            (run.name, run.data, run.day, f["step"], f["epochs"], f["best_step"], f["cells_per_s"],
             f["data_wait"], f["memory_bytes"], f["rank_spread"])
        )  # fmt: skip
    header = ("run", "data", "day", "step", "epochs", "best model at", "cells/s", "waiting for data",
              "memory", "slowest rank is slower by")  # fmt: skip
    kinds = (
        "text",
        "text",
        "text",
        "number",
        "number",
        "number",
        "number",
        "percent",
        "size",
        "percent",
    )
    parts: list[Html | Figure] = [table(header, rows, kinds, label="Runs")]
    for i, (folder, run) in enumerate(zip(folders, runs, strict=True)):
        parts.append(heading(run.name))
        found = read_verdict(run.baselines)
        if found is None:
            parts.append(para(f"Not evaluated yet: scshards evaluate {folder} ROOT"))
            continue
        *others, verdict = found.text()
        assert isinstance(verdict, str)
        parts.append(para(verdict[0].upper() + verdict[1:], kind="fine" if _is_good(found) else ""))
        parts += [
            terminal_table(p, label=f"Scores of {run.name}") if isinstance(p, Table) else para(p)
            for p in others
        ]
        if isinstance(found, Annotation):
            parts.append(_confusion(run, found, i))
    scores = _scores(runs)
    if scores is not None:
        parts.append(scores)
    return Section(name="runs", title="Runs and what they are worth", parts=parts)


def _is_good(found: Evaluation | Annotation) -> bool:
    if isinstance(found, Evaluation):
        return found.margin > 0
    return found.accuracy > found.majority_accuracy


def _confusion(run: Curves, found: Annotation, number: int) -> Figure:
    """Shares of each class's cells; the most frequent classes."""
    counts, names = found.confusion.counts, found.confusion.names
    cells = counts.sum(axis=1)
    occurs = cells + counts.sum(axis=0) > 0
    order = [i for i in np.argsort(-cells, kind="stable").tolist() if occurs[i]]
    rows: list[Row] = [
        (names[i], names[j], int(counts[i, j]) / max(int(cells[i]), 1), int(counts[i, j]))
        for i in order[:MOST_CLASSES]
        for j in order[:MOST_CLASSES]
    ]
    return Figure(
        name=f"confusion-{number + 1}",
        title=f"What {run.name} takes classes for",
        about="Rows: the class that a cell has. Columns: the one that is predicted. Shares of the cells "
        "of a row.",
        spec=heat("class", "predicted", Axis(of="share", form=".0%"),
                  tips=("class", "predicted", "cells", "share"), labels=len(order) <= 12, angle=-50),
        columns=columns(**{"class": "text"}, predicted="text", share=("of the class", "percent"),
                        cells="number"),
        choices={"": rows},
        is_wide=True,
    )  # fmt: skip


def _scores(runs: Sequence[Curves]) -> Html | None:
    """The figures of the evaluation that each best model is from, or else of the last one."""
    of_runs = []
    for run in runs:
        valid = [m for m in run.metrics if m["kind"] == "valid"]
        best = [m for m in valid if m["step"] == run.best_step] or valid[-1:]
        of_runs.append({k: v for m in best for k, v in m.items() if _is_number(v)})
    names = [n for n in dict.fromkeys(k for c in of_runs for k in c) if n not in ("step", "epoch")]
    if not names:
        return None
    rows = [(n, *(c.get(n) for c in of_runs)) for n in names]
    title = para("Scores on held-out cells while it was trained, of the best model:")
    listed = table(
        ("score", *(r.name for r in runs)), rows, ("text", *["number"] * len(runs)), label="Scores"
    )
    return Html(title + listed)


def _curve_section(runs: Sequence[Curves]) -> Section:
    figures: list[Html | Figure] = [_panel(p, runs) for p in panels(runs)]
    spread = _spread(runs)
    if spread is not None:
        figures.append(spread)
    return Section(name="curves", title="Curves", parts=figures)


def _panel(panel: Panel, runs: Sequence[Curves]) -> Figure:
    rows: list[Row] = []
    shown: list[NDArray[Any]] = []
    alone = len(runs) == 1
    for run in runs:
        steps, values = run.points("train", panel.key)
        if len(values):
            rows += _points(steps, values * panel.scale, TRAINED if alone else run.name, THIN)
            shown.append(values[len(values) // 10 :] * panel.scale)
        for key in (panel.key, *_set_keys(run, panel.key)):
            steps, values = run.points("valid", key)
            of_set = key.removesuffix(panel.key).removesuffix("/")
            name = of_set or HELD_OUT if alone else ", ".join(filter(None, (run.name, of_set)))
            if len(values):
                rows += _points(steps, values * panel.scale, name, DOTTED)
                shown.append((values[1:] if len(values) > 2 else values) * panel.scale)
        _, beside = run.points("valid", BESIDE + panel.key)
        if len(beside):
            name = "PCA" if alone else f"{run.name}, PCA"
            rows += _level(runs, float(beside[-1]) * panel.scale, name)
            shown.append(beside[-1:] * panel.scale)
    if panel.key == "masked_mse":
        for key, label, *_ in BASELINES:
            levels = {r.baselines[key] for r in runs if key in r.baselines}
            if len(levels) == 1:
                rows += _level(runs, float(*levels), label)
                shown.append(np.array([*levels]))
    bounds = limits(panel, shown)
    y = Axis(of="value", title=panel.unit)
    if bounds is not None and bounds.is_log:
        y = dataclasses.replace(y, log=True)
    elif bounds is not None and bounds.low is not None and bounds.high is not None:
        y = dataclasses.replace(y, domain=(bounds.low, bounds.high))
    # A run has one colour in all panels.
    own = [TRAINED, HELD_OUT] if alone else [r.name for r in runs]
    there = {row[2] for row in rows}
    domain = [n for n in own if n in there or not alone]
    domain += [n for n in dict.fromkeys(row[2] for row in rows) if n not in domain]
    best = [f"{r.name}: step {r.best_step:,}" for r in runs if r.best_step is not None]
    about = f"Best model of {'; of '.join(best)}. " if best and panel.is_loss else ""
    if not alone:
        about += "Thin: training cells. With dots: held-out cells."
    return Figure(
        name="curve-" + "".join(c if c.isalnum() else "-" for c in panel.key),
        title=panel.title,
        about=about or "By step.",
        spec=curves(Axis(of="step", title="step"), y, "line", "kind", domain),
        columns=columns(
            step="number",
            value=(panel.unit or panel.title, "number"),
            line=("of", "text"),
            kind=("cells", "text"),
        ),
        choices={"": rows},
    )


def _spread(runs: Sequence[Curves]) -> Figure | None:
    """How much longer a step of the slowest rank takes, of runs on several."""
    rows: list[Row] = []
    for run in runs:
        steps, slow = run.points("train", "slowest_step_s")
        _, fast = run.points("train", "fastest_step_s")
        if len(slow):
            rows += _points(steps, slow / fast - 1, run.name, THIN)
    if not rows:
        return None
    return Figure(
        name="rank-spread",
        title="Ranks beside each other",
        about="By how much a step of the slowest rank is longer than one of the fastest.",
        spec=lines(
            Axis(of="step", title="step"), Axis(of="value", title="slower by", form="%"), "line"
        ),
        columns=columns(
            step="number", value=("slower by", "percent"), line=("run", "text"), kind=("", "text")
        ),
        choices={"": rows},
    )


def _settings(folders: Sequence[str], runs: Sequence[Curves]) -> Section:
    default = TrainConfig().tables()
    changed = [differences(default, RunFolder(f).config().tables()) for f in folders]
    usual = {k: old for c in changed for k, (old, _) in c.items()}
    keys = sorted(usual)
    rows = [
        (k, _shown(usual[k]), *(_shown(c[k][1] if k in c else usual[k]) for c in changed))
        for k in keys
    ]
    parts: list[Html | Figure] = [
        para(
            f"{counted(len(keys), 'settings')} differ from the default in a run; all others do not."
        ),
        table(
            ("setting", "default", *(r.name for r in runs)),
            rows,
            ("text",) * (2 + len(runs)),
            label="Settings",
        ),
        para("Next: scshards evaluate RUN ROOT, scshards embed RUN FILE.h5ad -o OUT.h5ad."),
    ]
    return Section(name="settings", title="Settings that differ from the default", parts=parts)


def _points(steps: NDArray[Any], values: NDArray[Any], line: str, kind: str) -> list[Row]:
    """The points of a line, or medians of stretches of it."""
    if len(steps) <= MOST_POINTS:
        return [(int(s), float(v), line, kind) for s, v in zip(steps, values, strict=True)]
    parts = zip(
        np.array_split(steps, MOST_POINTS), np.array_split(values, MOST_POINTS), strict=True
    )
    return [(int(np.median(s)), float(np.median(v)), line, kind) for s, v in parts]


def _level(runs: Sequence[Curves], value: float, line: str) -> list[Row]:
    """A line from the first step to the last."""
    return [(s, value, line, LEVEL) for s in (0, max(m["step"] for r in runs for m in r.metrics))]


def _set_keys(run: Curves, key: str) -> list[str]:
    """Fields of held-out sets, NAME/key."""
    every = dict.fromkeys(k for m in run.metrics if m["kind"] == "valid" for k in m)
    return [k for k in every if k.endswith(f"/{key}")]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

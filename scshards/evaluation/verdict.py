"""What is said of a model beside what needs no model: predicted values, and predicted classes.

Called by applying.evaluate, which publishes them as RUN/evaluation.json, and by report.page.runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scshards.base.progress import Table
from scshards.tasks.confusion import Confusion


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model and two baselines on the same hidden values; all errors are mean squared ones.

    Attributes
    ----------
    what
        Which values were predicted: "masked", or "unknown" ones.
    n_masked
        How many.
    figures
        Integration scores, of the task integrate.
    """

    split: str
    n_cells: int
    n_masked: int
    model: float
    mvc: float | None
    gene_mean: float
    cell_mean: float
    what: str = "masked"
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def margin(self) -> float:
        """How far the model is below the better baseline: 0.15 is 15% below it."""
        return 1 - self.model / min(self.gene_mean, self.cell_mean)

    def tables(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return values | values.pop("figures") | {"margin": self.margin}

    def text(self) -> list[str | Table]:
        """The parts of what a person is shown."""
        errors = {"each gene's mean": self.gene_mean, "each cell's mean": self.cell_mean}
        better = min(errors, key=errors.__getitem__)
        parts: list[str | Table] = [
            Table(("prediction", f"{self.what} MSE"), [("model", self.model), *errors.items()]),
            f"{self.n_masked:,} {self.what} values of {self.n_cells:,} {self.split} cells",
        ]
        if self.figures:
            names = [n for n in self.figures if f"pca_{n}" in self.figures]
            both = [(n, *(f"{self.figures[k]:.4f}" for k in (n, f"pca_{n}"))) for n in names]
            parts.append(
                f"integration of {self.figures['metric_cells']:,} {self.split} cells; 1 is best"
            )
            parts.append(Table(("score", "embedding", "PCA"), both))
        side = "better" if self.margin > 0 else "worse" if self.margin < 0 else "no better"
        verdict = (
            f"the model is {side} than {better}: {self.model:.4g} against {errors[better]:.4g}"
        )
        return [*parts, verdict + (f", {100 * self.margin:.1f}% less" if self.margin > 0 else "")]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """How well classes are predicted, beside always saying the most frequent class of the train split.

    Attributes
    ----------
    n_cells
        Cells of classes that the model knows, which is what the rest is about.
    n_without, n_other
        Further cells of the split, which count nothing: without a class, and of classes that the model
        does not know.
    majority, majority_accuracy
        That class, and the share of cells that have it.
    confusion
        The cells by their class and the predicted one.
    """

    split: str
    n_cells: int
    n_without: int
    n_other: int
    class_ce: float
    accuracy: float
    macro_f1: float
    majority: str
    majority_accuracy: float
    confusion: Confusion

    def tables(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | values.pop("confusion").tables()

    def text(self) -> list[str | Table]:
        """The parts of what a person is shown."""
        rows: list[tuple[object, ...]] = [
            (
                "model",
                f"{100 * self.accuracy:.1f}%",
                f"{self.macro_f1:.3f}",
                f"{self.class_ce:.4g}",
            ),
            (f"always {self.majority!r}", f"{100 * self.majority_accuracy:.1f}%", None, None),
        ]
        cells = f"{self.n_cells:,} {self.split} cells with a class"
        if self.n_other:
            cells += f" that the model knows; {self.n_other:,} of other classes are left out"
        if self.n_without:
            cells += f"; {self.n_without:,} more have none"
        side = "better than" if self.accuracy > self.majority_accuracy else "no better than"
        return [
            *self.confusion.text(),
            Table(("prediction", "accuracy", "macro F1", "cross-entropy"), rows),
            cells,
            f"the model is {side} always saying {self.majority!r}: right for "
            f"{100 * self.accuracy:.1f}% of cells against {100 * self.majority_accuracy:.1f}%",
        ]


def read_verdict(tables: Mapping[str, Any]) -> Evaluation | Annotation | None:
    """What `tables` of either has written; None for what is neither, such as that of another version."""
    try:
        if "confusion" in tables:
            named = {f.name for f in dataclasses.fields(Annotation)} - {"confusion"}
            names = tuple(c["name"] for c in tables["classes"])
            counts = np.array(tables["confusion"], np.int64).reshape(len(names), len(names))
            return Annotation(**{n: tables[n] for n in named}, confusion=Confusion(names, counts))
        fields = {f.name for f in dataclasses.fields(Evaluation)} - {"figures"}
        figures = {k: v for k, v in tables.items() if k not in (*fields, "margin")}
        return Evaluation(**{n: tables[n] for n in fields}, figures=figures)
    except (KeyError, TypeError, ValueError):
        return None

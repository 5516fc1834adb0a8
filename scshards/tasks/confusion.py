"""Cells by their class and the one that is predicted: accuracy, F1, and what each class is taken for.

Made of what the task annotate tallies; `scshards evaluate` and `scshards annotate --truth` show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.progress import Table

_ROWS = 30
"""Classes that a table shows; there are more in the JSON."""


@dataclass(frozen=True)
class Confusion:
    """How often which class was predicted for the cells of which.

    Attributes
    ----------
    names
        The classes.
    counts
        int64 [classes, classes]: cells of the class of that row, predicted as that of the column.
    """

    names: tuple[str, ...]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, names: tuple[str, ...], codes: NDArray[Any], predicted: NDArray[Any]) -> Confusion:
        """Of cells by their codes among the names, and the codes that are predicted, int64 [cells]."""
        counts = np.zeros((len(names),) * 2, np.int64)
        np.add.at(counts, (codes, predicted), 1)
        return cls(names, counts)

    @property
    def accuracy(self) -> float:
        """The share of cells whose class is predicted; 0 without cells."""
        return float(self.counts.trace() / max(self.counts.sum(), 1))

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that a cell has or is predicted to have; 0 without one."""
        occurs = self.counts.sum(1) + self.counts.sum(0) > 0
        return float(self._f1()[occurs].mean()) if occurs.any() else 0.0

    def tables(self) -> dict[str, Any]:
        """`classes`, each with its cells, precision, recall and F1, and `confusion`, the counts."""
        return {
            "classes": [
                {"name": name, "cells": n, "precision": p, "recall": r, "f1": f}
                for name, n, p, r, f in zip(
                    self.names,
                    self.counts.sum(1).tolist(),
                    self._share(0).tolist(),
                    self._share(1).tolist(),
                    self._f1().tolist(),
                    strict=True,
                )
            ],
            "confusion": self.counts.tolist(),
        }

    def text(self) -> list[str | Table]:
        """A row for each class that occurs, the most frequent first, with what it is most taken for."""
        cells, predicted = self.counts.sum(1), self.counts.sum(0)
        occurs = np.flatnonzero(cells + predicted)
        order = occurs[np.argsort(-cells[occurs], kind="stable")]
        others = self.counts - np.diag(self.counts.diagonal())
        rows = []
        for i in order[:_ROWS].tolist():
            most = int(others[i].argmax())
            wrong = f"{self.names[most]} ({others[i, most]:,})" if others[i, most] else None
            shares = (
                _percent(self._share(1)[i], cells[i]),
                _percent(self._share(0)[i], predicted[i]),
            )
            rows.append((self.names[i], int(cells[i]), *shares, f"{self._f1()[i]:.3f}", wrong))
        header = ("class", "cells", "found", "precision", "F1", "most often taken for")
        parts: list[str | Table] = [Table(header, rows)]
        if len(order) > _ROWS:
            parts.append(f"{len(order) - _ROWS} smaller classes are not shown; --json has all")
        return parts

    def _share(self, axis: int) -> NDArray[np.float64]:
        """The share of right ones, of all cells of a class (axis 1), or of all predicted (axis 0)."""
        return self.counts.diagonal() / np.maximum(self.counts.sum(axis), 1)

    def _f1(self) -> NDArray[np.float64]:
        both = self.counts.sum(0) + self.counts.sum(1)
        return 2 * self.counts.diagonal() / np.maximum(both, 1)


def _percent(share: float, of: int) -> str | None:
    return f"{100 * share:.1f}%" if of else None

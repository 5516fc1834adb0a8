"""How much of a label the embeddings of cells tell: by their nearest neighbours, and by a linear map.

    some cells of train --model--> unit vectors --fit--.
    some cells of valid --model--> unit vectors -------`--> predicted labels -> accuracy, macro F1

`nearest` and `linear` are pure functions of arrays, without anything random. Called by training.heldout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.evaluation.embeddings import embedded, some_cells
from scshards.ranks.ranks import Ranks
from scshards.streaming.loader import CellLoader
from scshards.tasks.base import Task
from scshards.tasks.confusion import Confusion

K = 10
"""Neighbours that vote."""

RIDGE = 0.01
"""What is added to the variance, 1, of each dimension."""

_BLOCK = 1024
"""Cells whose neighbours are looked for at a time."""


def nearest(
    train_ND: NDArray[np.floating], codes_N: NDArray[np.int64], cells_MD: NDArray[np.floating]
) -> NDArray[np.int64]:
    """int64 [M]: the code that most of the 10 train cells of highest cosine have.

    Of codes with as many votes it is the least; of fewer than 10 train cells all vote. Vectors are unit
    vectors, and every pair is looked at.
    """
    train_ND, out, k = train_ND.astype(np.float64), [], min(K, len(train_ND))
    for begin in range(0, len(cells_MD), _BLOCK):
        cosines_BN = cells_MD[begin : begin + _BLOCK].astype(np.float64) @ train_ND.T
        voters_BK = codes_N[np.argpartition(-cosines_BN, k - 1, axis=1)[:, :k]]
        out += [int(np.bincount(votes).argmax()) for votes in voters_BK]
    return np.array(out, np.int64)


def linear(
    train_ND: NDArray[np.floating], codes_N: NDArray[np.int64], cells_MD: NDArray[np.floating]
) -> NDArray[np.int64]:
    """int64 [M]: the code that a ridge regression of the codes, one against the others, gives most.

    Each dimension is scaled to mean 0 and variance 1 over the train cells first.
    """
    train_ND, cells_MD = train_ND.astype(np.float64), cells_MD.astype(np.float64)
    mean_D, scale_D = train_ND.mean(axis=0), train_ND.std(axis=0)
    scale_D[scale_D == 0] = 1.0
    known, places_N = np.unique(codes_N, return_inverse=True)
    x_ND = (train_ND - mean_D) / scale_D
    y_NC = np.eye(len(known))[places_N]
    share_C = y_NC.mean(axis=0)
    ridge_DD = RIDGE * len(x_ND) * np.eye(x_ND.shape[1])
    weights_DC = np.linalg.solve(x_ND.T @ x_ND + ridge_DD, x_ND.T @ (y_NC - share_C))
    said_MC = (cells_MD - mean_D) / scale_D @ weights_DC + share_C
    return known[said_MC.argmax(axis=1)].astype(np.int64)


class Probe:
    """What embeddings tell of a label: fitted on some cells of train, and scored on some of valid.

    Parameters
    ----------
    loader
        As of embeddings.some_cells, of the split that it is given besides.
    label, names
        A label column, and its categories.
    needed
        What else a cell must have a value in for the task, or None.
    n_cells
        Cells of each of the two splits at most, drawn by hash.

    Raises
    ------
    ConfigError
        When a split has no cell with a label.
    """

    figure_names = ("knn_accuracy", "knn_macro_f1", "linear_accuracy", "linear_macro_f1")

    def __init__(
        self,
        loader: Callable[..., CellLoader],
        label: str,
        names: tuple[str, ...],
        needed: str | None,
        n_cells: int,
        ranks: Ranks,
    ) -> None:
        self._label, self._names, self._ranks = label, names, ranks
        self._train, self._valid = (
            some_cells(partial(loader, split=split), (label, needed), n_cells)
            for split in ("train", "valid")
        )

    def __call__(self, task: Task) -> dict[str, Any]:
        """The figures, and of how many cells; {} but on the first rank. All ranks call it."""
        fitted, scored = (
            embedded(task, loader, self._ranks, lambda batch: batch.labels[self._label].numpy())
            for loader in (self._train, self._valid)
        )
        if fitted is None or scored is None:
            return {}
        vectors, codes = scored
        out: dict[str, Any] = {"probe_cells": len(codes)}
        for name, fit in (("knn", nearest), ("linear", linear)):
            found = Confusion.of(self._names, codes, fit(*fitted, vectors))
            out |= {f"{name}_accuracy": found.accuracy, f"{name}_macro_f1": found.macro_f1}
        return out

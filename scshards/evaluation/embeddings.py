"""The embeddings of cells, `embedded`; and integration measured on held-out ones, beside PCA of them.

    valid split --take--> some cells, the same every time --model--> unit vectors --scores--> avg_bio
                            `--log(1 + counts, scaled to 10,000)--> PCA --scores--> pca_avg_bio, ...

Called by training.heldout, applying.evaluate and probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.evaluation.integration import (
    CLASS_SCORES,
    DOMAIN_SCORE,
    leading_components,
    most_variable,
    need_sklearn,
    scores,
)
from scshards.ranks.ranks import Ranks
from scshards.streaming.loader import CellLoader
from scshards.tasks.base import Task
from scshards.tasks.labels import having
from scshards.tasks.settings import TaskSettings

NOTHING_HIDDEN = {"objective": "none", "mask_ratio": None, "exact_mask": False}
"""Of CollateOptions, what shows whole cells."""

TARGET_SUM = 10_000.0
"""What counts are scaled to before the logarithm, for the PCA."""


def embedded(
    task: Task, loader: CellLoader, ranks: Ranks, labels: Callable[[Any], NDArray[np.int64]]
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """Unit vectors [cells, dimensions] of a loader's cells by key, and what `labels` says of a batch's.

    The same for any number of ranks, all of which must call it; None but on the first.
    """
    task.eval()
    found = []
    with torch.no_grad(), ranks.autocast():
        for batch in loader:
            # Through the whole forward pass, which is what wrappers of several ranks know.
            vectors_BD = task.run(batch.to(ranks.device), None).cell_embeddings
            unit_BD = torch.nn.functional.normalize(vectors_BD, dim=1).cpu().numpy()
            rows = (batch.weight > 0).numpy()
            found.append((batch.key.numpy()[rows], unit_BD[rows], labels(batch)[rows]))
    every = _gathered(found, ranks)
    if every is None:
        return None
    keys, vectors, codes = every
    order = np.argsort(keys, kind="stable")
    return vectors[order], codes[order]


def some_cells(
    loader: Callable[..., CellLoader], columns: Sequence[str | None], most: int, **collate: Any
) -> CellLoader:
    """So many cells at most, drawn by hash, of those that have a value in these columns, shown whole.

    `loader` makes one of a split's cells, each once, with other fields of ChoiceOptions (`choose`) and
    CollateOptions (`collate`) than the task's own. ConfigError when no cell of the split has them.
    """

    def made(take: int | None) -> CellLoader:
        choose = {"where": having(*columns) or None, "take": take}
        return loader(choose=choose, collate=NOTHING_HIDDEN | collate)

    return made(min(most, made(None).cells))


class IntegrationMetrics:
    """Scores of a model's embedding on some cells of a split.

    Parameters
    ----------
    loader
        As of `some_cells`.
    task
        Which cells: `metric_cells` of them at most, drawn by hash, of those that have a domain and, with
        `label`, a class.

    Attributes
    ----------
    names
        Of the scores.

    Raises
    ------
    ConfigError
        Without scikit-learn, or when no cell of the split has both.
    """

    def __init__(self, loader: Callable[..., CellLoader], task: TaskSettings, ranks: Ranks) -> None:
        need_sklearn()
        assert task.domain is not None
        self._ranks, self._label, self._domain = ranks, task.label, task.domain
        columns, n = (task.label, task.domain), task.metric_cells
        self._loader = some_cells(loader, columns, n)
        longest = 1 + max(s.max_genes for s in self._loader.shardset.shards(self._loader.split))
        as_counts = self._loader.value_kind == "counts"
        self._plain = some_cells(
            loader,
            columns,
            n,
            max_length=max(longest, 2),
            include_zero_genes=0,
            conditions=(),
            keep_first=None,
            values="log1p" if as_counts else "counts",
            target_sum=TARGET_SUM if as_counts else None,
            n_bins=51 if as_counts else 0,
        )
        self._pca: dict[str, Any] | None = None
        self.names = (*(CLASS_SCORES if task.label else ()), DOMAIN_SCORE)

    def __call__(self, task: Task) -> dict[str, Any]:
        """The scores, with those of PCA as `pca_...`; {} but on the first rank. All ranks call it."""
        if self._pca is None:
            self._pca = self._of_pca()
        found = embedded(task, self._loader, self._ranks, self._codes)
        if found is None:
            return {}
        vectors, codes = found
        return {"metric_cells": len(vectors)} | self._scores(vectors, codes) | self._pca

    def _of_pca(self) -> dict[str, Any]:
        found = []
        for batch in self._plain:
            rows = (batch.weight > 0).numpy()
            is_gene = ~batch.is_pad.numpy() & rows[:, None]
            is_gene[:, 0] = False
            at, places = np.nonzero(is_gene)
            keys = batch.key.numpy()
            tokens = (keys[at], batch.genes.numpy()[at, places], batch.targets.numpy()[at, places])
            found.append((keys[rows], self._codes(batch)[rows], *tokens))
        every = _gathered(found, self._ranks)
        if every is None:
            return {}
        keys, codes, of_cell, genes, values = every
        order = np.argsort(keys, kind="stable")
        keys, codes = keys[order], codes[order]
        cells = np.searchsorted(keys, of_cell)
        best = most_variable(cells, genes, values, len(keys))
        own = self._scores(leading_components(best), codes)
        return {f"pca_{name}": value for name, value in own.items()}

    def _codes(self, batch: Any) -> NDArray[np.int64]:
        """int64 [cells, 2]: class and domain; class -1 when none is asked for."""
        domain = batch.labels[self._domain].numpy()
        label = np.full_like(domain, -1) if not self._label else batch.labels[self._label].numpy()
        return np.stack((label, domain), axis=1)

    def _scores(self, vectors: NDArray[Any], codes: NDArray[np.int64]) -> dict[str, float]:
        return scores(vectors, codes[:, 0] if self._label else None, codes[:, 1])


def _gathered(found: Sequence[tuple[NDArray[Any], ...]], ranks: Ranks) -> list[NDArray[Any]] | None:
    """The arrays of all batches behind one another, those of all ranks; None but on the first."""
    every = ranks.gather([np.concatenate(parts) for parts in zip(*found, strict=True)])
    return [np.concatenate(parts) for parts in zip(*every, strict=True)] if ranks.is_main else None

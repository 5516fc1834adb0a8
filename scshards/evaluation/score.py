"""How well a model does its task on held-out cells: the losses of a whole split.

What is hidden is the same in every evaluation of a shard set. Called by training.heldout and
applying.evaluate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scshards.cells.batch import key_text
from scshards.model.transformer import AnyBatch, ModelOutput
from scshards.ranks.ranks import Ranks
from scshards.streaming.loader import CellLoader
from scshards.tasks.base import Task

_TOLD = 5
"""Cells that are named at most."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A task's losses over a whole split.

    Attributes
    ----------
    loss
        The term that chooses the best model.
    terms
        The mean of each term.
    counted, n
        What `loss` is a mean over, as metrics.jsonl calls it, and how many of them there were.
    n_cells
        Cells of the split.
    figures, tally
        What else the task says: accuracy, for example; and of what, on the CPU.
    not_finite
        Keys of cells for which the model computed NaN or infinity, the first few.
    """

    loss: float
    terms: dict[str, float]
    counted: str
    n: int
    n_cells: int
    figures: dict[str, Any] = field(default_factory=dict)
    tally: Tensor | None = None
    not_finite: tuple[str, ...] = ()

    def tables(self) -> dict[str, Any]:
        values = self.terms | {self.counted: self.n, "n_cells": self.n_cells} | self.figures
        return values | ({"not_finite": list(self.not_finite)} if self.not_finite else {})


@torch.no_grad()
def validate(
    task: Task,
    loader: CellLoader,
    ranks: Ranks,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Score | None:
    """The task's score over one pass of `loader`; None when a rank was asked to stop meanwhile.

    Every rank must call it; all get the same score.
    """
    task.eval()
    # Statistics of batch norm: those that the best model is written with.
    ranks.share(task.buffers())
    terms = tuple(task.terms)
    sums = torch.zeros(len(terms), dtype=torch.float64, device=ranks.device)
    counts, n_cells = dict.fromkeys(terms, 0), 0
    tally: Tensor | None = None
    bad: list[str] = []
    for batch in loader:
        if ranks.any(should_stop()):
            return None
        n_cells += int((batch.weight > 0).sum())
        counts = {t: n + counts[t] for t, n in task.counts(batch).items()}
        batch = batch.to(ranks.device, non_blocking=True)
        with ranks.autocast():
            out = task.run(batch, None)
        found = task.sums(batch, out)
        these = torch.stack([found[t] for t in terms])
        if len(bad) < _TOLD and not bool(these.isfinite().all()):
            bad += _not_finite_cells(batch, out)[:_TOLD]
        sums += these
        more = task.tally(batch, out)
        tally = more if tally is None or more is None else tally + more
    mine = [*sums.tolist(), *(counts[t] for t in terms), n_cells]
    flat = [] if tally is None else tally.flatten().tolist()
    total = ranks.total([*mine, *flat])
    whole = None if tally is None else torch.tensor(total[len(mine) :]).reshape(tally.shape)
    means = {t: total[i] / max(total[len(terms) + i], 1.0) for i, t in enumerate(terms)}
    return Score(
        loss=means[task.criterion],
        terms=means,
        counted=task.counted,
        n=int(total[len(terms) + terms.index(task.criterion)]),
        n_cells=int(total[2 * len(terms)]),
        figures={} if whole is None else task.figures(whole),
        tally=whole,
        not_finite=tuple(k for keys in ranks.gather(bad) for k in keys)[:_TOLD],
    )


def _not_finite_cells(batch: AnyBatch, out: ModelOutput) -> list[str]:
    """The keys of a batch's cells for which something that is not finite came out; else of all."""
    keys = batch.key.tolist()
    fine = torch.ones(len(keys), dtype=torch.bool, device=out.cell_embeddings.device)
    for tensor in out:
        if tensor is not None and len(tensor) == len(keys):
            fine &= tensor.isfinite().reshape(len(keys), -1).all(dim=1)
    wrong = [k for k, ok in zip(keys, fine.tolist(), strict=True) if k >= 0 and not ok]
    return [key_text(k) for k in wrong] or batch.cell_keys

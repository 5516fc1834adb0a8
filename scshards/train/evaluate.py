"""How well masked values of held-out cells are predicted: the model, and beside it two baselines.

The masks are the same in every evaluation of a shard set. Called by the loop (the model alone) and
by `scshards evaluate` (all three, into RUN/evaluation.json).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scshards.base.errors import ConfigError
from scshards.base.progress import Progress
from scshards.model.scgpt import load_model
from scshards.stream.loader import CellLoader
from scshards.train.baselines import baseline_errors, gene_means
from scshards.train.data import has_split, once_loader
from scshards.train.folder import RunFolder
from scshards.train.setup import Ranks, ranks
from scshards.train.tasks import Task
from scshards.train.tasks_pretrain import MaskTask


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
    figures
        What else the task says: accuracy, for example.
    """

    loss: float
    terms: dict[str, float]
    counted: str
    n: int
    n_cells: int
    figures: dict[str, Any] = field(default_factory=dict)

    def tables(self) -> dict[str, Any]:
        return self.terms | {self.counted: self.n, "n_cells": self.n_cells} | self.figures


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model and two baselines on the same masked values; all errors are mean squared ones."""

    split: str
    n_cells: int
    n_masked: int
    model: float
    mvc: float | None
    gene_mean: float
    cell_mean: float

    @property
    def margin(self) -> float:
        """How far the model is below the better baseline: 0.15 is 15% below it."""
        return 1 - self.model / min(self.gene_mean, self.cell_mean)

    def tables(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"margin": self.margin}


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
    loader.set_epoch(0)
    terms = tuple(task.terms)
    sums = torch.zeros(len(terms), dtype=torch.float64, device=ranks.device)
    counts, n_cells = dict.fromkeys(terms, 0), 0
    tally: Tensor | None = None
    for batch in loader:
        if ranks.any(should_stop()):
            return None
        n_cells += int((batch.weight > 0).sum())
        counts = {t: n + counts[t] for t, n in task.counts(batch).items()}
        batch = batch.to(ranks.device, non_blocking=True)
        with ranks.autocast():
            out = task.run(batch, None)
        found = task.sums(batch, out)
        sums += torch.stack([found[t] for t in terms])
        more = task.tally(batch, out)
        tally = more if tally is None or more is None else tally + more
    mine = [*sums.tolist(), *(counts[t] for t in terms), n_cells]
    flat = [] if tally is None else tally.flatten().tolist()
    total = ranks.total([*mine, *flat])
    means = {t: total[i] / max(total[len(terms) + i], 1.0) for i, t in enumerate(terms)}
    return Score(
        loss=means[task.criterion],
        terms=means,
        counted=task.counted,
        n=int(total[len(terms) + terms.index(task.criterion)]),
        n_cells=int(total[2 * len(terms)]),
        figures={}
        if tally is None
        else task.figures(torch.tensor(total[len(mine) :]).reshape(tally.shape)),
    )


def evaluate_run(
    folder: str,
    root: str,
    *,
    split: str = "valid",
    batch_size: int = 64,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> Evaluation:
    """RUN's best model and the baselines on a split; written to RUN/evaluation.json as well.

    Parameters
    ----------
    folder
        What `scshards train -o` wrote.
    root
        The shard set: its train split gives the baselines their means.
    split, batch_size, device
        The cells to score, cells per forward pass, and where.

    Raises
    ------
    ConfigError
        When `folder` is no run, the shard set has no such split, or another vocabulary.
    """
    run = RunFolder(folder)
    config = run.config()
    with ranks(device, config.run.precision) as here:

        def loader(split: str, max_length: int | None = None) -> CellLoader:
            return once_loader(
                root,
                config.data,
                here,
                split,
                batch_size,
                max_length=max_length,
                storage_options=storage_options,
            )

        scored = loader(split)
        shardset = scored.shardset
        if not has_split(shardset, split):
            raise ConfigError(f"the split {split!r} has no cells", where=root)
        loaded = load_model(str(run.path))
        _check_vocab(loaded.vocab, shardset.vocab.to_dict(), folder, root)
        score = validate(MaskTask(loaded.model.to(here.device)), scored, here)
        assert score is not None

        train = shardset.manifest.splits["train"]
        longest = 1 + max(s.max_genes for s in train)
        cells = shardset.manifest.cells("train")
        with Progress("gene means", cells, shown=shown and here.is_main) as progress:
            means = gene_means(loader("train", longest), len(shardset.vocab), here, progress)
        scored.set_epoch(0)
        by_gene, by_cell, n = baseline_errors(scored, means, here)
        assert n == score.n, "the model and the baselines were scored on other values"
        evaluation = Evaluation(
            split=split,
            n_cells=score.n_cells,
            n_masked=score.n,
            model=score.loss,
            mvc=score.terms.get("mvc_mse"),
            gene_mean=by_gene,
            cell_mean=by_cell,
        )
        if here.is_main:
            run.write("evaluation.json", evaluation.tables())
    return evaluation


def _check_vocab(ours: dict[str, int], theirs: dict[str, int], folder: str, root: str) -> None:
    if ours != theirs:
        raise ConfigError(
            "the model was trained with another vocabulary than these shards were packed with",
            where=f"{folder}, {root}",
            advice=f"pack the cells with --vocab {folder}/vocab.json",
        )

"""How well a model does its task on held-out cells, and beside it what needs no model.

What is hidden is the same in every evaluation of a shard set. Called by the loop (the model alone)
and by `scshards evaluate` (with baselines, into RUN/evaluation.json).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scshards.base.errors import ConfigError, ScshardsError
from scshards.base.progress import Progress, Table
from scshards.cells.batch import key_text
from scshards.model.output import ModelOutput
from scshards.model.scgpt import load_model
from scshards.model.transformer import CellModel
from scshards.shards.shardset import ShardSet
from scshards.streaming.loader import CellLoader
from scshards.train.baselines import baseline_errors, gene_means
from scshards.train.classes import read_classes, read_domains
from scshards.train.config import TrainConfig
from scshards.train.confusion import Confusion
from scshards.train.data import NOTHING_HIDDEN, has_split, once_loader
from scshards.train.folder import RunFolder
from scshards.train.integration_cells import IntegrationMetrics
from scshards.train.labels import codes_in, column
from scshards.train.micro import AnyBatch
from scshards.train.setup import Ranks, ranks
from scshards.train.tasks import Task
from scshards.train.tasks_setup import make_task, model_vocab

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
        Keys of cells for which the model computed NaN or infinity, the first few; such a score is
        the worst there is.
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

    def is_better_than(self, best: float | None) -> bool:
        """Whether it is finite, and below the best loss so far, if there is one."""
        return not self.not_finite and (best is None or not self.loss >= best)


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
        Cells that have a class, which is what the rest is about.
    n_without
        Cells of the split that have none.
    n_other
        Of `n_cells`, those of classes that the model does not know: never right, in no loss.
    majority, majority_accuracy
        That class, and the share of cells that have it.
    confusion
        Of the cells whose class the model knows, by that class and the predicted one.
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
            cells += f" ({self.n_other:,} of classes that the model does not know)"
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


def evaluate_run(
    folder: str,
    root: str,
    *,
    split: str = "valid",
    batch_size: int = 64,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> Evaluation | Annotation:
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
    CheckpointError, ScshardsError
        When weights, or what comes of them, are not finite; tensors or cells are named.
    ConfigError
        When `folder` is no run, the shard set has no such split, another vocabulary, no such label
        column, or domains that the model was not trained on.
    """
    run = RunFolder(folder)
    config = run.config()
    with ranks(device, config.run.precision) as here:
        if shown and here.is_main:
            for note in run.unknown():
                print(note, file=sys.stderr)
        shardset = ShardSet(root, storage_options)
        shardset.shards(split)
        if not has_split(shardset, split):
            raise ConfigError(f"the split {split!r} has no cells", where=root)
        loaded = load_model(str(run.path))
        _check_vocab(loaded.vocab, model_vocab(config, shardset).to_dict(), folder, root)
        e = _Evaluated(config, root, split, batch_size, shardset, here, storage_options, shown)
        model = loaded.model.to(here.device)
        annotates = config.task.name == "annotate"
        evaluation = e.annotation(model, run) if annotates else e.values(model, run)
        if here.is_main:
            run.write("evaluation.json", evaluation.tables())
    return evaluation


@dataclass(frozen=True)
class _Evaluated:
    """What is evaluated on, and where."""

    config: TrainConfig
    root: str
    split: str
    batch_size: int
    shardset: ShardSet
    here: Ranks
    storage_options: Mapping[str, Any] | None
    shown: bool

    def loader(self, split: str, **other: Any) -> CellLoader:
        options = {"storage_options": self.storage_options, **other}
        return once_loader(self.root, self.config, self.here, split, self.batch_size, **options)

    def _finite(self, score: Score | None) -> Score:
        assert score is not None, "nobody asks to stop"
        if score.not_finite:
            raise ScshardsError(
                f"the model computes NaN or infinity for the cells {', '.join(score.not_finite)}",
                where=f"{self.root}, split {self.split}",
                advice="look at these cells (scshards show); with run.precision=bf16, train and "
                "evaluate in fp32",
            )
        return score

    def values(self, model: CellModel, run: RunFolder) -> Evaluation:
        """Hidden values, by the model and by the baselines; integration, if that was the task."""
        t, here = self.config.task, self.here
        codes = None
        if t.domain is not None:
            names = read_domains(run.path).names
            found = column(self.shardset, t.domain, "task.domain", self.split)
            codes = codes_in(found, names)
            unknown = [
                n for n, c in zip(found.names, found.cells, strict=True) if c and n not in names
            ]
            if unknown:
                raise ConfigError(
                    f"the model was not trained on these domains: {', '.join(unknown[:5])}",
                    where=f"{self.root}: {t.domain}",
                    advice="evaluate on cells of the domains in domains.json",
                )
        task = make_task(t, model, codes)
        scored = self.loader(self.split)
        score = self._finite(validate(task, scored, here))
        figures: dict[str, Any] = {}
        if t.name == "integrate" and t.metric_cells:
            measure = IntegrationMetrics(
                self.root, self.config, here, self.split, self.batch_size, self.storage_options
            )
            figures = measure(task)
        manifest = self.shardset.manifest
        longest = 1 + max(s.max_genes for s in manifest.splits["train"])
        whole = self.loader(
            "train",
            collate={
                **NOTHING_HIDDEN,
                "conditions": (),
                "keep_first": None,
                "max_length": longest + self.config.collate.include_zero_genes,
            },
        )
        shown = self.shown and here.is_main
        with Progress("gene means", manifest.cells("train"), shown=shown) as progress:
            means = gene_means(whole, len(scored.vocab), here, progress)
        by_gene, by_cell, n = baseline_errors(scored, means, here, self.config.collate.n_leads)
        assert n == score.n, "the model and the baselines were scored on other values"
        return Evaluation(
            split=self.split,
            n_cells=score.n_cells,
            n_masked=score.n,
            model=score.loss,
            mvc=score.terms.get("mvc_mse"),
            gene_mean=by_gene,
            cell_mean=by_cell,
            what="unknown" if t.objective == "generate" else "masked",
            figures=figures,
        )

    def annotation(self, model: CellModel, run: RunFolder) -> Annotation:
        """Classes, by the model and by the most frequent class of the train split."""
        t = self.config.task
        assert t.label is not None
        names = read_classes(run.path).names
        found = column(self.shardset, t.label, "task.label", self.split)
        trained = column(self.shardset, t.label, "task.label")
        score = self._finite(
            validate(
                make_task(t, model, codes_in(found, names)), self.loader(self.split), self.here
            )
        )
        assert score.tally is not None, "the task tallies classes"
        n = int(found.cells.sum())
        majority = int(trained.cells.argmax())
        return Annotation(
            split=self.split,
            n_cells=n,
            n_without=found.missing,
            n_other=n - score.n,
            class_ce=score.loss,
            accuracy=score.figures["accuracy"] * score.n / max(n, 1),
            macro_f1=score.figures["macro_f1"],
            majority=trained.names[majority],
            majority_accuracy=float(found.cells[majority]) / max(n, 1),
            confusion=Confusion(names, score.tally.long().numpy()),
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


def _check_vocab(ours: dict[str, int], theirs: dict[str, int], folder: str, root: str) -> None:
    if ours != theirs:
        raise ConfigError(
            "the model was trained with another vocabulary than these shards were packed with",
            where=f"{folder}, {root}",
            advice=f"pack the cells with --vocab {folder}/vocab.json",
        )

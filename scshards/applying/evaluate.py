"""How well a run's model does its task on held-out cells, and beside it what needs no model.

Called by `scshards evaluate`; the verdict goes into RUN/evaluation.json.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from scshards.base.errors import ConfigError, ScshardsError
from scshards.base.progress import Progress
from scshards.evaluation.baselines import baseline_errors, gene_means
from scshards.evaluation.embeddings import NOTHING_HIDDEN, IntegrationMetrics
from scshards.evaluation.score import Score, validate
from scshards.evaluation.verdict import Annotation, Evaluation
from scshards.model.classes import CLASSES, DOMAINS, read_names
from scshards.model.scgpt import load_model
from scshards.model.transformer import CellModel
from scshards.ranks.ranks import Ranks, ranks
from scshards.shards.shardset import ShardSet
from scshards.streaming.loader import CellLoader
from scshards.tasks.confusion import Confusion
from scshards.tasks.labels import column
from scshards.tasks.make import check_vocab, known_codes, make_task
from scshards.training.config import TrainConfig
from scshards.training.data import has_split, once_loader
from scshards.training.save.folder import RunFolder


def evaluate_run(
    folder: str,
    root: str,
    *,
    split: str = "valid",
    batch_size: int = 64,
    device: str = "auto",
    precision: str | None = None,
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
    precision
        As of `run.precision`; None: that of the run.

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
    with ranks(device, precision or config.run.precision) as here:
        if shown and here.is_main:
            for note in run.unknown():
                print(note, file=sys.stderr)
        shardset = ShardSet(root, storage_options)
        shardset.shards(split)
        if not has_split(shardset, split):
            raise ConfigError(f"the split {split!r} has no cells", where=root)
        loaded = load_model(str(run.path))
        check_vocab(loaded.vocab, config.collate.conditions, shardset, f"{folder}, {root}", folder)
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
            names = read_names(run.path, DOMAINS).names
            _, codes = known_codes(t, names, self.shardset, self.split)
        task = make_task(t, model, codes)
        scored = self.loader(self.split)
        score = self._finite(validate(task, scored, here))
        figures: dict[str, Any] = {}
        if t.name == "integrate" and t.metric_cells:
            figures = IntegrationMetrics(partial(self.loader, self.split), t, here)(task)
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
        names = read_names(run.path, CLASSES).names
        found, codes = known_codes(t, names, self.shardset, self.split)
        trained = column(self.shardset, t.label, "task.label")
        score = self._finite(
            validate(make_task(t, model, codes), self.loader(self.split), self.here)
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

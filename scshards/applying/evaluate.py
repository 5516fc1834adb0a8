"""How well a run's model does its task on held-out cells, and beside it what needs no model.

evaluate_run    a verdict, by `scshards evaluate`; it goes into RUN/evaluation.json
embed_some      the embeddings of some held-out cells, by `scshards report`
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError
from scshards.base.progress import Progress
from scshards.evaluation.baselines import baseline_errors, gene_means
from scshards.evaluation.embeddings import (
    NOTHING_HIDDEN,
    IntegrationMetrics,
    embedded,
    some_cells,
)
from scshards.evaluation.score import Score, validate
from scshards.evaluation.verdict import Annotation, Evaluation
from scshards.model.classes import CLASSES, DOMAINS, read_names
from scshards.model.scgpt import load_model
from scshards.ranks.ranks import Ranks, ranks
from scshards.shards.shardset import ShardSet
from scshards.streaming.loader import CellLoader
from scshards.tasks.base import Task
from scshards.tasks.confusion import Confusion
from scshards.tasks.labels import Column, column
from scshards.tasks.make import TaskLabels, check_vocab, known_codes, make_task
from scshards.training.config import TrainConfig
from scshards.training.data import check_split, once_loader
from scshards.training.save.folder import EVALUATION, RunFolder


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
    t = config.task
    with ranks(device, precision or config.run.precision) as here:
        shown = shown and here.is_main
        if shown:
            for note in run.unknown():
                print(note, file=sys.stderr)
        shardset = ShardSet(root, storage_options)
        check_split(shardset, split, root)
        loaded = _load(folder, config, root, shardset, split, here, batch_size, storage_options)
        task, once, known, names = loaded.task, loaded.once, loaded.known, loaded.names
        scored = once(split)
        score = validate(task, scored, here)
        assert score is not None, "nobody asks to stop"
        if score.not_finite:
            raise ScshardsError(
                f"the model computes NaN or infinity for the cells {', '.join(score.not_finite)}",
                where=f"{root}, split {split}",
                advice="look at these cells (scshards show); with run.precision=bf16, train and "
                "evaluate in fp32",
            )
        found: Evaluation | Annotation
        if known is not None and t.name == "annotate":
            trained = column(shardset, known.column.name, "task.label")
            found = _annotation(split, score, known, names, trained)
        else:
            figures: dict[str, Any] = {}
            if t.name == "integrate" and t.metric_cells:
                figures = IntegrationMetrics(partial(once, split), t, here)(task)
            n_train = shardset.manifest.cells("train")
            with Progress("gene means", n_train, shown=shown) as progress:
                whole = _whole(once, shardset, config)
                means = gene_means(whole, len(scored.vocab), here, progress)
            by_gene, by_cell, n = baseline_errors(scored, means, here, config.collate.n_leads)
            assert n == score.n, "the model and the baselines were scored on other values"
            found = Evaluation(
                split=split,
                n_cells=score.n_cells,
                n_masked=score.n,
                model=score.loss,
                mvc=score.terms.get("mvc_mse"),
                gene_mean=by_gene,
                cell_mean=by_cell,
                what="unknown" if t.objective == "generate" else "masked",
                figures=figures,
            )
        if here.is_main:
            run.write(EVALUATION, found.tables())
    return found


@dataclass(frozen=True, kw_only=True)
class EmbeddedCells:
    """Some cells of a split as a run's model sees them.

    Attributes
    ----------
    vectors
        float32 [cells, dimensions]: unit vectors.
    labels
        {column: the category of each, "missing" where there is none}, of all labels of categories.
    """

    vectors: NDArray[np.float32]
    labels: Mapping[str, NDArray[Any]]


def embed_some(
    folder: str,
    root: str,
    *,
    cells: int,
    split: str = "valid",
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> EmbeddedCells:
    """The embeddings of so many cells of a split at most, drawn by hash, by RUN's best model.

    Raises what `evaluate_run` does, for the same reasons.
    """
    config = RunFolder(folder).config()
    with ranks(device, config.run.precision) as here:
        shardset = ShardSet(root, storage_options)
        check_split(shardset, split, root)
        loaded = _load(folder, config, root, shardset, split, here, 64, storage_options)
        infos = {n: i for n, i in shardset.manifest.labels.items() if i.kind == "category"}

        def codes(batch: Any) -> NDArray[np.int64]:
            columns = [batch.labels[n].numpy() for n in infos]
            return np.stack(columns, axis=1) if columns else np.empty((len(batch), 0), np.int64)

        loader = some_cells(partial(loaded.once, split), (config.task.needed,), cells)
        found = embedded(loaded.task, loader, here, codes)
        assert found is not None, "it is one process"
    vectors, codes_NC = found
    return EmbeddedCells(
        vectors=vectors,
        labels={
            n: np.array([*info.categories, "missing"])[codes_NC[:, i]]
            for i, (n, info) in enumerate(infos.items())
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A run's best model as its task, on a device, and loaders of a set's cells for it."""

    task: Task
    once: Callable[..., CellLoader]
    known: TaskLabels | None
    names: tuple[str, ...]


def _load(
    folder: str,
    config: TrainConfig,
    root: str,
    shardset: ShardSet,
    split: str,
    here: Ranks,
    batch_size: int,
    storage_options: Mapping[str, Any] | None,
) -> _Loaded:
    t, home = config.task, RunFolder(folder).path
    loaded = load_model(str(home))
    check_vocab(loaded.vocab, config.collate.conditions, shardset, f"{folder}, {root}", folder)
    known: TaskLabels | None = None
    names: tuple[str, ...] = ()
    if t.needed is not None:
        names = read_names(home, CLASSES if t.name == "annotate" else DOMAINS).names
        known = known_codes(t, names, shardset, split)
    task = make_task(t, loaded.model.to(here.device), known and known.codes)
    once = partial(
        once_loader, root, config, here, batch_size=batch_size, storage_options=storage_options
    )
    return _Loaded(task=task, once=once, known=known, names=names)


def _whole(once: Callable[..., CellLoader], shardset: ShardSet, config: TrainConfig) -> CellLoader:
    """All training cells with all of their values."""
    longest = 1 + max(s.max_genes for s in shardset.manifest.splits["train"])
    room = {"max_length": longest + config.collate.include_zero_genes}
    return once("train", collate=NOTHING_HIDDEN | {"conditions": (), "keep_first": None} | room)


def _annotation(
    split: str, score: Score, known: TaskLabels, names: tuple[str, ...], trained: Column
) -> Annotation:
    """Classes that the model knows, by it and by the most frequent one of the train split."""
    assert score.tally is not None, "the task tallies classes"
    is_known = np.isin(trained.names, names)
    majority = int(np.where(is_known, trained.cells, -1).argmax())
    cells = np.where(is_known, known.column.cells, 0)
    return Annotation(
        split=split,
        n_cells=score.n,
        n_without=known.column.missing,
        n_other=known.n_other,
        class_ce=score.loss,
        accuracy=score.figures["accuracy"],
        macro_f1=score.figures["macro_f1"],
        majority=trained.names[majority],
        majority_accuracy=float(cells[majority]) / max(score.n, 1),
        confusion=Confusion(names, score.tally.long().numpy()),
    )

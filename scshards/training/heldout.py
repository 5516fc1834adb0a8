"""What a run is scored on: the split valid, further sets by name, probes of embeddings; `HeldOut`.

    cells of each set --validate--> losses, figures --measure, probe--> one line --best_by--> the best?

Called by prepare, which makes it before anything is written, and by the loop, at each evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from scshards.base.errors import ConfigError
from scshards.evaluation.embeddings import IntegrationMetrics
from scshards.evaluation.probes import Probe
from scshards.evaluation.score import validate
from scshards.ranks.ranks import Ranks
from scshards.shards.shardset import ShardSet
from scshards.streaming.loader import CellLoader
from scshards.tasks.base import Task
from scshards.tasks.labels import check_several, column
from scshards.tasks.make import check_vocab, known_codes, make_task
from scshards.training.config import TrainConfig
from scshards.training.data import check_split, has_split, once_loader
from scshards.training.plan import TaskPlan
from scshards.training.settings import LOSS, VALID, HeldOutSettings


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation found.

    Attributes
    ----------
    line
        Fields of metrics.jsonl, those of a set as `NAME/...`; whole on the first rank.
    figures
        What a best model can be chosen by, the same on every rank.
    not_finite
        Keys of cells for which the model computed NaN or infinity, the first few, after `NAME/`.
    """

    line: dict[str, Any]
    figures: dict[str, float]
    not_finite: tuple[str, ...] = ()

    def is_better_than(self, best: Mapping[str, float], by: str, terms: Collection[str]) -> bool:
        """Whether the model is better than that of the figures `best`; never where it is not finite.

        `by` names the figure: the less the better where it is a loss, of these `terms`, else the more.
        """
        value, old = self.figures.get(by), best.get(by)
        if self.not_finite or value is None or not math.isfinite(value):
            return False
        is_loss = by.rpartition("/")[2] in (LOSS, *terms)
        return old is None or not (value >= old if is_loss else value <= old)


class HeldOut:
    """The cells that a run is scored on, and what it is scored by.

    Parameters
    ----------
    root, storage_options
        The shard set that is trained on, and how it and others are read.
    task
        The task on the model.
    batch_size
        Cells of a rank in a forward pass.

    Attributes
    ----------
    cells
        {name: cells} of each set; the split valid comes first, where there is one.
    figures
        What `evaluate.best_by` may name, as far as it is known before the first evaluation.
    notes
        What a person should know, in sentences.

    Raises
    ------
    ConfigError
        For sets that are not there or that the model can't be scored on, and a `best_by` that is none.
    """

    def __init__(
        self,
        root: str,
        config: TrainConfig,
        plan: TaskPlan,
        task: Task,
        here: Ranks,
        batch_size: int,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._root, self._config, self._plan, self._task = root, config, plan, task
        self._here, self._options = here, storage_options
        self._once = partial(
            once_loader,
            config=config,
            ranks=here,
            batch_size=batch_size,
            storage_options=storage_options,
        )
        asked, own = config.evaluate, ShardSet(root, storage_options)
        self._sets: dict[str, _Set] = {}
        if has_split(own, VALID):
            self._sets[VALID] = self._set(root, VALID, task, self._probe(own))
        elif asked.probe is not None:
            raise ConfigError(
                f"the shard set has no split {VALID} to probe", where="evaluate.probe"
            )
        for name, cells in asked.sets.items():
            self._sets[name] = self._named(f"evaluate.sets.{name}", cells, own.manifest.value_kind)
        self.cells = {name: one.loader.cells for name, one in self._sets.items()}
        self.notes = tuple(
            f"{name}: {one.n_other:,} cells of classes that the model does not know are left out"
            for name, one in self._sets.items()
            if one.n_other
        )
        self.figures = tuple(_at(n) + f for n, one in self._sets.items() for f in one.figure_names)
        if asked.best_by not in (self.figures or (LOSS,)):
            raise ConfigError(
                f"no evaluation has the figure {asked.best_by!r}, to choose the best model by",
                where="evaluate.best_by",
                advice="choose one of " + ", ".join(self.figures)
                if self.figures
                else f"pack a split {VALID}, or give evaluate.sets",
            )

    def __call__(self, should_stop: Callable[[], bool]) -> Evaluated | None:
        """Score the model on all of it, on all ranks; None when one was asked to stop meanwhile."""
        line: dict[str, Any] = {}
        figures: dict[str, float] = {}
        bad: list[str] = []
        for name, one in self._sets.items():
            score = validate(one.task, one.loader, self._here, should_stop=should_stop)
            if score is None:
                return None
            bad += [_at(name) + key for key in score.not_finite]
            found = score.tables() | ({"n_other": one.n_other} if one.n_other else {})
            if not score.not_finite:  # of what is not finite, other figures are none, or an error
                for more in (one.measure, one.probe):
                    found |= more(one.task) if more else {}
            line |= {_at(name) + field: value for field, value in found.items()}
            found[LOSS] = score.loss
            figures |= {_at(name) + f: found[f] for f in one.figure_names if f in found}
        figures = self._here.gather(figures)[0]
        return Evaluated(line=line, figures=figures, not_finite=tuple(bad))

    @staticmethod
    def may_mean_another(figure: str) -> bool:
        """Whether a figure of this name is of other cells when [evaluate] says something else."""
        return "/" in figure or figure in Probe.figure_names

    def _set(
        self, root: str, split: str, task: Task, probe: Probe | None = None, n_other: int = 0
    ) -> _Set:
        t, once = self._config.task, partial(self._once, root, split=split)
        measure = None
        if t.metric_cells and t.name == "integrate":
            measure = IntegrationMetrics(once, t, self._here)
        loader, most = once(), self._config.evaluate.cells
        if most is not None and loader.cells > most:
            loader = once(choose={"take": most})
        return _Set(loader=loader, task=task, measure=measure, probe=probe, n_other=n_other)

    def _named(self, at: str, asked: HeldOutSettings, kind: str) -> _Set:
        """A set of the config; ConfigError when the model can't be scored on it."""
        root, t = asked.root or self._root, self._config.task
        where, shardset = f"{at}: {root}", ShardSet(root, self._options)
        check_split(shardset, asked.split, where)
        c = self._config.collate
        check_vocab(self._plan.vocab.to_dict(), c.conditions, shardset, where, self._root)
        if not c.has_bins and shardset.manifest.value_kind != kind:  # bins go by rank
            raise ConfigError(
                f"its values are {shardset.manifest.value_kind}, and the model is trained on {kind}",
                where=where,
                advice="pack the same kind of values, or train on bins (data.values)",
            )
        names = self._plan.domains or self._plan.classes
        if t.needed is None or names is None:
            return self._set(root, asked.split, self._task)
        known = known_codes(t, names.names, shardset, asked.split)
        task = self._task if known.codes is None else make_task(t, self._task.model, known.codes)
        return self._set(root, asked.split, task, n_other=known.n_other)

    def _probe(self, own: ShardSet) -> Probe | None:
        asked, t = self._config.evaluate, self._config.task
        if asked.probe is None:
            return None
        labels = column(own, asked.probe, "evaluate.probe")
        check_several(labels, "classes", "evaluate.probe", own)
        some = partial(self._once, self._root)
        return Probe(some, labels.name, labels.names, t.needed, asked.probe_cells, self._here)


@dataclass(frozen=True, kw_only=True)
class _Set:
    """The cells of one name; `n_other` of them are of classes that the model does not know."""

    loader: CellLoader
    task: Task
    measure: IntegrationMetrics | None
    probe: Probe | None
    n_other: int

    @property
    def figure_names(self) -> tuple[str, ...]:
        more = (*self.task.figure_names, *(self.measure.names if self.measure else ()))
        return (LOSS, *self.task.terms, *more, *(self.probe.figure_names if self.probe else ()))


def _at(name: str) -> str:
    """What stands before the fields of a set."""
    return "" if name == VALID else f"{name}/"

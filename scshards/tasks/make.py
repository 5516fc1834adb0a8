"""The task that settings ask for, on a model, and what cells must have for it: its tokens, its names.

Called by training.plan, training.heldout and applying.evaluate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scshards.base.errors import ConfigError
from scshards.cells.vocab import Vocab
from scshards.model.transformer import CellModel
from scshards.shards.shardset import ShardSet
from scshards.streaming.collate.lead_tokens import LeadTokens
from scshards.tasks.base import Task
from scshards.tasks.finetune import AnnotateTask, IntegrateTask
from scshards.tasks.labels import Column, column
from scshards.tasks.pretrain import GenerateTask, MaskTask
from scshards.tasks.settings import TaskSettings


def model_vocab(conditions: Sequence[str], shardset: ShardSet) -> Vocab:
    """The tokens that a model of these cells embeds: the shard set's, and those of the conditions."""
    return LeadTokens(shardset.vocab, conditions, shardset.manifest.labels).vocab


def make_task(t: TaskSettings, model: CellModel, codes: Sequence[int] | None = None) -> Task:
    """The task that the settings ask for, on a model.

    `codes` are the model's codes for those of the shard set, of classes (annotate) or domains
    (integrate), where they differ.
    """
    if t.name == "annotate":
        assert t.label is not None
        return AnnotateTask(model, t.label, codes=codes)
    shared: dict[str, Any] = {"mvc_weight": t.mvc_weight, "zero_weight": t.zero_weight}
    if t.name == "integrate":
        assert t.domain is not None
        return IntegrateTask(
            model,
            t.domain,
            codes=codes,
            similarity_weight=t.similarity_weight,
            similarity_threshold=t.similarity_threshold,
            adversary_weight=t.adversary_weight,
            **shared,
        )
    if t.objective == "generate":
        return GenerateTask(
            model,
            prompt_weight=t.prompt_weight,
            cell_prompt_after=t.cell_prompt_after,
            **shared,
        )
    return MaskTask(model, **shared)


def check_vocab(
    tokens: Mapping[str, int], conditions: Sequence[str], shardset: ShardSet, at: str, home: str
) -> None:
    """ConfigError at `at` unless a model of these `tokens` is one of the shard set's cells.

    `home` is a folder with the vocab.json that they should have been packed with.
    """
    if dict(tokens) != model_vocab(conditions, shardset).to_dict():
        raise ConfigError(
            "the model was trained with another vocabulary than these shards were packed with",
            where=at,
            advice=f"pack the cells with --vocab {home.rstrip('/')}/vocab.json",
        )


class TaskLabels(NamedTuple):
    """The label column that a task needs, over a split, by the names that a model has for it.

    Attributes
    ----------
    column
        Of the shard set.
    codes
        The place of each of its codes among the model's names, -1 for none; None: the same.
    n_other
        Cells of classes that the model does not know, which count nothing.
    """

    column: Column
    codes: tuple[int, ...] | None
    n_other: int


def known_codes(
    t: TaskSettings, names: Sequence[str], shardset: ShardSet, split: str
) -> TaskLabels:
    """What a model with these `names` knows of a split.

    Raises
    ------
    ConfigError
        When there is no such column, or (integrate) cells are of domains that the model does not know.
    """
    assert t.needed is not None
    option = "task.label" if t.name == "annotate" else "task.domain"
    found = column(shardset, t.needed, option, split)
    pairs = zip(found.names, found.cells.tolist(), strict=True)
    unknown = {name: n for name, n in pairs if n and name not in names}
    if unknown and t.name == "integrate":
        raise ConfigError(
            f"the model was not trained on these domains: {', '.join([*unknown][:5])}",
            where=f"{shardset.storage.at('')}: {t.needed}",
            advice="evaluate on cells of the domains in domains.json",
        )
    place = {name: code for code, name in enumerate(names)}
    codes = tuple(place.get(name, -1) for name in found.names)
    is_same = codes == tuple(range(len(codes)))
    return TaskLabels(found, None if is_same else codes, sum(unknown.values()))

"""The task that settings ask for, on a model, and the tokens of its vocabulary.

Called by training.plan and applying.evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scshards.cells.vocab import Vocab
from scshards.model.transformer import CellModel
from scshards.shards.shardset import ShardSet
from scshards.streaming.collate.lead_tokens import LeadTokens
from scshards.tasks.base import Task
from scshards.tasks.finetune import AnnotateTask, IntegrateTask
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

"""Task: a model with the losses that it is trained by, as sums and counts of named terms.

    step   counts(batch) on the CPU, forward(batch, step) -> the sum of each term
    loss of a step = sum over terms of weight * sum / count, over all micro-batches and ranks

Sums and counts, never means: they add up over micro-batches and ranks. A task is what is wrapped for
several ranks, so that all forward passes of a step happen in one. pretrain and finetune
have the tasks; make makes the one that a config asks for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scshards.model.transformer import AnyBatch, CellModel, ModelOutput


class Task(nn.Module, ABC):
    """A model and its loss terms.

    Parameters
    ----------
    model
        What is trained; its state_dict has no prefix of the task.
    terms
        The weight of each term, by name. Terms of weight 0 are left out altogether.
    criterion
        The term that chooses the best model on the valid split.
    counted
        What that term is a mean over, as metrics.jsonl calls it.

    Attributes
    ----------
    terms
        {name: weight} of the terms that are left.
    figure_names
        What `figures` says.
    """

    figure_names: tuple[str, ...] = ()

    def __init__(
        self, model: CellModel, terms: Mapping[str, float], criterion: str, counted: str
    ) -> None:
        super().__init__()
        self.model = model
        self.terms = {name: weight for name, weight in terms.items() if weight}
        assert criterion in self.terms, (criterion, self.terms)
        self.criterion, self.counted = criterion, counted

    @abstractmethod
    def counts(self, batch: AnyBatch) -> dict[str, int]:
        """What each term's sum over this batch, one forward pass, is divided by."""

    def run(self, batch: AnyBatch, step: int | None) -> ModelOutput:
        """The model's output for a batch; None as step: with all that later steps have."""
        out: ModelOutput = self.model(batch)
        return out

    @abstractmethod
    def losses(self, batch: AnyBatch, out: ModelOutput) -> dict[str, Tensor]:
        """The sum of each term, 0-d float32; a term that this step does not have is not there."""

    def forward(self, batch: AnyBatch, step: int | None = None) -> dict[str, Tensor]:
        """The sum of each term over a batch on the model's device, one forward pass."""
        return self.sums(batch, self.run(batch, step))

    def sums(self, batch: AnyBatch, out: ModelOutput) -> dict[str, Tensor]:
        """The sums of `losses`, in float32 whatever the model computed in."""
        with torch.autocast(out.cell_embeddings.device.type, enabled=False):
            found = self.losses(batch, out)
        return {name: found[name] for name in self.terms if name in found}

    def tally(self, batch: AnyBatch, out: ModelOutput) -> Tensor | None:
        """Further numbers that add up over batches and ranks, for `figures`; None has none."""
        return None

    def figures(self, tally: Tensor) -> dict[str, Any]:
        """What the tallies of a whole split, added up, say: metrics by name."""
        return {}

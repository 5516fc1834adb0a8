"""Fine-tuning: cells of different domains made to look alike (`integrate`), classes (`annotate`).

Called by tasks.make.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scshards.model.loss import cross_entropy, similarity_loss
from scshards.model.transformer import AnyBatch, CellModel, ModelOutput
from scshards.tasks.base import Task
from scshards.tasks.confusion import Confusion
from scshards.tasks.pretrain import MaskTask


class IntegrateTask(MaskTask):
    """Masked values, with two terms that keep domains out of the cell embedding (scGPT's integration).

    Terms besides MaskTask's: `similarity`, elastic cell similarity (ECS) over all pairs of cells of a
    forward pass; `domain_ce`, the cross-entropy of telling domains apart, whose gradient is reversed
    on its way into the encoder. What looks at the cells of one forward pass together depends on
    run.micro_batch: `similarity`, over the pairs of a rank, and batch norm, over the cells of all ranks.

    Parameters
    ----------
    domain, codes
        The label column of the domains, and the model's code for each of the column's; None: the same.
    similarity_weight, similarity_threshold, adversary_weight
        As in TaskSettings.
    """

    def __init__(
        self,
        model: CellModel,
        domain: str,
        *,
        codes: Sequence[int] | None = None,
        mvc_weight: float = 1.0,
        zero_weight: float = 1.0,
        similarity_weight: float = 10.0,
        similarity_threshold: float = 0.8,
        adversary_weight: float = 1.0,
    ) -> None:
        more = {
            "similarity": similarity_weight,
            "domain_ce": adversary_weight if model.config.adversary else 0.0,
        }
        super().__init__(model, mvc_weight=mvc_weight, zero_weight=zero_weight, more=more)
        self._domain, self._threshold = domain, similarity_threshold
        self._recoded = _recoding(codes)

    def counts(self, batch: AnyBatch) -> dict[str, int]:
        n_cells = int((batch.weight > 0).sum())
        own = {"similarity": n_cells * n_cells, "domain_ce": n_cells}
        return super().counts(batch) | {k: n for k, n in own.items() if k in self.terms}

    def run(self, batch: AnyBatch, step: int | None) -> ModelOutput:
        c = self.model.config
        knows = c.use_domain_labels or c.domain_norm
        # Rows that only fill up a batch have no domain; they count nothing, and any will do.
        domains_B = self._domains(batch).clamp(min=0) if knows else None
        out: ModelOutput = self.model(batch, domains_B=domains_B)
        return out

    def losses(self, batch: AnyBatch, out: ModelOutput) -> dict[str, Tensor]:
        found = super().losses(batch, out)
        if "similarity" in self.terms:
            found["similarity"], _ = similarity_loss(
                out.cell_embeddings, batch.weight, threshold=self._threshold
            )
        if out.domain_logits is not None:
            found["domain_ce"], _ = cross_entropy(
                out.domain_logits, self._domains(batch), batch.weight
            )
        return found

    def _domains(self, batch: AnyBatch) -> Tensor:
        return self._recoded(batch.labels[self._domain])


class AnnotateTask(Task):
    """The class of each cell, from its embedding; cells without one count nothing.

    Term: `class_ce`, the cross-entropy over cells that have a class. Heads that predict values are
    frozen: they have no part in it, and keep what pretraining made of them.

    Parameters
    ----------
    label, codes
        The label column of the classes, and the model's code for each of the column's; None: the same.
    """

    figure_names = ("accuracy", "macro_f1")

    def __init__(self, model: CellModel, label: str, *, codes: Sequence[int] | None = None) -> None:
        super().__init__(model, {"class_ce": 1.0}, "class_ce", "n_labelled")
        self._label, self._recoded = label, _recoding(codes)
        trained = ("encoder", "value_encoder", "transformer_encoder", "cls_decoder")
        for name, part in model.named_children():
            if name not in trained:
                part.requires_grad_(False)

    def counts(self, batch: AnyBatch) -> dict[str, int]:
        return {"class_ce": int(_known(self._classes(batch), batch.weight).sum())}

    def losses(self, batch: AnyBatch, out: ModelOutput) -> dict[str, Tensor]:
        assert out.class_logits is not None
        ce, _ = cross_entropy(out.class_logits, self._classes(batch), batch.weight)
        return {"class_ce": ce}

    def tally(self, batch: AnyBatch, out: ModelOutput) -> Tensor:
        """int64 [classes, classes]: cells by their class and the one that is predicted."""
        assert out.class_logits is not None
        n = out.class_logits.shape[1]
        codes_B = self._classes(batch)
        known = _known(codes_B, batch.weight)
        at = codes_B[known] * n + out.class_logits[known].argmax(dim=1)
        return torch.bincount(at, minlength=n * n).reshape(n, n)

    def figures(self, tally: Tensor) -> dict[str, Any]:
        """Accuracy, and the mean of the F1 of each class that a cell has or is predicted to have."""
        found = Confusion(tuple(map(str, range(len(tally)))), tally.long().numpy())
        return {"accuracy": found.accuracy, "macro_f1": found.macro_f1}

    def _classes(self, batch: AnyBatch) -> Tensor:
        return self._recoded(batch.labels[self._label])


def _recoding(table: Sequence[int] | None) -> Callable[[Tensor], Tensor]:
    """table[code] of each code, -1 for -1; a table of None leaves codes as they are."""
    if table is None:
        return lambda codes_B: codes_B
    # Brought to each device once: to bring it in each step would wait for the device.
    there = functools.cache(torch.tensor([*table, -1]).to)
    return lambda codes_B: there(codes_B.device)[codes_B]


def _known(codes_B: Tensor, weight_B: Tensor) -> Tensor:
    return (codes_B >= 0) & (weight_B > 0)

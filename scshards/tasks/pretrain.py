"""Pretraining: values that are masked are predicted (`mask`), or those of unknown genes (`generate`).

Called by tasks.make; tasks.finetune builds on MaskTask.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.loss import masked_squared_error, zero_log_loss
from scshards.model.transformer import AnyBatch, CellModel, ModelOutput
from scshards.tasks.base import Task


class MaskTask(Task):
    """Masked values, predicted from the cell's other values, and again from its embedding (MVC).

    Terms: `masked_mse`, `mvc_mse`: squared errors over masked values; `zero_nll`, `mvc_zero_nll`: the
    negative log likelihood that they are above zero or not, where the model says how likely that is.

    Parameters
    ----------
    mvc_weight
        Of what is made of the cell embedding; a model without that head has none.
    zero_weight
        Of the likelihoods.
    more
        Further terms of a subclass.
    """

    def __init__(
        self,
        model: CellModel,
        *,
        mvc_weight: float = 1.0,
        zero_weight: float = 1.0,
        more: Mapping[str, float] | None = None,
    ) -> None:
        mvc = mvc_weight if model.config.mvc else 0.0
        zero = zero_weight if model.config.explicit_zero_prob else 0.0
        own = {"masked_mse": 1.0, "mvc_mse": mvc, "zero_nll": zero, "mvc_zero_nll": mvc * zero}
        super().__init__(model, own | dict(more or {}), "masked_mse", "n_masked")
        _freeze_idle(self)

    def counts(self, batch: AnyBatch) -> dict[str, int]:
        assert isinstance(batch, Batch | PackedBatch)
        masked = batch.is_masked
        if isinstance(batch, Batch):  # the rows that fill up a packed batch hold no gene
            masked = masked & (batch.weight > 0)[:, None]
        return dict.fromkeys(self.terms, int(masked.sum()))

    def run(self, batch: AnyBatch, step: int | None) -> ModelOutput:
        out: ModelOutput = self.model(batch)
        return out

    def losses(self, batch: AnyBatch, out: ModelOutput) -> dict[str, Tensor]:
        assert isinstance(batch, Batch | PackedBatch)
        return value_losses(
            {
                "masked_mse": out.predictions,
                "mvc_mse": out.mvc_predictions,
                "zero_nll": out.zero_probs,
                "mvc_zero_nll": out.mvc_zero_probs,
            },
            batch.targets,
            batch.is_masked,
            None if isinstance(batch, PackedBatch) else batch.weight,
        )


class GenerateTask(Task):
    """Values of unknown genes, predicted from the known ones: scGPT's generative pretraining.

    Terms: `unknown_mse`, by gene prompt; `mvc_mse`, from the cell embedding; `prompt_mse`, by a second
    pass in which the embedding, its gradient cut off, stands in the place of `<cls>`; and the
    likelihoods of MaskTask.

    Parameters
    ----------
    prompt_weight, cell_prompt_after
        Of the second pass, which begins at that step, counted from 0; evaluations always make it.
    """

    def __init__(
        self,
        model: CellModel,
        *,
        mvc_weight: float = 1.0,
        zero_weight: float = 1.0,
        prompt_weight: float = 1.0,
        cell_prompt_after: int = 1000,
    ) -> None:
        mvc = mvc_weight if model.config.mvc else 0.0
        zero = zero_weight if model.config.explicit_zero_prob else 0.0
        terms = {
            "unknown_mse": 1.0,
            "mvc_mse": mvc,
            "prompt_mse": prompt_weight,
            "zero_nll": zero,
            "mvc_zero_nll": mvc * zero,
        }
        super().__init__(model, terms, "unknown_mse", "n_unknown")
        _freeze_idle(self)
        self._after = cell_prompt_after

    def counts(self, batch: AnyBatch) -> dict[str, int]:
        assert isinstance(batch, GenerateBatch)
        n = int((~batch.unknown_is_pad & (batch.weight > 0)[:, None]).sum())
        return dict.fromkeys(self.terms, n)

    def run(self, batch: AnyBatch, step: int | None) -> ModelOutput:
        has_prompt = "prompt_mse" in self.terms and (step is None or step >= self._after)
        has_prompt &= isinstance(
            batch, GenerateBatch
        )  # cells that are shown whole have nothing to ask
        out: ModelOutput = self.model(batch, cell_prompt=has_prompt)
        return out

    def losses(self, batch: AnyBatch, out: ModelOutput) -> dict[str, Tensor]:
        assert isinstance(batch, GenerateBatch)
        return value_losses(
            {
                "unknown_mse": out.predictions,
                "mvc_mse": out.mvc_predictions,
                "prompt_mse": out.prompt_predictions,
                "zero_nll": out.zero_probs,
                "mvc_zero_nll": out.mvc_zero_probs,
            },
            batch.unknown_targets,
            ~batch.unknown_is_pad,
            batch.weight,
        )


def value_losses(
    predicted: Mapping[str, Tensor | None],
    targets: Tensor,
    is_asked: Tensor,
    weight_B: Tensor | None,
) -> dict[str, Tensor]:
    """The sum of each term, by its predictions: squared errors, or likelihoods where it ends in nll."""
    out = {}
    for term, values in predicted.items():
        if values is not None:
            error = zero_log_loss if term.endswith("_nll") else masked_squared_error
            out[term], _ = error(values, targets, is_asked, weight_B)
    return out


def _freeze_idle(task: Task) -> None:
    """Heads whose terms weigh nothing are not trained: DDP waits for a gradient of all that are."""
    decoder, mvc = task.model.decoder, task.model.mvc_decoder
    heads = {
        "zero_nll": decoder.zero_logit,
        "mvc_mse": mvc,
        "mvc_zero_nll": mvc and mvc.W_zero_logit,
    }
    for term, head in heads.items():
        if head is not None and term not in task.terms:
            head.requires_grad_(False)

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
    prompt_weight
        Of `prompt_mse`, a term of GenerateTask.
    more
        Further terms of a subclass.
    """

    asked = "masked"
    """What is said of the values that are asked for, in the names of terms."""

    def __init__(
        self,
        model: CellModel,
        *,
        mvc_weight: float = 1.0,
        zero_weight: float = 1.0,
        prompt_weight: float = 0.0,
        more: Mapping[str, float] | None = None,
    ) -> None:
        mvc = mvc_weight if model.config.mvc else 0.0
        zero = zero_weight if model.config.explicit_zero_prob else 0.0
        terms = {
            f"{self.asked}_mse": 1.0,
            "mvc_mse": mvc,
            "prompt_mse": prompt_weight,
            "zero_nll": zero,
            "mvc_zero_nll": mvc * zero,
            **(more or {}),
        }
        super().__init__(model, terms, f"{self.asked}_mse", f"n_{self.asked}")
        # Heads whose terms weigh nothing are not trained: DDP waits for a gradient of all that are.
        heads = {
            "zero_nll": model.decoder.zero_logit,
            "mvc_mse": model.mvc_decoder,
            "mvc_zero_nll": model.mvc_decoder and model.mvc_decoder.W_zero_logit,
        }
        for term, head in heads.items():
            if head is not None and term not in self.terms:
                head.requires_grad_(False)

    def counts(self, batch: AnyBatch) -> dict[str, int]:
        _, is_asked, weight_B = self._values(batch)
        if weight_B is not None:
            is_asked = is_asked & (weight_B > 0)[:, None]
        return dict.fromkeys(self.terms, int(is_asked.sum()))

    def losses(self, batch: AnyBatch, out: ModelOutput) -> dict[str, Tensor]:
        predicted = {
            f"{self.asked}_mse": out.predictions,
            "mvc_mse": out.mvc_predictions,
            "prompt_mse": out.prompt_predictions,
            "zero_nll": out.zero_probs,
            "mvc_zero_nll": out.mvc_zero_probs,
        }
        found, asked = {}, self._values(batch)
        for term, values in predicted.items():
            if values is not None:
                error = zero_log_loss if term.endswith("_nll") else masked_squared_error
                found[term], _ = error(values, *asked)
        return found

    def _values(self, batch: AnyBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """All values, which of them are asked for, and what each cell weighs."""
        assert isinstance(batch, Batch | PackedBatch)
        # The rows that fill up a packed batch hold no gene.
        weight_B = None if isinstance(batch, PackedBatch) else batch.weight
        return batch.targets, batch.is_masked, weight_B


class GenerateTask(MaskTask):
    """Values of unknown genes, predicted from the known ones: scGPT's generative pretraining.

    Terms: `unknown_mse`, by gene prompt; `mvc_mse`, from the cell embedding; `prompt_mse`, by a second
    pass in which the embedding, its gradient cut off, stands in the place of `<cls>`; and the
    likelihoods of MaskTask.

    Parameters
    ----------
    prompt_weight, cell_prompt_after
        Of the second pass, which begins at that step, counted from 0; evaluations always make it.
    """

    asked = "unknown"

    def __init__(
        self,
        model: CellModel,
        *,
        mvc_weight: float = 1.0,
        zero_weight: float = 1.0,
        prompt_weight: float = 1.0,
        cell_prompt_after: int = 1000,
    ) -> None:
        super().__init__(
            model, mvc_weight=mvc_weight, zero_weight=zero_weight, prompt_weight=prompt_weight
        )
        self._after = cell_prompt_after

    def run(self, batch: AnyBatch, step: int | None) -> ModelOutput:
        has_prompt = "prompt_mse" in self.terms and (step is None or step >= self._after)
        # Cells that are shown whole have nothing to ask.
        has_prompt &= isinstance(batch, GenerateBatch)
        out: ModelOutput = self.model(batch, cell_prompt=has_prompt)
        return out

    def _values(self, batch: AnyBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        assert isinstance(batch, GenerateBatch)
        return batch.unknown_targets, ~batch.unknown_is_pad, batch.weight

"""Pretraining: masked values are predicted (`mask`).

Called by tasks_setup.
"""

from __future__ import annotations

from torch import Tensor

from scshards.cells.batch import Batch, PackedBatch
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel, ModelOutput
from scshards.train.micro import AnyBatch
from scshards.train.tasks import Task


class MaskTask(Task):
    """Squared errors of the values that a cell's other values hide, by token and by cell (MVC).

    Parameters
    ----------
    mvc_weight
        Of the errors of predictions made from the cell embedding; a model without that head has none.
    """

    def __init__(self, model: CellModel, *, mvc_weight: float = 1.0) -> None:
        terms = {"masked_mse": 1.0, "mvc_mse": mvc_weight if model.config.mvc else 0.0}
        super().__init__(model, terms, "masked_mse", "n_masked")

    def counts(self, batch: AnyBatch) -> dict[str, int]:
        assert isinstance(batch, Batch)
        n = int((batch.is_masked & (batch.weight > 0)[:, None]).sum())
        return dict.fromkeys(self.terms, n)

    def run(self, batch: AnyBatch, step: int | None) -> ModelOutput:
        assert isinstance(batch, Batch)
        return self.model(batch)

    def losses(self, batch: AnyBatch, out: ModelOutput) -> dict[str, Tensor]:
        assert isinstance(batch, Batch | PackedBatch)
        found = {"masked_mse": _squared(out.predictions, batch)}
        if out.mvc_predictions is not None:
            found["mvc_mse"] = _squared(out.mvc_predictions, batch)
        return found


def _squared(predictions: Tensor, batch: Batch | PackedBatch) -> Tensor:
    return masked_squared_error(predictions, batch.targets, batch.is_masked, batch.weight)[0]

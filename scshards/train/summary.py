"""What a call of `train` did, in figures: what `scshards train` prints at its end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from scshards.base.progress import duration

CRITERIA = {
    "masked_mse": "masked MSE",
    "unknown_mse": "MSE of unknown genes",
    "class_ce": "cross-entropy of classes",
}
"""How people read the names of the terms that choose a best model."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a call of `train` did, and where the run is now.

    Attributes
    ----------
    start, step, total_steps
        The step this call began at, the one it ended at, and the last of the run.
    epochs, cells
        Passes over the train split and cells trained on, over all starts of the run.
    seconds
        Training time over all starts of the run, evaluations and saves included.
    criterion
        The loss term that the next two are of.
    train_loss
        Of the last log line, None when this call took no step.
    best_step, best_loss
        The best validation, None without a valid split.
    stopped_by
        The signal that ended it, None when it reached its last step.
    """

    run: str
    start: int
    step: int
    total_steps: int
    epochs: float
    cells: int
    parameters: int
    ranks: int
    device: str
    precision: str
    seconds: float
    criterion: str
    train_loss: float | None
    best_step: int | None
    best_loss: float | None
    stopped_by: str | None

    def tables(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def text(self) -> str:
        """A few lines for a person, with how to go on when the run was stopped."""
        what = CRITERIA[self.criterion]
        places = f"{self.ranks} rank{'s' if self.ranks > 1 else ''} on {self.device}"
        lines = [
            f"run:        {self.run}",
            f"model:      {self.parameters:,} parameters, {self.precision}, {places}",
            f"trained:    step {self.step:,} of {self.total_steps:,}, {self.cells:,} cells "
            f"({self.epochs:.2f} epochs) in {duration(self.seconds)}",
        ]
        if self.train_loss is not None:
            lines.append(f"train:      {what} {self.train_loss:.4g}")
        if self.best_loss is None:
            lines.append("valid:      no evaluation; best_model.pt is the latest model")
        else:
            lines.append(
                f"valid:      {what} {self.best_loss:.4g} at step {self.best_step:,} "
                "(best_model.pt)"
            )
        if self.stopped_by is not None:
            lines.append(
                f"stopped by {self.stopped_by} after step {self.step:,}: saved; "
                "the same command goes on from there"
            )
        elif self.start >= self.total_steps:
            lines.append("nothing was left to do: raise run.steps or run.epochs to train on")
        return "\n".join(lines)

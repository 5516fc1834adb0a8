"""What a call of `train` does and did, in a few figures: beside the progress bar, and at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scshards.base.progress import duration
from scshards.training.prepare import Run
from scshards.training.settings import LOSS, VALID

CRITERIA = {
    "masked_mse": "masked MSE",
    "unknown_mse": "MSE of unknown genes",
    "class_ce": "cross-entropy of classes",
}
"""How people read the names of the terms that choose a best model."""

TOLD = {
    "accuracy": ("accuracy", "{:.1%}"),
    "macro_f1": ("macro F1", "{:.3f}"),
    "avg_bio": ("avg_bio", "{:.3f}"),
    "knn_accuracy": ("kNN accuracy", "{:.1%}"),
    "linear_accuracy": ("linear accuracy", "{:.1%}"),
}
"""The figures that people look for, in words, and how they are written."""


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
    parameters, trained
        Numbers of the model, and how many of them the optimizer has.
    train_loss
        Of the last log line, None when this call took no step.
    best_step, best_by, best
        The best evaluation, None without one; the figure that chose it, and all its figures by name.
    terms
        The loss terms of the last log line, by name.
    rates
        Cells and tokens a second, MFU where it is known, the share of data wait and memory, as in
        metrics.jsonl, but over all log lines of this call without the first, which waits for things
        to start (unless it is the only one); {} when it took no step.
    stopped_by
        The signal that ended it, None when it reached its last step.
    refused
        Why the same command would not go on from there, and what to do; None where it does.
    """

    run: str
    start: int
    step: int
    total_steps: int
    epochs: float
    cells: int
    parameters: int
    trained: int
    ranks: int
    device: str
    precision: str
    seconds: float
    criterion: str
    train_loss: float | None
    best_step: int | None
    best_by: str
    best: dict[str, float]
    terms: dict[str, float]
    rates: dict[str, float]
    stopped_by: str | None
    refused: str | None = None

    def tables(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"best_loss": self.best_loss}

    @property
    def best_loss(self) -> float | None:
        """The loss of the best evaluation on the split valid."""
        return self.best.get(LOSS)

    def text(self) -> str:
        """A few lines for a person, with how to go on when the run was stopped."""
        what = CRITERIA[self.criterion]
        lines = [
            f"run:        {self.run}",
            "model:      "
            + _model(self.parameters, self.trained, self.precision, self.ranks, self.device),
            f"trained:    step {self.step:,} of {self.total_steps:,}, {self.cells:,} cells "
            f"({self.epochs:.2f} epochs) in {duration(self.seconds)}",
        ]
        if self.rates:
            lines.append(f"speed:      {_speed(self.rates)}")
        if self.train_loss is not None:
            others = [f"{k} {v:.4g}" for k, v in self.terms.items() if k != self.criterion]
            lines.append("train:      " + ", ".join([f"{what} {self.train_loss:.4g}", *others]))
        if self.best_step is None:
            lines.append(
                "valid:      no evaluation, or none that is finite; best_model.pt is the latest model"
            )
        else:
            lines += [f"{at + ':':<11} {said}" for at, said in self._best().items()]
            at, _, figure = self.best_by.rpartition("/")
            by = self._words(figure)[0] + (f" of {at}" if at else "")
            lines.append(f"best:       step {self.best_step:,}, by {by} (best_model.pt)")
        if self.stopped_by is not None:
            then = "the same command goes on from there"
            if self.refused is not None:
                then = f"the same command does not go on from there: {self.refused}"
            lines.append(f"stopped by {self.stopped_by} after step {self.step:,}: saved; {then}")
        elif self.start >= self.total_steps:
            lines.append("nothing was left to do: raise run.steps or run.epochs to train on")
        return "\n".join(lines)

    def _words(self, figure: str) -> tuple[str, str]:
        """What people call a figure, and how it is written."""
        of_loss = CRITERIA[self.criterion] if figure in (LOSS, self.criterion) else figure
        return TOLD.get(figure, (of_loss, "{:.4g}"))

    def _best(self) -> dict[str, str]:
        """Of each set of cells, the figures of the best evaluation that a person looks for."""
        sets: dict[str, list[str]] = {}
        for name, value in self.best.items():
            at, _, figure = name.rpartition("/")
            is_asked = name == self.best_by and figure != self.criterion
            if figure == LOSS or figure in TOLD or is_asked:
                words, form = self._words(figure)
                sets.setdefault(at or VALID, []).append(f"{words} {form.format(value)}")
        return {name: ", ".join(said) for name, said in sets.items()}


def opening(run: Run) -> str:
    """What a run is about to do, a few lines before its first step."""
    start, total, about = run.state.step, run.total, run.about()
    cells = {"train": run.loader.cells, **run.held_out.cells}
    told = [f"{n:,} {split}" for split, n in cells.items() if n]
    most = run.config.collate.max_length
    lines = [
        f"model:      {_model(**about)}",
        f"cells:      {', '.join(told)}; at most {most:,} tokens of each",
        f"steps:      {total:,} of {run.config.run.batch_size:,} cells, "
        f"{total / run.steps_per_epoch:.3g} epochs"
        + (f"; on from step {start:,}" if start else ""),
    ]
    return "\n".join(lines)


def found_note(figures: Mapping[str, float]) -> str:
    """What `progress_note` says of the last evaluation."""
    if LOSS not in figures:
        return ""
    right = f", {figures['accuracy']:.1%} right" if "accuracy" in figures else ""
    return f"{VALID} {figures[LOSS]:.4g}{right}"


def progress_note(
    step: int,
    criterion: str,
    terms: Mapping[str, float],
    line: Mapping[str, Any],
    found: str = "",
) -> str:
    """What stands beside the progress bar after a log line; what is found last is cut off first."""
    parts = [f"step {step}"]
    if criterion in terms:
        parts.append(f"{CRITERIA[criterion]} {terms[criterion]:.4g}")
    parts += [found] if found else []
    if len(terms) > 1:
        parts.append(f"loss {line['loss']:.4g}")
    parts += [f"lr {line['lr']:.2e}", f"{line['cells_per_s']:,.0f} cells/s"]
    if "mfu" in line:
        parts.append(f"MFU {100 * line['mfu']:.1f}%")
    return ", ".join([*parts, f"data wait {100 * line['data_wait']:.1f}%"])


def _model(parameters: int, trained: int, precision: str, ranks: int, device: str) -> str:
    places = f"{ranks} rank{'s' if ranks > 1 else ''} on {device}"
    of_them = f" ({trained:,} of them trained)" if trained < parameters else ""
    return f"{parameters:,} parameters{of_them}, {precision}, {places}"


def _speed(rates: dict[str, float]) -> str:
    padding = rates["padded_tokens_per_s"] / rates["tokens_per_s"] - 1
    mfu = f", MFU {100 * rates['mfu']:.1f}%" if "mfu" in rates else ""
    if "genes_cut" in rates:
        mfu += f", {100 * rates['genes_cut']:.1f}% of genes cut to fit data.tokens_per_batch"
    return (
        f"{rates['cells_per_s']:,.0f} cells/s, {rates['tokens_per_s']:,.0f} tokens/s "
        f"({100 * padding:.0f}% padding on top){mfu}, data wait {100 * rates['data_wait']:.1f}%, "
        f"{rates['memory_bytes'] / 1e9:.2f} GB"
    )

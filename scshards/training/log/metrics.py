"""metrics.jsonl: one JSON object per log step and per evaluation; and the sums behind them.

    {"kind": "train", "step": 20, "epoch": 0.4, "loss": ..., "masked_mse": ..., "cells_per_s": ...}
    {"kind": "valid", "step": 20, "epoch": 0.4, "masked_mse": ..., "mvc_mse": ..., "is_best": true}

Every line goes to the run's trackers as well. `docs/reference/metrics.md` lists every field.
Called by the loop; read by plot.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scshards.base.errors import CheckpointError, StorageError
from scshards.base.records import Count, Damaged, from_tree, read_json
from scshards.model.config import ModelConfig
from scshards.ranks.ranks import Ranks
from scshards.training.log.flops import training_flops
from scshards.training.log.trackers import Tracker, numbers_of
from scshards.training.step import StepResult

MEASURED = frozenset(
    {
        *("steps", "loss", "lr", "grad_norm"),
        *("cells_per_s", "tokens_per_s", "padded_tokens_per_s", "mfu", "data_wait", "memory_bytes"),
        "genes_cut",
        *("slowest_step_s", "fastest_step_s", "data_waits"),
    }
)
"""The fields of a train line that are no loss term; all others are."""

TERMS = {
    "masked_mse": ("Masked values", "mean squared error"),
    "unknown_mse": ("Unknown genes", "mean squared error"),
    "mvc_mse": ("From the cell embedding (MVC)", "mean squared error"),
    "prompt_mse": ("Prompted by the cell embedding", "mean squared error"),
    "zero_nll": ("Above zero or not", "negative log likelihood"),
    "mvc_zero_nll": ("Above zero or not (MVC)", "negative log likelihood"),
    "similarity": ("Similarity of cells (ECS)", "loss"),
    "domain_ce": ("Domains, by the adversary", "cross-entropy"),
    "class_ce": ("Classes", "cross-entropy"),
}
"""Titles and units of loss terms, for pictures; a term that isn't here is called by its own name."""

PROMPT = "prompt_mse"
"""The loss term of the second pass, which a step has or has not."""


class MetricsLog:
    """Appends lines to metrics.jsonl; lines of steps after `step` are dropped first.

    A run that is resumed at step 20 takes step 21 again, so what an earlier start wrote about it,
    and a line that was cut off, would stand there twice.
    """

    def __init__(
        self, path: Path, step: int, *, enabled: bool = True, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._path, self._enabled, self._trackers = path, enabled, trackers
        if not enabled:
            return
        kept = [m for m in read_metrics(path) if m["step"] <= step] if step else []
        temporary = path.with_suffix(".partial")
        with self._told():
            temporary.write_text("".join(json.dumps(m) + "\n" for m in kept))
            temporary.replace(path)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line; NaN and infinity become null. StorageError when the disk is full."""
        if not self._enabled:
            return
        line = {"kind": kind, "step": step} | {k: _plain(v) for k, v in values.items()}
        with self._told(), self._path.open("a") as f:
            f.write(json.dumps(line, allow_nan=False) + "\n")
        if numbers := numbers_of({k: line[k] for k in values}):
            for tracker in self._trackers:
                tracker(kind, step, numbers)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise StorageError(
                f"the metrics can't be written: {e.strerror}",
                where=self._path,
                advice="free some space; the same command goes on from the latest checkpoint",
            ) from None


@dataclass(frozen=True)
class _Line:
    """What every line of a metrics.jsonl has."""

    kind: str
    step: Count


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; [] when there is no file.

    Raises
    ------
    CheckpointError
        For a line that can't be one; it is told which.
    """
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")  # what was cut off, if anything, is the last one
    out = []
    for number, text in enumerate(whole, 1):
        try:
            line = read_json(text)
            from_tree(_Line, line, others=True)
        except Damaged as e:
            raise CheckpointError(
                f"the line can't be read: {e}",
                where=f"{path}, line {number}",
                advice="remove that line: nothing but pictures is made of it",
            ) from None
        out.append(line)
    return out


class Window:
    """What the steps since the last log line add up to.

    Parameters
    ----------
    weights
        Those of the loss terms, by name.
    model
        What the arithmetic of a step is a function of.
    peak
        FLOP/s of each rank's device at most; None where nobody knows, and there is no MFU then.
    """

    def __init__(
        self, ranks: Ranks, weights: Mapping[str, float], model: ModelConfig, peak: float | None
    ) -> None:
        self._ranks, self._weights = ranks, dict(weights)
        self._model, self._peak = model, peak
        self._last: StepResult | None = None
        self._whole = torch.zeros(7, dtype=torch.float64)
        self._windows = 0
        self._clear()

    def took(self, seconds: float, *, waited: float) -> None:
        """Count the time of a step, `waited` of it for a batch."""
        self._seconds += seconds
        self._waited += waited

    def add(self, result: StepResult) -> None:
        """Count what a step did."""
        amounts = result.amounts
        self._sums += result.sums
        self._counts += result.counts
        self._tokens += torch.tensor(
            [amounts.encoded, result.padded_tokens, amounts.cells, amounts.cut]
        )
        self._steps += 1
        self._last = result
        if self._peak is not None:
            has_prompt = PROMPT in result.terms and result.counts[result.terms.index(PROMPT)] > 0
            self._flops += training_flops(self._model, amounts, cell_prompt=bool(has_prompt))

    def close(self) -> dict[str, Any]:
        """The window's metrics over all ranks, and an empty window; every rank must call it."""
        assert self._last is not None
        own = [*self._tokens.tolist(), self._seconds, self._waited, self._flops]
        total = torch.tensor(self._ranks.total([*own, *self._sums.tolist()]), dtype=torch.float64)
        measured, sums = total[: len(own)], total[len(own) :]
        self._windows += 1
        # The first one waits for the stream to start, and for what is compiled or tuned once.
        self._whole = measured if self._windows <= 2 else self._whole + measured
        means = {
            term: float(s / n) if n else None
            for term, s, n in zip(self._weights, sums, self._counts, strict=True)
        }
        values = {
            "steps": self._steps,
            "loss": sum(w * (means[t] or 0.0) for t, w in self._weights.items()),
            **means,
            "lr": self._last.lr,
            "grad_norm": self._last.grad_norm,
            **self._rates(measured),
            **self._by_rank(),
        }
        self._clear()
        return values

    def _by_rank(self) -> dict[str, Any]:
        """The mean time of a step on the slowest and the fastest rank, and each rank's data wait."""
        if self._ranks.world_size == 1:
            return {}
        each = self._ranks.gather((self._seconds / self._steps, self._waited / self._seconds))
        seconds = [s for s, _ in each]
        waits = [w for _, w in each]
        return {
            "slowest_step_s": max(seconds), "fastest_step_s": min(seconds), "data_waits": waits
        }  # fmt: skip

    def whole(self) -> dict[str, float]:
        """The rates over all windows but the first, if there are more; {} before it."""
        return self._rates(self._whole) if self._windows else {}

    def _rates(self, measured: Tensor) -> dict[str, float]:
        tokens, padded, cells, cut, seconds, waited, flops = measured.tolist()
        wall = seconds / self._ranks.world_size
        return {
            "cells_per_s": cells / wall,
            "tokens_per_s": tokens / wall,
            "padded_tokens_per_s": padded / wall,
            **({} if self._peak is None else {"mfu": flops / (seconds * self._peak)}),
            **({"genes_cut": cut / (cut + tokens)} if cut else {}),
            "data_wait": waited / seconds,
            "memory_bytes": self._ranks.memory(),
        }

    def _clear(self) -> None:
        self._sums = torch.zeros(len(self._weights), dtype=torch.float64)
        self._counts = torch.zeros(len(self._weights), dtype=torch.float64)
        self._tokens = torch.zeros(4, dtype=torch.int64)
        self._steps = 0
        self._seconds = self._waited = self._flops = 0.0


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

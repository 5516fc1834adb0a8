"""A moving average of the weights, which often scores better than the weights of any one step.

`update` follows each optimizer step, `swapped` stands around an evaluation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- d average + (1 - d) weights, after every step.

    d is ``min(decay, (1 + step) / (10 + step))``, a pure function of the step, so that the average
    leaves the random weights of the beginning behind; nothing but the average itself is saved. It
    has the parameters that are trained: others, and buffers, are the model's own.

    Parameters
    ----------
    model
        The model whose parameters are averaged, sharded (FSDP2) or not; the average is sharded alike.
    decay
        Below 1; about ``1 / (1 - decay)`` steps are averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._decay = decay
        self._average = {n: p.detach().clone() for n, p in self._parameters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the name of their parameter: the very tensors, to save or to load into."""
        return self._average

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step` (from 0)."""
        d = decay_at(step, self._decay)
        weights: list[Tensor] = list(self._parameters.values())
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - d)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own, to the bit, afterwards."""
        kept = {n: p.detach().clone() for n, p in self._parameters.items()}
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(values[name])


def decay_at(step: int, decay: float) -> float:
    """The decay of a step, counted from 0."""
    return min(decay, (1 + step) / (10 + step))

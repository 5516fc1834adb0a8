"""What happens to a step whose loss or gradient is not finite: it is left out, and too many end the run.

    seed        a sum of the loss that is not finite -> a gradient that is NaN throughout, on all ranks
    update      nothing changes where its norm is not finite (training.optim)
    judge       a step later: who made it so; `too_many` in a row end the run

The device decides, so that the host need not wait for it. Called by the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scshards.base.errors import ScshardsError
from scshards.ranks.ranks import Ranks


@dataclass(frozen=True)
class Skip:
    """A step that was left out: why, and the keys of the cells that made it bad, or of all its cells."""

    why: str
    cells: list[str]


def seed(sums: Tensor) -> Tensor:
    """What a backward pass starts from, 0-d: 1, or NaN if a sum of the loss is not finite.

    A loss that is not finite can have a gradient that is; by this it has not, and as gradients are
    averaged, no rank has a finite one.
    """
    return torch.where(sums.isfinite().all(), 1.0, torch.nan)


def judge(ranks: Ranks, losses: list[float], norm: float, cells: list[str]) -> Skip | None:
    """None for a good step; every rank must call it, and all get the same answer.

    Parameters
    ----------
    losses
        This rank's summed losses.
    norm
        The norm of the gradient over all ranks.
    cells
        The keys of this rank's cells.
    """
    if math.isfinite(norm):
        return None
    # The averaged gradient is not finite on every rank; name the cells of those that made it so.
    is_mine = not all(map(math.isfinite, losses))
    said = ranks.gather((is_mine, cells))
    if any(bad for bad, _ in said):
        return Skip("the loss is not finite", [k for bad, some in said if bad for k in some])
    why = f"the loss is finite but the gradient is not (norm {norm})"
    return Skip(why, [k for _, some in said for k in some])


def too_many(skip: Skip, step: int, most: int) -> ScshardsError:
    """What ends a run when step number `step`, from 0, is bad as the `most` before it were."""
    before = f" after {most} such steps in a row" if most else ""
    return ScshardsError(
        f"step {step + 1}: {skip.why}{before}; the weights were left as they were",
        where=f"cells {', '.join(skip.cells)}",
        advice="lower optim.lr, lengthen optim.warmup_steps, or use run.precision=fp32; "
        "the same command goes on from the latest checkpoint",
    )

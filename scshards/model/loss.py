"""Errors of predicted values, as sums and counts: never means, which can't be added up over ranks.

The caller (train) adds sums and counts over micro-batches and ranks and divides once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_squared_error(
    predictions_BL: Tensor, targets_BL: Tensor, is_masked_BL: Tensor, weight_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of squared errors over the masked positions, and how many there are.

    sum / count over a whole batch is scGPT's `masked_mse`.

    Parameters
    ----------
    predictions_BL, targets_BL
        float [B, L].
    is_masked_BL
        bool [B, L], `Batch.is_masked`: the positions that count.
    weight_B
        float [B], `Batch.weight`: what each cell's positions count. Nothing that a row of weight 0
        holds, NaN included, reaches the sum, the count or a gradient.

    Returns
    -------
    tuple of Tensor
        Sum and count, both 0-d float32 on the inputs' device; 0 and 0 when nothing is masked. Add
        up many of them in float64: a float32 count stalls at 2**24.
    """
    counts_BL, error_BL = _masked_difference(predictions_BL, targets_BL, is_masked_BL, weight_B)
    return (counts_BL * error_BL.square()).sum(), counts_BL.sum()


def masked_relative_error(
    predictions_BL: Tensor, targets_BL: Tensor, is_masked_BL: Tensor, weight_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of |prediction - target| / (target + 1e-6) over the masked positions, and their count.

    As `masked_squared_error`; sum / count is what scGPT reports as `mre`. Targets are bins, 1 and
    up: a target of 0 makes it huge.
    """
    counts_BL, error_BL = _masked_difference(predictions_BL, targets_BL, is_masked_BL, weight_B)
    scale_BL = torch.where(counts_BL > 0, targets_BL.float() + 1e-6, 1.0)
    return (counts_BL * error_BL.abs() / scale_BL).sum(), counts_BL.sum()


def _masked_difference(
    predictions_BL: Tensor, targets_BL: Tensor, is_masked_BL: Tensor, weight_B: Tensor
) -> tuple[Tensor, Tensor]:
    counts_BL = is_masked_BL * weight_B.float().unsqueeze(1)
    # Selected, not multiplied by 0: 0 * NaN is NaN, in the sum and again in the gradient.
    error_BL = torch.where(counts_BL > 0, predictions_BL.float() - targets_BL.float(), 0.0)
    return counts_BL, error_BL

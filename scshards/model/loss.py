"""Errors of what a model predicts, as sums and counts: never means, which can't be added up over ranks.

The caller (train) adds sums and counts over micro-batches and ranks and divides once. Whatever a cell
of weight 0 holds, NaN included, reaches no sum, count or gradient. Sums and counts are 0-d float32 on
the inputs' device, 0 and 0 when nothing counts. Add up many of them in float64: a float32 count
stalls at 2**24.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def masked_squared_error(
    predictions_BL: Tensor,
    targets_BL: Tensor,
    is_masked_BL: Tensor,
    weight_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of squared errors over the masked positions, and how many there are.

    sum / count over a whole batch is scGPT's `masked_mse`.

    Parameters
    ----------
    predictions_BL, targets_BL
        float [B, L], or of any one shape.
    is_masked_BL
        bool, of the same shape: the positions that count, `Batch.is_masked`, or
        `~GenerateBatch.unknown_is_pad`.
    weight_B
        float [B], `Batch.weight`: what each cell's positions count. None counts each once; a
        PackedBatch masks nothing in cells of weight 0.
    """
    counts_BL = _counts(is_masked_BL, weight_B)
    # Selected, not multiplied by 0: 0 * NaN is NaN, in the sum and again in the gradient.
    error_BL = torch.where(counts_BL > 0, predictions_BL.float() - targets_BL.float(), 0.0)
    return (counts_BL * error_BL.square()).sum(), counts_BL.sum()


def zero_log_loss(
    zero_probs_BL: Tensor,
    targets_BL: Tensor,
    is_masked_BL: Tensor,
    weight_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of -log p(the value is zero, or is not) over the masked positions, and their count.

    As `masked_squared_error`, of `ModelOutput.zero_probs`: p where the target is above 0, 1 - p
    elsewhere. sum / count is scGPT's `criterion_neg_log_bernoulli`. Probabilities are kept off 0 and
    1 by float32's epsilon, as torch.distributions does.
    """
    counts_BL = _counts(is_masked_BL, weight_B)
    eps = torch.finfo(torch.float32).eps
    probs_BL = torch.where(counts_BL > 0, zero_probs_BL.float(), 0.5).clamp(eps, 1 - eps)
    right_BL = torch.where(targets_BL > 0, probs_BL.log(), torch.log1p(-probs_BL))
    return -(counts_BL * right_BL).sum(), counts_BL.sum()


def similarity_loss(
    cells_BD: Tensor, weight_B: Tensor, *, threshold: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Sum of 1 - (max(cosine, 0) - threshold)^2 over all pairs of cells, and how many pairs there are.

    scGPT's elastic cell similarity (ECS): cells that are alike are drawn together, others apart. As
    there, a cell makes a pair with itself too, of cosine 0; sum / count of a whole batch is its
    `loss_ecs`. Pairs are those within the (micro-)batch.

    Parameters
    ----------
    cells_BD
        float [B, D]: `ModelOutput.cell_embeddings`.
    weight_B
        float [B], `Batch.weight`: a pair counts the product of its cells' weights.
    threshold
        scGPT's `ecs_threshold`.
    """
    weight_B = weight_B.float()
    with torch.autocast(cells_BD.device.type, enabled=False):
        cells_BD = torch.where(weight_B[:, None] > 0, cells_BD.float(), 0.0)
        unit_BD = nn.functional.normalize(cells_BD, dim=1)
        cosine_BB = (unit_BD @ unit_BD.T).fill_diagonal_(0.0).relu()
    counts_BB = weight_B[:, None] * weight_B[None, :]
    return (counts_BB * (1 - (cosine_BB - threshold).square())).sum(), counts_BB.sum()


def cross_entropy(logits_BC: Tensor, codes_B: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[code] over the cells whose code is known, and how many these are.

    Parameters
    ----------
    logits_BC
        float [B, C]: `ModelOutput.class_logits` or `domain_logits`.
    codes_B
        int64 [B]: 0 to C - 1, or -1 for a cell that does not count.
    weight_B
        float [B], `Batch.weight`.
    """
    counts_B = torch.where(codes_B >= 0, weight_B.float(), 0.0)
    logits_BC = torch.where(counts_B[:, None] > 0, logits_BC.float(), 0.0)
    each_B = nn.functional.cross_entropy(logits_BC, codes_B.clamp(min=0).long(), reduction="none")
    return (counts_B * each_B).sum(), counts_B.sum()


def _counts(is_masked_BL: Tensor, weight_B: Tensor | None) -> Tensor:
    """What each position counts, float32."""
    return is_masked_BL.float() if weight_B is None else is_masked_BL * weight_B.float()[:, None]

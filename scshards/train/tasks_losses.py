"""Loss terms of tasks, as sums and counts. Called by tasks_pretrain and tasks_finetune."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def zero_log_loss(
    probs_BL: Tensor, targets_BL: Tensor, is_asked_BL: Tensor, weight_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of "above zero or not", summed over what is asked for, and its count."""
    counts_BL = is_asked_BL * weight_B.float()[:, None]
    probs_BL = torch.where(counts_BL > 0, probs_BL.float(), 0.5)
    each_BL = F.binary_cross_entropy(probs_BL, (targets_BL > 0).float(), reduction="none")
    return (counts_BL * each_BL).sum(), counts_BL.sum()


def similarity_loss(cells_BD: Tensor, weight_B: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """scGPT's ECS, 1 - (relu(cosine) - threshold)^2, summed over pairs of cells, and their number."""
    unit_BD = F.normalize(cells_BD.float(), dim=1)
    is_cell_B = (weight_B > 0).float()
    cosine_BB = torch.relu(unit_BD @ unit_BD.T).fill_diagonal_(0.0)
    pairs_BB = is_cell_B[:, None] * is_cell_B[None, :]
    return (pairs_BB * (1 - (cosine_BB - threshold).square())).sum(), pairs_BB.sum()

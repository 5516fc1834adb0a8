"""Token and value embeddings, added up to what the encoder reads. Called by model.transformer.

Module and attribute names are scGPT's, because they are the keys of its checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_VALUE = 512.0
"""Values above this are taken as this (scGPT's ContinuousValueEncoder)."""


class GeneEncoder(nn.Module):
    """Token ids to normalised embeddings.

    Weights are uniform in (-0.1, 0.1) as in scGPT, the row of `<pad>` too; that row stays as it is.
    """

    def __init__(self, n_tokens: int, d_model: int, pad_id: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d_model, padding_idx=pad_id)
        self.enc_norm = nn.LayerNorm(d_model)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, genes_BL: Tensor) -> Tensor:
        """int32 or int64 ids [B, L] to float [B, L, D]."""
        return self.enc_norm(self.embedding(genes_BL))


class ContinuousValueEncoder(nn.Module):
    """Values, as numbers, to embeddings; `pad_value` and `mask_value` go through as numbers too."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, d_model)
        self.linear2 = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values_BL: Tensor) -> Tensor:
        """float [B, L] to float [B, L, D]."""
        x_BL1 = values_BL.clamp(max=MAX_VALUE).unsqueeze(-1)
        x_BLD = self.linear2(torch.relu(self.linear1(x_BL1)))
        return self.dropout(self.norm(x_BLD))

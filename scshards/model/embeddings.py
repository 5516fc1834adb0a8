"""Token, value and domain embeddings, added up to what the encoder reads. Called by model.transformer.

Module and attribute names are scGPT's, because they are the keys of its checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scshards.model.config import ModelConfig

MAX_VALUE = 512.0
"""Values above this are taken as this (scGPT's ContinuousValueEncoder)."""


class RowEncoder(nn.Module):
    """A row of a table for each code, normalised: of tokens, of values as bins, of domains.

    scGPT's GeneEncoder, CategoryValueEncoder and BatchLabelEncoder. `pad_row` stays as it is.
    """

    def __init__(self, n_rows: int, d_model: int, pad_row: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_rows, d_model, padding_idx=pad_row)
        self.enc_norm = nn.LayerNorm(d_model)

    def forward(self, codes_BL: Tensor) -> Tensor:
        """Codes of any shape, integers or whole numbers, [B, L], to float [B, L, D]."""
        if codes_BL.is_floating_point():
            codes_BL = codes_BL.long()
        return self.enc_norm(self.embedding(codes_BL))


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


class ScalingValueEncoder(nn.Module):
    """Values as factors of the token embedding, which is scGPT's `scaling`; it has no weights."""

    def forward(self, values_BL: Tensor) -> Tensor:
        """float [B, L] to float [B, L, 1]."""
        return values_BL.unsqueeze(-1)


def gene_encoder(config: ModelConfig) -> RowEncoder:
    """That of tokens: uniform in (-0.1, 0.1) as in scGPT, the row of `<pad>` too."""
    encoder = RowEncoder(config.n_tokens, config.d_model, config.pad_id)
    nn.init.uniform_(encoder.embedding.weight, -0.1, 0.1)
    return encoder


def value_encoder(config: ModelConfig) -> nn.Module:
    """The value encoder of a config's `value_style`."""
    if config.value_style == "continuous":
        return ContinuousValueEncoder(config.d_model, config.dropout)
    if config.value_style == "category":
        # A row for each bin, for padding and for what is masked.
        return RowEncoder(config.n_bins + 2, config.d_model, int(config.pad_value))
    return ScalingValueEncoder()

"""The stack of post-norm transformer layers, as in scGPT. Called by model.transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scshards.model.attention import SelfAttention
from scshards.model.config import ModelConfig
from scshards.model.layout import Layout


class Norm(nn.LayerNorm):
    """Layer norm in float32 under autocast, whatever its weights are in: CUDA's is, the CPU's is not."""

    def forward(self, x: Tensor) -> Tensor:
        """float [..., D], to the same shape in float32."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class EncoderLayer(nn.Module):
    """x = norm1(x + attention(x)); x = norm2(x + feed_forward(x)), with ReLU between two linears.

    Free of control flow that depends on data: `torch.compile` takes a layer in one piece.
    """

    def __init__(self, d_model: int, n_heads: int, d_hid: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(d_model, n_heads, dropout)
        self.linear1 = nn.Linear(d_model, d_hid)
        self.linear2 = nn.Linear(d_hid, d_model)
        self.norm1 = Norm(d_model, eps=1e-5)
        self.norm2 = Norm(d_model, eps=1e-5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, layout: Layout) -> Tensor:
        """float [B, L, D], or as the layout says, to the same shape."""
        x_BLD = self.norm1(x_BLD + self.dropout(self.self_attn(x_BLD, layout)))
        hidden_BLF = self.dropout(torch.relu(self.linear1(x_BLD)))
        return self.norm2(x_BLD + self.dropout(self.linear2(hidden_BLF)))


class Encoder(nn.Module):
    """The layers in turn. There is no positional encoding: a cell is a set of genes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.d_model, config.n_heads, config.d_hid, config.dropout
        self.layers = nn.ModuleList(EncoderLayer(*shape) for _ in range(config.n_layers))

    def forward(self, x_BLD: Tensor, layout: Layout) -> Tensor:
        """float [B, L, D], or as the layout says, to the same shape."""
        for layer in self.layers:
            x_BLD = layer(x_BLD, layout)
        return x_BLD

"""Attention over the tokens of a cell: `attend` is the one place that picks an implementation.

`SelfAttention` (the projections, with scGPT's key names) calls it; model.encoder calls that.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDA_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""What `attend` may run on CUDA. Not cuDNN's: with padding masks its gradients can be NaN."""


def attend(
    q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, is_pad_BL: Tensor, dropout: float
) -> Tensor:
    """Scaled dot-product attention of every token over the tokens of its cell that are not padding.

    softmax(q k' / sqrt(E)) v with padded keys left out (Vaswani et al., 2017). What comes back at
    padded positions means nothing, but is finite. With `dropout` 0 no [B, H, L, L] tensor is made,
    on CPU as on CUDA; on CPU any other dropout makes one and is about five times slower.

    Parameters
    ----------
    q_BHLE, k_BHLE, v_BHLE
        Queries, keys and values, float [B, H, L, E]: H heads of width E.
    is_pad_BL
        bool [B, L], True at padding, wherever it is.
    dropout
        Probability of dropping an attention weight; the caller passes 0 outside training. Draws
        from torch's generator of the device.

    Returns
    -------
    Tensor
        float [B, H, L, E].
    """
    # A row that is padding throughout has nothing to attend to, and a softmax over nothing is NaN
    # in some backends, whose gradient would reach the weights even from a row that counts nothing.
    # No "is there any padding at all": it would wait for the device, and saves nothing on CPU.
    is_key_BL = ~is_pad_BL | is_pad_BL.all(dim=1, keepdim=True)
    with sdpa_kernel(CUDA_BACKENDS) if q_BHLE.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            q_BHLE, k_BHLE, v_BHLE, attn_mask=is_key_BL[:, None, None, :], dropout_p=dropout
        )


class SelfAttention(nn.Module):
    """Fused query, key and value projection, attention, output projection.

    `Wqkv.weight` stacks q, k and v on its first axis in this order, heads inside each.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.Wqkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor, is_pad_BL: Tensor) -> Tensor:
        """float [B, L, D] and bool [B, L] to float [B, L, D]."""
        qkv_BLTHE = self.Wqkv(x_BLD).unflatten(-1, (3, self.n_heads, -1))
        q_BHLE, k_BHLE, v_BHLE = qkv_BLTHE.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        out_BHLE = attend(q_BHLE, k_BHLE, v_BHLE, is_pad_BL, dropout)
        return self.out_proj(torch.flatten(out_BHLE.transpose(1, 2), 2))

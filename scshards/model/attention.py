"""Attention over the tokens of a cell: this file is the one place that picks an implementation.

    Padded   scaled_dot_product_attention with padded keys left out: the reference, CPU and CUDA
    Packed   varlen_attn on CUDA in half precision; otherwise the cells side by side, as Padded
    Split    over the known keys as Padded, then with each unknown token's own; on CUDA one
             scaled_dot_product_attention with a mask of all pairs

`SelfAttention` (the projections, with scGPT's key names) calls them; model.encoder calls that.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scshards.model.layout import Layout, Packed, Padded, Split

CUDA_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""What attention may run on CUDA. Not cuDNN's: with padding masks its gradients can be NaN."""


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
    return _attend_where(q_BHLE, k_BHLE, v_BHLE, is_key_BL[:, None, None, :], dropout)


def attend_packed(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, layout: Packed) -> Tensor:
    """As `attend`, of cells that lie one behind another: float [T, H, E] to [T, H, E].

    There is no dropout: varlen_attn has none, and what a batch trains should not depend on the
    device. Zero at padding, and padding gets no gradient. varlen_attn takes CUDA, float16 or
    bfloat16 and heads of a width that is a multiple of 8 up to 256; anything else is computed with
    the cells side by side, [B, S].
    """
    if _has_kernel(q_THE):
        from torch.nn.attention.varlen import varlen_attn  # late: it takes two seconds

        # The kernel visits the cells' tokens alone: elsewhere its output, and the gradient of its
        # inputs, are memory as it was found. Filled, not multiplied: that may be NaN.
        nowhere_T11 = layout.is_pad[:, None, None]
        q_THE, k_THE, v_THE = (x.masked_fill(nowhere_T11, 0) for x in (q_THE, k_THE, v_THE))
        ends, most = layout.cu_seqlens, layout.max_seqlen
        out_THE = varlen_attn(q_THE, k_THE, v_THE, ends, ends, most, most)
        assert isinstance(out_THE, Tensor), "nothing else was asked for"
        return out_THE.masked_fill(nowhere_T11, 0)
    q_BHSE, k_BHSE, v_BHSE = (layout.padded(x).transpose(1, 2) for x in (q_THE, k_THE, v_THE))
    return layout.packed(attend(q_BHSE, k_BHSE, v_BHSE, layout.rows_are_pad, 0.0).transpose(1, 2))


def _has_kernel(q_THE: Tensor) -> bool:
    width, half = q_THE.shape[-1], q_THE.dtype in (torch.float16, torch.bfloat16)
    return q_THE.is_cuda and half and width % 8 == 0 and width <= 256


def attend_split(
    q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, layout: Split, dropout: float
) -> Tensor:
    """As `attend`, where unknown genes see the known ones and themselves, and nobody else sees them.

    No unknown gene's key but its own is ever looked at: N P products and not N^2. With `dropout` 0 the
    weights are not materialised. A layout with `may_see` runs one attention over all N keys with
    that mask.
    """
    if layout.may_see is not None:
        return _attend_where(q_BHNE, k_BHNE, v_BHNE, layout.may_see[:, None], dropout)
    if q_BHNE.is_cpu and not dropout:
        return _KnownAndItself.apply(q_BHNE, k_BHNE, v_BHNE, layout.bias)
    n = layout.n_known
    (q_BHPE, q_BHGE), (k_BHPE, k_BHGE) = (x.tensor_split([n], dim=2) for x in (q_BHNE, k_BHNE))
    v_BHPE, v_BHGE = v_BHNE.tensor_split([n], dim=2)
    bias_B11P = layout.bias.to(q_BHNE.dtype)
    known_BHPE = _attend_where(q_BHPE, k_BHPE, v_BHPE, bias_B11P, dropout)
    scale = q_BHNE.shape[-1] ** -0.5
    logits_BHGP = q_BHGE @ k_BHPE.transpose(2, 3) * scale + bias_B11P
    itself_BHG1 = (q_BHGE * k_BHGE).sum(-1, keepdim=True) * scale
    weights = F.dropout(torch.cat([logits_BHGP, itself_BHG1], 3).softmax(3), dropout)
    weights_BHGP, own_BHG1 = weights.to(v_BHGE.dtype).tensor_split([n], dim=3)
    return torch.cat([known_BHPE, weights_BHGP @ v_BHPE + own_BHG1 * v_BHGE], 2)


class SelfAttention(nn.Module):
    """Fused query, key and value projection, attention, output projection.

    `Wqkv.weight` stacks q, k and v on its first axis in this order, heads inside each. What unknown
    genes gather does not go through `out_proj`: scGPT's pretraining code left it out there (its
    flash_layers.py, FlashscGPTMHA), and its published weights were trained so.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.Wqkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """float [B, L, D], [T, D] or [B, N, D], as the layout is, to the same shape."""
        # Cut along the last axis: its gradient is put together again in one pass, not two.
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)) for x in self.Wqkv(x).chunk(3, dim=-1))
        if isinstance(layout, Packed):
            return self.out_proj(attend_packed(q, k, v, layout).flatten(1))
        q_BHLE, k_BHLE, v_BHLE = (x.transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if isinstance(layout, Padded):
            out_BHLE = attend(q_BHLE, k_BHLE, v_BHLE, layout.is_pad, dropout)
            return self.out_proj(out_BHLE.transpose(1, 2).flatten(2))
        out_BND = attend_split(q_BHLE, k_BHLE, v_BHLE, layout, dropout).transpose(1, 2).flatten(2)
        known_BPD, unknown_BGD = out_BND.tensor_split([layout.n_known], dim=1)
        return torch.cat([self.out_proj(known_BPD), unknown_BGD], 1)


class _KnownAndItself(torch.autograd.Function):
    """`attend_split` without dropout, on the CPU.

    Its kernel over the known keys gives with each output the logarithm of what its softmax divides by.
    One more key is then put in exactly: with s the logit of an unknown token for itself,

        lse' = log(exp(lse) + exp(s))        out' = exp(lse - lse') out + exp(s - lse') v

    and the kernel's backward pass, which makes the weights anew as exp(logit - lse'), is that of the
    softmax over all keys once it is given lse' and out'.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias_B11P: Tensor) -> Tensor:
        n = bias_B11P.shape[-1]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k[:, :, :n], v[:, :, :n], attn_mask=bias_B11P
        )
        q_BHGE, k_BHGE, v_BHGE, out_BHGE = (x[:, :, n:].float() for x in (q, k, v, out))
        itself_BHG, known_BHG = _logit(q_BHGE, k_BHGE), lse[:, :, n:]
        lse_BHG = torch.logaddexp(known_BHG, itself_BHG)
        kept_BHG1, own_BHG1 = ((x - lse_BHG).exp()[..., None] for x in (known_BHG, itself_BHG))
        out[:, :, n:] = out_BHGE * kept_BHG1 + v_BHGE * own_BHG1
        lse[:, :, n:] = lse_BHG
        ctx.save_for_backward(q, k, v, bias_B11P, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, bias_B11P, out, lse = ctx.saved_tensors
        n = bias_B11P.shape[-1]
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k[:, :, :n], v[:, :, :n], out, lse, 0.0, False, attn_mask=bias_B11P
        )
        q_BHGE, k_BHGE, v_BHGE, out_BHGE, grad_BHGE = (
            x[:, :, n:].float() for x in (q, k, v, out, grad)
        )
        own_BHG1 = (_logit(q_BHGE, k_BHGE) - lse[:, :, n:]).exp()[..., None]
        slope_BHG1 = own_BHG1 * (grad_BHGE * (v_BHGE - out_BHGE)).sum(-1, keepdim=True)
        slope_BHG1 = slope_BHG1 * q.shape[-1] ** -0.5
        dq[:, :, n:] += (slope_BHG1 * k_BHGE).to(dq.dtype)
        dk = torch.cat([dk, (slope_BHG1 * q_BHGE).to(dk.dtype)], 2)
        dv = torch.cat([dv, (own_BHG1 * grad_BHGE).to(dv.dtype)], 2)
        return dq, dk, dv, None


def _logit(q_BHGE: Tensor, k_BHGE: Tensor) -> Tensor:
    """What each token sees itself with: [B, H, G]."""
    return (q_BHGE * k_BHGE).sum(-1) * q_BHGE.shape[-1] ** -0.5


def _attend_where(q: Tensor, k: Tensor, v: Tensor, may_see: Tensor, dropout: float) -> Tensor:
    with sdpa_kernel(CUDA_BACKENDS) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=may_see, dropout_p=dropout)

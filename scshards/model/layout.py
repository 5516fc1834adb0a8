"""Where the tokens of a batch's cells lie: side by side, one behind another, or known and unknown.

    Padded   [B, L, ...]  of a Batch
    Packed   [T, ...]     of a PackedBatch
    Split    [B, N, ...]  of a GenerateBatch: N = P + G, the known genes before the unknown ones

Attention (model.attention) and heads ask a layout; the rest of the model works on single tokens.
All are tuples of tensors and sizes, so that a compiled layer can take one. Called by
model.transformer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """Cells side by side; `is_pad` is bool [B, L], wherever the padding is."""

    is_pad: Tensor

    def first(self, x_BLD: Tensor) -> Tensor:
        """What token 0, `<cls>`, of each cell holds: [B, D]."""
        return x_BLD[:, 0]

    def spread(self, x_BD: Tensor) -> Tensor:
        """To each token what its cell has: [B, L, D]."""
        return x_BD[:, None].expand(-1, self.is_pad.shape[1], -1)

    def sums(self, x_BLD: Tensor) -> Tensor:
        """Over each cell's tokens, padding left out: [B, D]."""
        return torch.where(self.is_pad[..., None], 0, x_BLD).sum(1)

    def products(self, x_BLD: Tensor, y_BD: Tensor) -> Tensor:
        """Of each token with its cell, x . y: [B, L]."""
        return torch.bmm(x_BLD, y_BD.to(x_BLD.dtype).unsqueeze(-1)).squeeze(-1)


class Packed(NamedTuple):
    """Cells one behind another: T tokens, B cells, none longer than S.

    Attributes
    ----------
    is_pad
        bool [T]: what belongs to no cell.
    cu_seqlens
        int32 [B + 1]: cell b has the tokens cu_seqlens[b] to cu_seqlens[b + 1].
    max_seqlen
        S.
    rows
        int64 [B, S]: which token stands where if the cells are put side by side.
    rows_are_pad
        bool [B, S]: where none does.
    slot
        int64 [T]: where each token stands in [B * S]; 0 for padding.
    """

    is_pad: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    rows_are_pad: Tensor
    slot: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, max_seqlen: int, is_pad_T: Tensor) -> Packed:
        n_cells, n_tokens = len(cu_seqlens) - 1, len(is_pad_T)
        starts_B, ends_B = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        tokens_T = torch.arange(n_tokens, device=is_pad_T.device)
        cell_T = torch.searchsorted(ends_B, tokens_T, right=True).clamp(max=n_cells - 1)
        slot_T = cell_T * max_seqlen + tokens_T - starts_B[cell_T]
        rows_BS = starts_B[:, None] + torch.arange(max_seqlen, device=is_pad_T.device)
        return cls(
            is_pad=is_pad_T,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            rows=rows_BS.clamp(max=n_tokens - 1),
            rows_are_pad=rows_BS >= ends_B[:, None],
            slot=torch.where(is_pad_T, 0, slot_T),
        )

    def first(self, x_TD: Tensor) -> Tensor:
        """As `Padded.first`."""
        return x_TD.index_select(0, self.rows[:, 0])

    def spread(self, x_BD: Tensor) -> Tensor:
        """To each token what its cell has: [T, D], zero at padding."""
        # Not x_BD[cell]: its gradient adds up a cell's tokens one by one, on CUDA in x's own dtype,
        # and a thousand numbers added in bfloat16 are a third off. Here they are one sum, over S.
        return self.packed(x_BD[:, None].expand(-1, self.max_seqlen, -1))

    def sums(self, x_TD: Tensor) -> Tensor:
        """As `Padded.sums`."""
        return self.padded(x_TD).sum(1)

    def products(self, x_TD: Tensor, y_BD: Tensor) -> Tensor:
        """Of each token with its cell, x . y: [T]."""
        x_BSD = self.padded(x_TD)
        return self.packed(torch.bmm(x_BSD, y_BD.to(x_BSD.dtype).unsqueeze(-1))).squeeze(-1)

    def padded(self, x_T: Tensor) -> Tensor:
        """[T, ...] to [B, S, ...], zero where there is no token."""
        here, there = (self.rows.flatten(), self.rows_are_pad.flatten()), (self.slot, self.is_pad)
        return _Moved.apply(x_T, *here, *there).unflatten(0, self.rows.shape)

    def packed(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] back to [T, ...], zero at padding."""
        here, there = (self.slot, self.is_pad), (self.rows.flatten(), self.rows_are_pad.flatten())
        return _Moved.apply(x_BS.flatten(0, 1), *here, *there)


class _Moved(torch.autograd.Function):
    """Rows taken from elsewhere, zero where `is_pad`; the gradient is taken back the other way.

    No row is wanted twice, so that nothing has to be added up, in whatever order and dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, is_pad: Tensor, back: Tensor, back_is_pad: Tensor
    ) -> Tensor:
        ctx.save_for_backward(back, back_is_pad)
        return _taken(x, rows, is_pad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _taken(grad, *ctx.saved_tensors), None, None, None, None


def _taken(x: Tensor, rows: Tensor, is_pad: Tensor) -> Tensor:
    # Filled, not multiplied by 0: another cell's tokens stand there, which may be NaN.
    return x.index_select(0, rows).masked_fill_(is_pad.view(-1, *[1] * (x.ndim - 1)), 0)


class Split(NamedTuple):
    """Known genes, which see each other, then unknown ones, which see the known and themselves.

    Attributes
    ----------
    n_known
        P.
    bias
        float32 [B, 1, 1, P]: 0 where a known token is looked at, minus infinity at padding.
    may_see
        bool [B, N, N]: whether a token (second axis) attends to a token (third), for an attention that
        is told of all pairs; None elsewhere.
    """

    n_known: int
    bias: Tensor
    may_see: Tensor | None

    @classmethod
    def of(cls, known_is_pad_BP: Tensor, n_unknown: int, *, pairs: bool | None = None) -> Split:
        """Made once a step, for all layers and passes; without `pairs` there is `may_see` on CUDA."""
        n_cells, n_known = known_is_pad_BP.shape
        n, device = n_known + n_unknown, known_is_pad_BP.device
        # As in attention: a cell without a known gene must not come to a softmax over nothing.
        is_key_BP = ~known_is_pad_BP | known_is_pad_BP.all(dim=1, keepdim=True)
        bias_BP = torch.zeros(n_cells, n_known, device=device).masked_fill_(~is_key_BP, -torch.inf)
        may_see_BNN = None
        if known_is_pad_BP.is_cuda if pairs is None else pairs:
            known_BNP = is_key_BP[:, None].expand(-1, n, -1)
            itself_NG = torch.eye(n, dtype=torch.bool, device=device)[:, n_known:]
            may_see_BNN = torch.cat([known_BNP, itself_NG[None].expand(n_cells, -1, -1)], 2)
        return cls(n_known, bias_BP[:, None, None], may_see_BNN)


Layout = Padded | Packed | Split

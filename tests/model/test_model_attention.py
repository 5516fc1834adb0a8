"""attend() against attention written out, and SelfAttention against torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scshards.model.attention import SelfAttention, attend, attend_packed, attend_split
from scshards.model.encoder import EncoderLayer
from scshards.model.layout import Layout, Packed, Padded, Split


def written_out(q: Tensor, k: Tensor, v: Tensor, is_pad: Tensor) -> Tensor:
    """`looking_at` what is not padding."""
    return looking_at(q, k, v, ~is_pad[:, None, :].expand(-1, q.shape[2], -1))


def looking_at(q: Tensor, k: Tensor, v: Tensor, may_see: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E)) v, one cell, head and query at a time, in float64."""
    out = torch.zeros_like(v, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = torch.nonzero(may_see[b, i]).flatten()
                scores = k[b, h, keys].double() @ q[b, h, i].double() / math.sqrt(q.shape[3])
                weights = torch.exp(scores - scores.max())
                out[b, h, i] = (weights / weights.sum()) @ v[b, h, keys].double()
    return out


@pytest.fixture
def qkv() -> Tensor:
    return 3 * torch.randn(3, 3, 2, 11, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def is_pad() -> Tensor:
    is_pad = torch.zeros(3, 11, dtype=torch.bool)
    is_pad[1, 6:] = True
    is_pad[2, 1:] = True
    return is_pad


def test_equals_attention_written_out(qkv: Tensor, is_pad: Tensor) -> None:
    q, k, v = qkv
    torch.testing.assert_close(
        attend(q, k, v, is_pad, 0.0).double(), written_out(q, k, v, is_pad), atol=1e-5, rtol=1e-5
    )


def test_padding_need_not_be_at_the_end(qkv: Tensor) -> None:
    q, k, v = qkv
    is_pad = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.5
    is_pad[:, 0] = False
    assert is_pad.any()
    torch.testing.assert_close(
        attend(q, k, v, is_pad, 0.0).double(), written_out(q, k, v, is_pad), atol=1e-5, rtol=1e-5
    )


def test_padded_keys_and_values_reach_nothing(qkv: Tensor, is_pad: Tensor) -> None:
    q, k, v = qkv
    before = attend(q, k, v, is_pad, 0.0)
    k, v = (torch.where(is_pad[:, None, :, None], 1e3, x) for x in (k, v))
    assert torch.equal(attend(q, k, v, is_pad, 0.0), before)


def test_a_row_that_is_all_padding_stays_finite(qkv: Tensor, is_pad: Tensor) -> None:
    qkv.requires_grad_(True)
    is_pad[1] = True
    out = attend(*qkv, is_pad, 0.0)
    assert torch.isfinite(out).all()
    out[0].sum().backward()
    assert qkv.grad is not None
    assert torch.isfinite(qkv.grad).all()


def test_no_dropout_takes_the_fused_path_on_cpu(qkv: Tensor, is_pad: Tensor) -> None:
    qkv.requires_grad_(True)
    fused = attend(*qkv, is_pad, 0.0).grad_fn
    plain = attend(*qkv, is_pad, 0.3).grad_fn
    assert "FlashAttention" in type(fused).__name__
    assert "FlashAttention" not in type(plain).__name__


def test_dropout_drops_in_training_only(is_pad: Tensor) -> None:
    attention = SelfAttention(16, 2, 0.5)
    x = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(attention(x, Padded(is_pad)), attention(x, Padded(is_pad)))
    attention.eval()
    assert torch.equal(attention(x, Padded(is_pad)), attention(x, Padded(is_pad)))


def test_layer_equals_torchs_own(is_pad: Tensor) -> None:
    theirs = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True).train()
    ours = EncoderLayer(16, 4, 24, 0.0)
    g = torch.Generator().manual_seed(3)
    state = {k: torch.randn(v.shape, generator=g) / 3 for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours.load_state_dict({k.replace("in_proj_", "Wqkv."): v for k, v in state.items()})
    x = torch.randn(3, 11, 16, generator=g)
    expected = theirs(x, src_key_padding_mask=is_pad)
    torch.testing.assert_close(
        ours(x, Padded(is_pad))[~is_pad], expected[~is_pad], atol=1e-5, rtol=1e-5
    )


def packed_layout(lengths: list[int], n_tokens: int, max_seqlen: int) -> Packed:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return Packed.of(ends.int(), max_seqlen, torch.arange(n_tokens) >= ends[-1])


@pytest.mark.parametrize("rest", [0, 5, 40])
def test_packed_cells_see_themselves_alone(rest: int) -> None:
    lengths = [4, 1, 11, 6]
    layout = packed_layout(lengths, sum(lengths) + rest, 12)
    g = torch.Generator().manual_seed(4)
    q, k, v = 3 * torch.randn(3, sum(lengths) + rest, 2, 8, generator=g)
    out = attend_packed(q, k, v, layout)
    first = 0
    for n in lengths:
        one = [x[first : first + n].transpose(0, 1)[None] for x in (q, k, v)]
        expected = written_out(*one, torch.zeros(1, n, dtype=torch.bool))[0].transpose(0, 1)
        found = out[first : first + n].double()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        first += n
    assert (out[first:] == 0).all()


def test_what_packed_padding_holds_reaches_nothing() -> None:
    layout = packed_layout([4, 7], 16, 8)
    g = torch.Generator().manual_seed(4)
    qkv = torch.randn(3, 16, 2, 8, generator=g)
    before = attend_packed(*qkv, layout)
    qkv[:, 11:] = float("nan")
    qkv.requires_grad_(True)
    out = attend_packed(*qkv, layout)
    assert torch.equal(out, before)
    out.sum().backward()
    assert qkv.grad is not None
    assert torch.isfinite(qkv.grad).all()
    assert (qkv.grad[:, 11:] == 0).all()


def visible(known_is_pad: Tensor, n_unknown: int) -> Tensor:
    """Which token sees which, by a loop: known genes for all, an unknown gene for itself."""
    n_cells, n_known = known_is_pad.shape
    n = n_known + n_unknown
    may_see = torch.zeros(n_cells, n, n, dtype=torch.bool)
    for b in range(n_cells):
        for i in range(n):
            for j in range(n):
                may_see[b, i, j] = not known_is_pad[b, j] if j < n_known else i == j
    return may_see


WAYS: dict[str, tuple[dict[str, bool], float]] = {
    "keys": ({}, 0.0),
    "keys, weights dropped": ({}, 1e-12),
    "pairs": ({"pairs": True}, 0.0),
}
"""How a layout is made, and a dropout: hardly any, which takes the way of any."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_known", [1, 7, 11])
def test_unknown_genes_see_the_known_and_themselves(
    qkv: Tensor, is_pad: Tensor, n_known: int, way: str
) -> None:
    options, dropout = WAYS[way]
    known_is_pad = is_pad[:, :n_known]
    layout = Split.of(known_is_pad, 11 - n_known, **options)
    may_see = visible(known_is_pad, 11 - n_known)
    a, b = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    expected, out = looking_at(*a, may_see), attend_split(*b, layout, dropout)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    weigh = torch.arange(out.numel()).reshape(out.shape) % 5 - 2.0
    for loss in (lambda x: x.sum(), lambda x: (x * weigh).sum()):
        (wanted,) = torch.autograd.grad(loss(expected), a, retain_graph=True)
        (found,) = torch.autograd.grad(loss(out), b, retain_graph=True)
        torch.testing.assert_close(found, wanted, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("far", [-300.0, 0.0, 300.0])
def test_a_gene_that_sees_itself_far_more_or_less_than_others(qkv: Tensor, far: float) -> None:
    q, k, v = qkv.clone()
    k[:, :, 6:] += far * q[:, :, 6:] / q[:, :, 6:].square().sum(-1, keepdim=True)
    is_pad = torch.zeros(3, 6, dtype=torch.bool)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend_split(*own, Split.of(is_pad, 5), 0.0)
    expected = looking_at(q, k, v, visible(is_pad, 5))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unknown_genes_in_half_precision(qkv: Tensor, is_pad: Tensor, dtype: torch.dtype) -> None:
    layout = Split.of(is_pad[:, :6], 5)
    a = (qkv / 3).to(dtype).float().requires_grad_()
    b = (qkv / 3).to(dtype).requires_grad_()
    expected, out = attend_split(*a, layout, 0.0), attend_split(*b, layout, 0.0)
    assert out.dtype == dtype
    expected.square().sum().backward()
    out.float().square().sum().backward()
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(b.grad.float(), a.grad, atol=5e-2, rtol=5e-2)


class Largest(TorchDispatchMode):
    """The most numbers that any operator made at once."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and 0 not in t.stride()]
        self.numbers = max([self.numbers, *(t.numel() for t in made)])
        return out


def test_unknown_genes_take_no_weights_of_pairs_on_cpu() -> None:
    """Nor a mask of pairs: the largest tensor is one with an entry for each token and channel."""
    qkv = torch.randn(3, 2, 2, 90, 8, generator=torch.Generator().manual_seed(0))
    qkv.requires_grad_(True)
    with Largest() as largest:
        attend_split(*qkv, Split.of(torch.zeros(2, 60, dtype=torch.bool), 30), 0.0).sum().backward()
    assert largest.numbers == qkv.numel() == 3 * 2 * 2 * 90 * 8 < 2 * 60 * 90


@pytest.mark.parametrize("way", WAYS)
def test_a_cell_without_known_genes_stays_finite(qkv: Tensor, way: str) -> None:
    options, dropout = WAYS[way]
    is_pad = torch.zeros(3, 6, dtype=torch.bool)
    is_pad[1] = True
    out = attend_split(*qkv, Split.of(is_pad, 5, **options), dropout)
    assert torch.isfinite(out).all()


def test_what_unknown_genes_gather_is_not_projected(is_pad: Tensor) -> None:
    attention = SelfAttention(16, 2, 0.0)
    x = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(2))
    q, k, v = (p.unflatten(-1, (2, 8)).transpose(1, 2) for p in attention.Wqkv(x).split(16, dim=-1))
    gathered = looking_at(q, k, v, visible(is_pad[:, :6], 5)).transpose(1, 2).flatten(2).float()
    out = attention(x, Split.of(is_pad[:, :6], 5))
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out[:, 6:], gathered[:, 6:], **near)
    torch.testing.assert_close(out[:, :6], attention.out_proj(gathered[:, :6]), **near)


@pytest.mark.parametrize("kind", ["padded", "packed", "split"])
def test_a_layer_compiles_in_one_piece(is_pad: Tensor, kind: str) -> None:
    layouts: dict[str, Layout] = {
        "padded": Padded(is_pad),
        "packed": packed_layout([4, 7, 1], 15, 8),
        "split": Split.of(is_pad[:, :6], 5),
    }
    layout = layouts[kind]
    layer = EncoderLayer(16, 2, 24, 0.0)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(*((15,) if kind == "packed" else (3, 11)), 16, generator=g)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, layout), layer(x, layout))

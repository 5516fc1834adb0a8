"""attend() against attention written out, and SelfAttention against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from scshards.model.attention import SelfAttention, attend
from scshards.model.encoder import EncoderLayer
from scshards.model.layout import Padded


def written_out(q: Tensor, k: Tensor, v: Tensor, is_pad: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E)) v, one cell, head and query at a time, in float64."""
    out = torch.zeros_like(v, dtype=torch.float64)
    for b in range(q.shape[0]):
        keys = torch.nonzero(~is_pad[b]).flatten()
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
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

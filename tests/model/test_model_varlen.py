"""The branch of packed attention that CUDA takes, on a CPU: varlen's operator gets a kernel for it here.

The kernel leaves what it does not visit as it finds it: NaN here, in its output and its gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from model_support import packed_batch
from torch import Tensor

import scshards.model.attention as attention
from scshards.cells.batch import Batch
from scshards.model.attention import attend_packed
from scshards.model.config import ModelConfig
from scshards.model.layout import Packed
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel

varlen = pytest.importorskip(
    "torch.nn.attention.varlen", reason="torch.nn.attention.varlen came with torch 2.10"
)
if not hasattr(varlen, "_varlen_attn") or not hasattr(varlen, "_varlen_attn_backward"):
    pytest.skip("this torch's varlen has other operators inside", allow_module_level=True)

LENGTHS = (9, 2, 6, 1)


def _cells(cu_seqlens: Tensor) -> Iterator[slice]:
    ends = cu_seqlens.tolist()
    return map(slice, ends[:-1], ends[1:])


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16), "as the kernel on CUDA wants it"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    out = torch.full_like(q, torch.nan)
    for cell in _cells(ends_q):
        assert cell.stop - cell.start <= max_q == max_k
        q_HLE, k_HLE, v_HLE = (x[cell].float().transpose(0, 1) for x in (q, k, v))
        weights_HLL = (q_HLE @ k_HLE.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        out[cell] = (weights_HLL @ v_HLE).transpose(0, 1).to(q.dtype)
    lse = torch.full((q.shape[1], len(q)), torch.nan)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    scale = q.shape[-1] ** -0.5
    for cell in _cells(ends):
        q_HLE, k_HLE, v_HLE, g_HLE = (x[cell].float().transpose(0, 1) for x in (q, k, v, grad))
        weights_HLL = (q_HLE @ k_HLE.transpose(1, 2) * scale).softmax(-1)
        slope_HLL = g_HLE @ v_HLE.transpose(1, 2)
        slope_HLL = weights_HLL * (slope_HLL - (slope_HLL * weights_HLL).sum(-1, keepdim=True))
        for x, found_HLE in zip(
            found,
            (
                slope_HLL @ k_HLE * scale,
                slope_HLL.transpose(1, 2) @ q_HLE * scale,
                weights_HLL.transpose(1, 2) @ g_HLE,
            ),
            strict=True,
        ):
            x[cell] = found_HLE.transpose(0, 1).to(x.dtype)
    return found[0], found[1], found[2]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The branch is taken on the CPU too; how often its kernel was asked for, once a layer."""
    seen: list[int] = []
    own = varlen.varlen_attn

    def counted(*args: Any) -> Any:
        seen.append(1)
        return own(*args)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention, "_has_kernel", lambda q_THE: True)
    return seen


def test_attention_equals_that_of_cells_side_by_side(calls: list[int]) -> None:
    lengths = torch.tensor(LENGTHS)
    ends = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    layout = Packed.of(ends, 9, torch.arange(25) >= 18)
    qkv = torch.randn(3, 25, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    a, b = qkv.float().requires_grad_(), qkv.clone()
    b[:, 18:] = torch.nan  # whatever padding holds
    b.requires_grad_()
    with pytest.MonkeyPatch.context() as side_by_side:
        side_by_side.setattr(attention, "_has_kernel", lambda q_THE: False)
        expected = attend_packed(*a, layout)
    assert calls == []
    found = attend_packed(*b, layout)
    assert calls == [1]
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    assert (found[18:] == 0).all()
    expected.square().sum().backward()
    found.float().square().sum().backward()
    torch.testing.assert_close(b.grad.float(), a.grad, atol=6e-2, rtol=3e-2)
    assert (b.grad[:, 18:] == 0).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_is_that_of_padded_cells(
    make_batch: Callable[..., Batch], small: ModelConfig, calls: list[int], compiled: bool
) -> None:
    """Values from the tokens and from the cell embedding (MVC), and the gradients of all weights."""
    config = dataclasses.replace(small, n_heads=2, dropout=0.0)
    model = CellModel(config, seed=2)
    batch = make_batch(*LENGTHS)
    batch = dataclasses.replace(batch, is_masked=~batch.is_pad & (batch.genes % 2 == 0))
    packed = packed_batch(batch, n_tokens=25, max_seqlen=9)
    grads = []
    for x in (batch, packed):
        model.zero_grad()
        if x is packed and compiled:
            torch.compiler.reset()
            for layer in model.transformer_encoder.layers:
                layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x is packed):
            out = model(x)
        terms = [
            masked_squared_error(p, x.targets, x.is_masked)[0] / 1000
            for p in (out.predictions, out.mvc_predictions)
        ]
        sum(terms).backward()
        flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        grads.append(torch.cat([*flat, torch.stack(terms).detach()]))
    assert len(calls) == config.n_layers or compiled
    assert calls
    assert grads[1].isfinite().all()
    near = torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0)
    assert near > 0.999
    assert (grads[1] - grads[0]).norm() < 0.03 * grads[0].norm()

"""A PackedBatch gives what the same cells padded give, and the same gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_support import NEAR, packed_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scshards.cells.batch import Batch
from scshards.model.config import ModelConfig
from scshards.model.heads import MVCDecoder
from scshards.model.layout import Packed, Padded
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel, ModelOutput

LENGTHS = (9, 2, 6, 1)

STYLES = [
    {},
    {"mvc": False},
    {"explicit_zero_prob": True, "n_classes": 3},
    {"cell_style": "avg-pool", "value_style": "scaling"},
    {"cell_style": "w-pool", "mvc_style": "inner product, detach"},
    {"n_domains": 2, "use_domain_labels": True, "explicit_zero_prob": True, "adversary": True},
    {"n_domains": 2, "domain_norm": True},
]


def gradients(model: CellModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_packed_equals_padded(
    small: ModelConfig, make_batch: Callable[..., Batch], style: dict[str, object], training: bool
) -> None:
    config = dataclasses.replace(small, dropout=0.0, **style)  # type: ignore[arg-type]
    model = CellModel(config, seed=2).train(training)
    batch = make_batch(*LENGTHS)
    batch = dataclasses.replace(batch, is_masked=~batch.is_pad & (batch.genes % 2 == 0))
    is_real = ~batch.is_pad
    packed = packed_batch(batch, n_tokens=25, max_seqlen=12)
    by_domain = config.use_domain_labels or config.domain_norm
    domains_B = torch.tensor([0, 1, 1, 0]) if by_domain else None

    def loss(out: ModelOutput, masked: Tensor) -> Tensor:
        """Something that all heads have a part in."""
        cells = (out.cell_embeddings, out.class_logits, out.domain_logits)
        return masked + sum(x.square().sum() for x in cells if x is not None)

    a = model(batch, domains_B=domains_B)
    both = [a.predictions, *([] if a.mvc_predictions is None else [a.mvc_predictions])]
    masked = sum(
        masked_squared_error(x, batch.targets, batch.is_masked, batch.weight)[0] for x in both
    )
    loss(a, masked).backward()
    expected = gradients(model)

    b = model(packed, domains_B=domains_B)
    both = [b.predictions, *([] if b.mvc_predictions is None else [b.mvc_predictions])]
    masked = sum(masked_squared_error(x, packed.targets, packed.is_masked)[0] for x in both)
    loss(b, masked).backward()
    found = gradients(model)

    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None and x.shape == is_real.shape:
            torch.testing.assert_close(y[:18], x[is_real], **NEAR)
        elif x is not None:
            torch.testing.assert_close(y, x, **NEAR)
    assert found.keys() == expected.keys()
    # A gradient that cancels out, as that of a bias before a norm, is the rounding of larger ones.
    least = 1e-2 * max(x.abs().max() for x in expected.values())
    for name in expected:
        scale = expected[name].abs().max().clamp(min=least)
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, **NEAR)
    if not training:
        torch.testing.assert_close(
            model.embed(packed, domains_B=domains_B if config.domain_norm else None),
            a.cell_embeddings,
            **NEAR,
        )


def test_attention_weights_are_not_dropped_in_packed_cells(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    """Said of `ModelConfig.dropout`: with every other dropout off, training equals evaluation."""
    model = CellModel(dataclasses.replace(small, dropout=0.5))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = make_batch(*LENGTHS)
    packed = packed_batch(batch, n_tokens=20, max_seqlen=9)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(model(batch)[0], model.eval()(batch)[0])
        assert torch.equal(model.train()(packed)[0], model.eval()(packed)[0])


class AddsAsCudaDoes(TorchDispatchMode):
    """index_add of half numbers one row after another, each sum rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.index_add.default or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        before, dim, index, rows = args
        assert dim == 0
        total = before.clone()
        for i, row in zip(index.tolist(), rows, strict=True):
            total[i] += row
        return total


@pytest.mark.parametrize("explicit_zero_prob", [False, True])
def test_sums_over_long_cells_are_not_in_bfloat16(
    small: ModelConfig, explicit_zero_prob: bool
) -> None:
    """Added up in bfloat16, one token after another, 1,200 terms lose a third of their sum."""
    config = dataclasses.replace(small, explicit_zero_prob=explicit_zero_prob)
    mvc, n_cells, n = MVCDecoder(config), 2, 1200
    g = torch.Generator().manual_seed(0)
    genes_BLD = nn.functional.layer_norm(torch.randn(n_cells, n, 16, generator=g), (16,))
    ends = n * torch.arange(n_cells + 1).int()
    nowhere = torch.zeros(n_cells, n, dtype=torch.bool)
    packed = Packed.of(ends, n, nowhere.flatten())
    found = []
    for layout, genes, half in (
        (Padded(nowhere), genes_BLD, False),
        (packed, genes_BLD.flatten(0, 1), True),
    ):
        cells_BD = torch.ones(n_cells, 16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            values, zero_probs = mvc(cells_BD, genes, layout)
        total = ((values - 25) ** 2).mean() if zero_probs is None else zero_probs.log().mean()
        with AddsAsCudaDoes():
            found.append(torch.autograd.grad(total, cells_BD)[0])
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert error < 0.02, f"{error:.1%} off"


def test_moving_tokens_back_and_forth_has_its_own_gradient() -> None:
    lengths = torch.tensor([3, 1, 4])
    ends = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    layout = Packed.of(ends, 5, torch.arange(10) >= 8)
    x_TD = torch.randn(10, 2, 3, dtype=torch.float64, requires_grad=True)
    x_BD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.padded, (x_TD,))
    assert torch.autograd.gradcheck(lambda x: layout.packed(x.unflatten(0, (3, 5))), (
        torch.randn(15, 2, dtype=torch.float64, requires_grad=True),
    ))  # fmt: skip
    assert torch.autograd.gradcheck(layout.spread, (x_BD,))
    torch.testing.assert_close(layout.packed(layout.padded(x_TD))[:8], x_TD[:8])
    assert layout.spread(x_BD)[:8].equal(x_BD.repeat_interleave(lengths, 0))

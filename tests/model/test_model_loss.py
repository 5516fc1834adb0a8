"""Sums and counts of errors: against plain loops, split over batches, with rows of weight 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scshards.model.loss import masked_relative_error, masked_squared_error


@pytest.fixture
def four() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    predictions = 50 * torch.rand(6, 8, generator=g)
    targets = torch.randint(1, 51, (6, 8), generator=g).float()
    is_masked = torch.rand(6, 8, generator=g) < 0.4
    return predictions, targets, is_masked, torch.tensor([1.0, 1, 0, 1, 1, 0])


def test_against_loops(four: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    squared = relative = count = 0.0
    p, t, m, w = (x.tolist() for x in four)
    for b in range(6):
        for i in range(8):
            if m[b][i] and w[b]:
                squared += (p[b][i] - t[b][i]) ** 2
                relative += abs(p[b][i] - t[b][i]) / (t[b][i] + 1e-6)
                count += 1
    for f, expected in ((masked_squared_error, squared), (masked_relative_error, relative)):
        s, n = f(*four)
        assert s.ndim == n.ndim == 0
        assert s.item() == pytest.approx(expected, rel=1e-6)
        assert n.item() == count


def test_parts_add_up(four: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    whole = masked_squared_error(*four)
    parts = [masked_squared_error(*(x[i : i + 2] for x in four)) for i in (0, 2, 4)]
    assert sum(n.item() for _, n in parts) == whole[1].item()
    assert sum(s.item() for s, _ in parts) == pytest.approx(whole[0].item(), rel=1e-6)


def test_nothing_masked_is_zero_and_zero(four: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    p, t, m, w = four
    for f in (masked_squared_error, masked_relative_error):
        s, n = f(p, t, torch.zeros_like(m), w)
        assert (s.item(), n.item()) == (0, 0)


def test_what_does_not_count_reaches_neither_sum_nor_gradient(
    four: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    p, t, m, w = four
    counts = m & (w[:, None] > 0)
    expected = [f(*four) for f in (masked_squared_error, masked_relative_error)]
    p = torch.where(counts, p, float("nan")).requires_grad_(True)
    t = torch.where(counts, t, float("inf"))
    for f, (s0, n0) in zip((masked_squared_error, masked_relative_error), expected, strict=True):
        s, n = f(p, t, m, w)
        assert (s.item(), n.item()) == (s0.item(), n0.item())
    masked_squared_error(p, t, m, w)[0].backward()
    assert p.grad is not None
    assert torch.equal(p.grad[counts], (2 * (p - t)).detach()[counts])
    assert (p.grad[~counts] == 0).all()

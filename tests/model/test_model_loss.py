"""Sums and counts of errors: against plain loops, split over batches, with rows of weight 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scshards.model.loss import (
    cross_entropy,
    masked_squared_error,
    similarity_loss,
    zero_log_loss,
)


@pytest.fixture
def four() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    predictions = 50 * torch.rand(6, 8, generator=g)
    targets = torch.randint(1, 51, (6, 8), generator=g).float()
    is_masked = torch.rand(6, 8, generator=g) < 0.4
    return predictions, targets, is_masked, torch.tensor([1.0, 1, 0, 1, 1, 0])


def test_against_loops(four: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    squared = count = 0.0
    p, t, m, w = (x.tolist() for x in four)
    for b in range(6):
        for i in range(8):
            if m[b][i] and w[b]:
                squared += (p[b][i] - t[b][i]) ** 2
                count += 1
    s, n = masked_squared_error(*four)
    assert s.ndim == n.ndim == 0
    assert s.item() == pytest.approx(squared, rel=1e-6)
    assert n.item() == count


def test_parts_add_up(four: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    whole = masked_squared_error(*four)
    parts = [masked_squared_error(*(x[i : i + 2] for x in four)) for i in (0, 2, 4)]
    assert sum(n.item() for _, n in parts) == whole[1].item()
    assert sum(s.item() for s, _ in parts) == pytest.approx(whole[0].item(), rel=1e-6)


def test_nothing_masked_is_zero_and_zero(four: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    p, t, m, w = four
    s, n = masked_squared_error(p, t, torch.zeros_like(m), w)
    assert (s.item(), n.item()) == (0, 0)


def test_what_does_not_count_reaches_neither_sum_nor_gradient(
    four: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    p, t, m, w = four
    counts = m & (w[:, None] > 0)
    s0, n0 = masked_squared_error(*four)
    p = torch.where(counts, p, float("nan")).requires_grad_(True)
    t = torch.where(counts, t, float("inf"))
    s, n = masked_squared_error(p, t, m, w)
    assert (s.item(), n.item()) == (s0.item(), n0.item())
    s.backward()
    assert p.grad is not None
    assert torch.equal(p.grad[counts], (2 * (p - t)).detach()[counts])
    assert (p.grad[~counts] == 0).all()


def test_without_weights_each_position_counts_once(
    four: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    p, t, m, _ = four
    flat = masked_squared_error(p.flatten(), t.flatten(), m.flatten())
    ones = masked_squared_error(p, t, m, torch.ones(6))
    torch.testing.assert_close(flat, ones)


def test_zeros_against_a_loop(four: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    p, t, m, w = four
    probs, t = p / 50, t * (t > 25)
    expected = count = 0.0
    for b in range(6):
        for i in range(8):
            if m[b, i] and w[b]:
                x = probs[b, i].item()
                expected -= math.log(x if t[b, i] > 0 else 1 - x)
                count += 1
    s, n = zero_log_loss(probs, t, m, w)
    assert s.item() == pytest.approx(expected, rel=1e-5)
    assert n.item() == count
    # scGPT's own: torch's Bernoulli, over all positions.
    everywhere = torch.ones_like(m)
    s, n = zero_log_loss(probs, t, everywhere)
    bernoulli = torch.distributions.Bernoulli(probs=probs)
    torch.testing.assert_close(s / n, -bernoulli.log_prob((t > 0).float()).mean())


def test_certain_zeros_stay_finite() -> None:
    probs = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    s, _ = zero_log_loss(probs, torch.tensor([[0.0, 3.0, 3.0, 0.0]]), torch.ones(1, 4).bool())
    assert 30 < s.item() < 34
    s.backward()
    assert torch.isfinite(probs.grad).all()


def test_similarity_against_a_loop() -> None:
    cells = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.tensor([1.0, 1, 0, 1, 1])
    expected = 0.0
    for i in (0, 1, 3, 4):
        for j in (0, 1, 3, 4):
            a, b = cells[i].tolist(), cells[j].tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            cosine = 0.0 if i == j else max(dot / math.hypot(*a) / math.hypot(*b), 0.0)
            expected += 1 - (cosine - 0.4) ** 2
    s, n = similarity_loss(cells, weight, threshold=0.4)
    assert s.item() == pytest.approx(expected, rel=1e-5)
    assert n.item() == 16
    spoiled = torch.where(weight[:, None] > 0, cells.detach(), float("nan")).requires_grad_(True)
    t, _ = similarity_loss(spoiled, weight, threshold=0.4)
    assert t.item() == s.item()
    t.backward()
    assert torch.isfinite(spoiled.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert similarity_loss(cells, weight, threshold=0.4)[0].item() == s.item()


def test_classes_against_a_loop() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    codes, weight = torch.tensor([3, -1, 0, 2, 1]), torch.tensor([1.0, 1, 1, 0, 1])
    logits[3] = float("nan")
    logits.requires_grad_(True)
    expected = 0.0
    for i in (0, 2, 4):
        row = logits[i].tolist()
        expected += math.log(sum(map(math.exp, row))) - row[codes[i]]
    s, n = cross_entropy(logits, codes, weight)
    assert s.item() == pytest.approx(expected, rel=1e-5)
    assert n.item() == 3
    s.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[[1, 3]] == 0).all()
    nobody = cross_entropy(logits, torch.full((5,), -1), weight)
    assert [x.item() for x in nobody] == [0, 0]

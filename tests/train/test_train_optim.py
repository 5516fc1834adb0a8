from __future__ import annotations

import itertools
import math

import pytest
import torch
from train_support import small_model

from scshards.base.errors import ConfigError
from scshards.train.config import OptimSettings
from scshards.train.optim import learning_rate, make_optimizer, warmup


def test_the_rate_at_the_corners_of_the_schedule():
    s = OptimSettings(lr=2.0, warmup_steps=10, min_lr_ratio=0.1)
    rate = [learning_rate(i, 100, s) for i in range(100)]
    assert rate[0] == pytest.approx(0.2)
    assert rate[9] == rate[10] == pytest.approx(2.0)
    assert rate[55] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half-way of the cosine
    x = 89 / 90
    assert rate[99] == pytest.approx(2.0 * (0.1 + 0.9 * math.cos(math.pi * x / 2) ** 2))
    assert all(a > b for a, b in itertools.pairwise(rate[10:]))


def test_the_cosine_is_that_of_torch():
    s = OptimSettings(lr=1.0, warmup_steps=0)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for i in range(50):
        assert learning_rate(i, 50, s) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_a_constant_rate_stays():
    s = OptimSettings(lr=3.0, warmup_steps=3, schedule="constant")
    assert [learning_rate(i, 6, s) for i in range(6)] == pytest.approx([1, 2, 3, 3, 3, 3])


def test_warmup_is_three_percent_unless_told():
    assert warmup(OptimSettings(), 300) == 9
    assert warmup(OptimSettings(), 10_000_000) == 10_000
    assert warmup(OptimSettings(warmup_steps=5), 5) == 5
    with pytest.raises(ConfigError, match="longer than the run"):
        warmup(OptimSettings(warmup_steps=6), 5)


def test_only_matrices_decay():
    model = small_model()
    optimizer = make_optimizer(model, OptimSettings(weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        free = p.ndim < 2 or name == "encoder.embedding.weight"
        assert decay[id(p)] == (0.0 if free else 0.5), name
    assert len(decay) == len(list(model.parameters()))

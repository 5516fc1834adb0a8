from __future__ import annotations

import itertools
import math

import pytest
import torch
from train_support import small_model

from scshards.base.errors import ConfigError
from scshards.training.config import OptimSettings
from scshards.training.ema import WeightAverage
from scshards.training.optim import decay, learning_rate, make_optimizer, moments, warmup


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


def test_steps_are_those_of_torch():
    s = OptimSettings(
        lr=0.5, warmup_steps=3, schedule="step", decay_factor=0.8, decay_every=7, min_lr_ratio=0.5
    )
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.5)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.8)
    for i in range(3, 40):
        expected = max(0.25, theirs.get_last_lr()[0])
        assert learning_rate(i, 40, s) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        theirs.step()
    by_epoch = OptimSettings(lr=1.0, warmup_steps=0, schedule="step", decay_factor=0.5)
    rates = [learning_rate(i, 6, by_epoch, steps_per_epoch=2) for i in range(6)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_warm_up_stable_decay():
    s = OptimSettings(lr=2.0, warmup_steps=2, schedule="wsd", decay_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(i, 10, s) for i in range(10)]
    expected = [
        1,
        2,
        2,
        2,
        2,
        2,
        0.2 + 1.8 * 0.8,
        0.2 + 1.8 * 0.6,
        0.2 + 1.8 * 0.4,
        0.2 + 1.8 * 0.2,
    ]
    assert rates == pytest.approx(expected)
    assert decay(OptimSettings(schedule="wsd"), 95) == 10
    with pytest.raises(ConfigError, match="does not fit"):
        decay(s, 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"decay_every": 5},
        {"decay_steps": 5, "schedule": "step"},
        {"ema_best": True},
        {"ema": 1.0},
        {"max_skipped": -1},
    ],
)
def test_settings_that_do_nothing_or_can_not_be_are_refused(settings):
    with pytest.raises(ConfigError):
        OptimSettings(**settings)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_weight_decay_is_in_the_gradient_or_beside_it(name):
    """Two steps against Adam and AdamW written out (Kingma and Ba; Loshchilov and Hutter)."""
    s = OptimSettings(name=name, lr=0.1, weight_decay=0.3, eps=1e-3)
    model = torch.nn.Linear(3, 2, bias=False)
    w = model.weight.detach().double().clone()
    optimizer = make_optimizer(model, s)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in (1, 2):
        model.weight.grad = torch.cos(5 * model.weight.detach())
        g = torch.cos(5 * w) + (0.3 * w if name == "adam" else 0)
        if name == "adamw":
            w = w - 0.1 * 0.3 * w
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)
        optimizer.step()
        torch.testing.assert_close(model.weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_moments_are_there_from_the_start_and_change_nothing():
    model, plain = small_model(), small_model()
    ours = make_optimizer(model, OptimSettings())
    assert set(moments(model, ours)) == {
        f"{n}/{k}" for n, _ in model.named_parameters() for k in ("step", "exp_avg", "exp_avg_sq")
    }
    theirs = torch.optim.AdamW(
        plain.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for _ in range(3):
        for p in (*model.parameters(), *plain.parameters()):
            p.grad = torch.sin(p.detach() * 7)
        ours.step()
        theirs.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.equal(b)


def test_the_average_is_that_of_the_formula():
    model = small_model()
    average = WeightAverage(model, 0.7)
    name, p = next(iter(model.named_parameters()))
    expected = p.detach().double().clone()
    for step in range(40):
        with torch.no_grad():
            p.add_(0.1 * (step + 1))
        average.update(step)
        d = min(0.7, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * p.detach().double()
    torch.testing.assert_close(average.tensors()[name].double(), expected, rtol=1e-5, atol=1e-5)
    mine = p.detach().clone()
    with average.swapped():
        assert p.equal(average.tensors()[name]) and not p.equal(mine)
    assert p.equal(mine)


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

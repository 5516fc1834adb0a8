"""The optimizer and its learning rate: AdamW, and a pure function of the step.

Nothing of the schedule is ever saved: step and settings say it all. Called by the loop.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from scshards.base.errors import ConfigError
from scshards.train.config import OptimSettings


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over two groups: matrices decay; embeddings, biases and norms do not."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for p in model.parameters():
        (free if p.ndim < 2 or id(p) in embeddings else decayed).append(p)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    b1, b2 = settings.betas
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.lr,
        betas=(b1, b2),
        eps=settings.eps,
        fused=True,
    )


def warmup(settings: OptimSettings, total_steps: int) -> int:
    """Steps of warm-up; ConfigError when a number was asked for that the run does not have."""
    if settings.warmup_steps is None:
        return min(10_000, math.ceil(0.03 * total_steps))
    if settings.warmup_steps > total_steps:
        raise ConfigError(
            f"a warm-up of {settings.warmup_steps} steps is longer than the run ({total_steps})",
            where="optim.warmup_steps",
            advice="give fewer, or leave it out for 3% of the run",
        )
    return settings.warmup_steps


def learning_rate(step: int, total_steps: int, settings: OptimSettings) -> float:
    """The learning rate of a step, counted from 0.

    With W warm-up steps of T: ``lr (step + 1) / W`` up to step W - 1; then constant, or
    ``lr (m + (1 - m) (1 + cos(pi (step - W) / (T - W))) / 2)`` with m = `min_lr_ratio`, so that
    step W has the whole `lr` and the last one, T - 1, nearly ``m lr``. The cosine is that of scGPT's
    pretraining; its warm-up starts at 0, which wastes the first step.
    """
    w = warmup(settings, total_steps)
    if step < w:
        return settings.lr * (step + 1) / w
    if settings.schedule == "constant" or total_steps == w:
        return settings.lr
    x = min(1.0, (step - w) / (total_steps - w))
    low = settings.min_lr_ratio
    return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * x)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr

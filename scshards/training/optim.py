"""The optimizer and its learning rate: fused Adam or AdamW, and a pure function of the step.

Nothing of the schedule is ever saved: step and settings say it all. Called by prepare and the step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from scshards.base.errors import ConfigError
from scshards.model.transformer import CellModel
from scshards.training.settings import OptimSettings
from scshards.training.trained import rate_share


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Adam(W) over what is trained: matrices decay; embeddings, biases and norms do not.

    The parameters of a group have the same share of the learning rate (`layer_decay`). Each has its
    (zero) moments from the start, so that an optimizer of step 0 holds the same tensors as one of step
    1000 and a checkpoint can be read into either.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    layers = len(model.transformer_encoder.layers) if isinstance(model, CellModel) else 0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            share = rate_share(name, layers, settings.layer_decay)
            weight_decay = 0.0 if p.ndim < 2 or id(p) in embeddings else settings.weight_decay
            groups.setdefault((share, weight_decay), []).append(p)
    b1, b2 = settings.betas
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    optimizer = kind(
        [
            {"params": params, "weight_decay": weight_decay, "share": share}
            for (share, weight_decay), params in groups.items()
        ],
        lr=settings.lr,
        betas=(b1, b2),
        eps=settings.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return optimizer


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by trained parameter and kind, such as ``decoder.fc.0.weight/exp_avg``."""
    return {
        f"{name}/{kind}": tensor
        for name, p in model.named_parameters()
        if p.requires_grad
        for kind, tensor in optimizer.state[p].items()
    }


def warmup(settings: OptimSettings, total_steps: int) -> int:
    """Steps of warm-up; ConfigError when a number was asked for that the run does not have."""
    if settings.warmup_steps is None:
        return min(10_000, math.ceil(0.03 * total_steps))
    if settings.warmup_steps > total_steps:
        raise ConfigError(
            f"a warm-up of {settings.warmup_steps} steps is longer than the run ({total_steps})",
            where="optim.warmup_steps",
            advice="give fewer, such as --set optim.warmup_steps=0; where no config has a number, it is "
            "3% of the run",
        )
    return settings.warmup_steps


def decay(settings: OptimSettings, total_steps: int) -> int:
    """The last steps, during which a wsd schedule decays; ConfigError as for `warmup`."""
    if settings.decay_steps is None:
        return math.ceil(0.1 * total_steps)
    if settings.decay_steps > total_steps - warmup(settings, total_steps):
        raise ConfigError(
            f"a decay of {settings.decay_steps} steps does not fit into the run ({total_steps} steps) "
            "after its warm-up",
            where="optim.decay_steps",
            advice="give fewer, or leave it out for 10% of the run",
        )
    return settings.decay_steps


def learning_rate(
    step: int, total_steps: int, settings: OptimSettings, *, steps_per_epoch: int = 1
) -> float:
    """The learning rate of a step, counted from 0.

    With W warm-up steps of T, m = `min_lr_ratio` and s = step - W: ``lr (step + 1) / W`` up to step
    W - 1, so that step W has the whole `lr`; then by `schedule`

    cosine
        ``lr (m + (1 - m) (1 + cos(pi s / (T - W))) / 2)``, that of scGPT's pretraining (whose
        warm-up starts at 0, which wastes the first step).
    step
        ``lr max(m, f ** (s // n))`` with f = `decay_factor` and n = `decay_every` or an epoch: torch's
        StepLR, that of scGPT's fine-tuning.
    wsd
        ``lr`` until the last D = `decay_steps` steps (warm-up, stable, decay: Hu et al., MiniCPM,
        2024), which go down to m in a line: ``lr (m + (1 - m) (T - step) / (D + 1))``.
    constant
        ``lr``.
    """
    w = warmup(settings, total_steps)
    lr, low = settings.lr, settings.min_lr_ratio
    if step < w:
        return lr * (step + 1) / w
    if settings.schedule == "cosine" and total_steps > w:
        x = min(1.0, (step - w) / (total_steps - w))
        return lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * x)))
    if settings.schedule == "step":
        every = settings.decay_every or steps_per_epoch
        return lr * max(low, settings.decay_factor ** ((step - w) // every))
    if settings.schedule == "wsd":
        left = min(1.0, (total_steps - step) / (decay(settings, total_steps) + 1))
        return lr * (low + (1 - low) * left)
    return lr


def update(optimizer: torch.optim.Optimizer, lr: float, is_good: Tensor) -> None:
    """Take a step at a learning rate, or each group at its share of it, and forget the gradients.

    Where `is_good`, 0-d bool on the device, is False, weights, moments and their counts of steps stay as
    they are; the host need not know. The optimizer has to be a fused one.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1.0)
    told: Any = optimizer  # what torch's GradScaler tells it, by the same attributes
    told.grad_scale, told.found_inf = None, (~is_good).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

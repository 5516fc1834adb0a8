"""Low-rank adapters: trained beside frozen weights, and added into them when a model is written.

    y = x W' + b + alpha / rank * (x A') B'      A [rank, in], B [out, rank]   (LoRA, Hu et al., 2021)

B begins at 0, so that a model computes at first, to the bit, what it did without them. An adapted linear
layer keeps the names of its own weights; `lora_a` and `lora_b` stand beside them. Called by training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scshards.base import seeds

ATTENTION, FEED_FORWARD = ("Wqkv", "out_proj"), ("linear1", "linear2")
"""The linear layers of an encoder layer, by the last part of their names."""

SUFFIXES = ("lora_a", "lora_b")


class Adapted(nn.Linear):
    """A linear layer, whose weights it takes over, with an adapter; `key` seeds A."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, key: int) -> None:
        has_bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, bias=has_bias, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        # As torch draws a linear layer's weights, and as LoRA's authors draw A.
        a, bound = torch.empty(rank, base.in_features, device="cpu"), base.in_features**-0.5
        a.uniform_(-bound, bound, generator=torch.Generator().manual_seed(key))
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] to [..., out]."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_adapters(
    encoder: nn.Module, layers: tuple[str, ...], rank: int, alpha: float, *, seed: int
) -> list[str]:
    """Put an adapter beside each linear layer of these names that is trained, in place, on the CPU.

    What is drawn is a function of the seed and the layer's name in `encoder`.

    Returns
    -------
    The names of the layers that have one now.
    """
    found = [
        (name, module)
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in layers
        and module.weight.requires_grad
    ]
    for name, linear in found:
        above, _, last = name.rpartition(".")
        adapted = Adapted(linear, rank, alpha, seeds.key(seed, "adapters", name))
        setattr(encoder.get_submodule(above), last, adapted)
    return [name for name, _ in found]


def scales(model: nn.Module) -> dict[str, float]:
    """{name of a layer: its adapter's alpha / rank} of all adapted layers of a model."""
    return {n: m.scale for n, m in model.named_modules() if isinstance(m, Adapted)}


def merged(state: Mapping[str, Tensor], of: Mapping[str, float]) -> dict[str, Tensor]:
    """A model's tensors with the adapters added into the weights: those of a model without adapters.

    Parameters
    ----------
    state
        Whole tensors on the CPU, by name.
    of
        What `scales` says of the model.
    """
    plain = {n: t for n, t in state.items() if n.rpartition(".")[2] not in SUFFIXES}
    for name, scale in of.items():
        a, b = (state[f"{name}.{suffix}"].double() for suffix in SUFFIXES)
        weight = state[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight.double() + scale * (b @ a)).to(weight.dtype)
    return plain

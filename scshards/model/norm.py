"""Batch norm with statistics for each domain: scGPT's DSBN. Called by model.transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scshards.model.layout import Packed, Padded

EPS = 6.1e-5
MOMENTUM = 0.1

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class DomainNorm(nn.Module):
    """(x - mean) / sqrt(variance + 6.1e-5) with the mean and variance of the cell's domain.

    In training the two are taken over the real tokens of the domain's cells in this forward pass, on
    all ranks of `group`, and the running ones move a tenth towards them, the variance unbiased, as in
    nn.BatchNorm1d; in evaluation the running ones are used. No weight and bias, as in scGPT.

    Two things differ from scGPT, both in training only. It normalises a whole batch as its first
    cell's domain says, so that every batch must be of one domain: here domains can be mixed, and a
    batch of one comes to the same. And it counts padding as tokens, which makes the statistics
    depend on how long the longest cell happens to be: here padding is left out.

    Statistics are made cell by cell and put together by comparing the cells' domains, so that what
    a pass costs does not depend on the number of domains. The state_dict has scGPT's keys, a layer
    for each domain.

    Attributes
    ----------
    group
        The ranks that are normalised together, each with as many cells; None: this one alone. Their
        losses are taken to be added up: gradients reach the other ranks' cells, too.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, n_domains: int, d_model: int) -> None:
        super().__init__()
        self.group: dist.ProcessGroup | None = None
        self.register_buffer("running_mean", torch.zeros(n_domains, d_model))
        self.register_buffer("running_var", torch.ones(n_domains, d_model))
        self.register_buffer("num_batches_tracked", torch.zeros(n_domains, dtype=torch.int64))

    def forward(
        self, x_BLD: Tensor, domains_B: Tensor, weight_B: Tensor, layout: Padded | Packed
    ) -> Tensor:
        """Normalise the tokens of a batch.

        Parameters
        ----------
        x_BLD
            float [B, L, D], or as the layout is.
        domains_B
            int64 [B]: each cell's domain, 0 to n_domains - 1.
        weight_B
            float [B]: the statistics are taken over the cells that weigh anything.

        Returns
        -------
        Tensor
            float32, as x.
        """
        with torch.autocast(x_BLD.device.type, enabled=False):
            x_BLD = x_BLD.float()
            if self.training:
                mean_BD, variance_BD = self._measure(x_BLD, domains_B, weight_B, layout)
            else:
                mean_BD = self.running_mean.index_select(0, domains_B).float()
                variance_BD = self.running_var.index_select(0, domains_B).float()
            scale_BD = torch.rsqrt(variance_BD + EPS)
            return (x_BLD - layout.spread(mean_BD)) * layout.spread(scale_BD)

    def _measure(
        self, x_BLD: Tensor, domains_B: Tensor, weight_B: Tensor, layout: Padded | Packed
    ) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each cell's domain; zeros for a domain without tokens."""
        n_B1 = layout.sums(torch.ones_like(x_BLD[..., :1]))
        mean_BD = layout.sums(x_BLD) / n_B1.clamp(min=1)
        squares_BD = layout.sums((x_BLD - layout.spread(mean_BD)).square())
        # In float64, C cells of all ranks: few numbers, and products of it are never TF32.
        own = torch.cat([n_B1, mean_BD, squares_BD], 1).double()
        own = torch.cat([domains_B[:, None], torch.where(weight_B[:, None] > 0, own, 0)], 1)
        every = own if self.group is None else _Gathered.apply(own, self.group)
        d_model = x_BLD.shape[-1]
        domains_C1, n_C1, mean_CD, squares_CD = every.split([1, 1, d_model, d_model], 1)
        same_CC = domains_C1 == domains_C1.T
        alike_CC = same_CC.double()
        total_C1 = alike_CC @ n_C1
        some_C1 = total_C1.clamp(min=1)
        means_CD = alike_CC @ (n_C1 * mean_CD) / some_C1
        powers_CD = alike_CC @ (squares_CD + n_C1 * mean_CD.square()) / some_C1
        variances_CD = powers_CD - means_CD.square()
        self._remember(domains_C1.flatten().long(), same_CC, total_C1, means_CD, variances_CD)
        begin = 0 if self.group is None else dist.get_rank(self.group) * len(own)
        mine = slice(begin, begin + len(own))
        return means_CD[mine].float(), variances_CD[mine].float()

    @torch.no_grad()
    def _remember(
        self, domains_C: Tensor, same_CC: Tensor, n_C1: Tensor, mean_CD: Tensor, variance_CD: Tensor
    ) -> None:
        # What is written twice is the same to the bit: that of the first cell of the domain.
        first_C = same_CC.byte().argmax(1)
        unbiased_CD = variance_CD * (n_C1 / (n_C1 - 1).clamp(min=1))
        has_C1 = n_C1 > 0  # a tensor: no waiting for the device
        for buffer, new_CD in ((self.running_mean, mean_CD), (self.running_var, unbiased_CD)):
            old_CD = buffer[domains_C]
            new_CD = new_CD[first_C].to(buffer.dtype)
            buffer[domains_C] = torch.where(has_C1, old_CD.lerp(new_CD, MOMENTUM), old_CD)
        self.num_batches_tracked[domains_C] += has_C1.flatten()

    def _rows(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The state by scGPT's keys: views."""
        for k in range(len(self.running_mean)):
            for name in _BUFFERS:
                yield f"{prefix}bns.{k}.{name}", getattr(self, name)[k]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update(self._rows(prefix))

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = [tensor for key, tensor in state_dict.items() if key.startswith(prefix)]
        if given and local_metadata.get("assign_to_params_buffers", False):
            self.to_empty(device=given[0].device)  # the buffers may be of the device "meta"
        rows = dict(self._rows(prefix))
        for key, row in rows.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != row.shape:
                error_msgs.append(f"{key} is {list(state_dict[key].shape)}, not {list(row.shape)}")
            else:
                row.copy_(state_dict[key])
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in rows]


class _Gathered(torch.autograd.Function):
    """Every rank's rows behind one another; the gradient is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x_BD) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x_BD.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor, None]:
        grad_CD = grad_CD.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_CD, group=ctx.group)
        return grad_CD.tensor_split(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None

"""Batch norm with statistics for each domain: scGPT's DSBN. Called by model.transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 6.1e-5
MOMENTUM = 0.1


class DomainNorm(nn.Module):
    """(x - mean) / sqrt(variance + 6.1e-5) with the mean and variance of the cell's domain.

    In training the two are taken over the real tokens of the domain's cells in this (micro-)batch
    and rank, and the running ones move a tenth towards them, the variance unbiased, as in
    nn.BatchNorm1d; in evaluation the running ones are used. No weight and bias, as in scGPT.

    Two things differ from scGPT, both in training only. It normalises a whole batch as its first
    cell's domain says, so that every batch must be of one domain: here domains can be mixed, and a
    batch of one comes to the same. And it counts padding as tokens, which makes the statistics
    depend on how long the longest cell happens to be: here padding is left out.
    """

    def __init__(self, n_domains: int, d_model: int) -> None:
        super().__init__()
        # Only their running statistics are used, under the keys of scGPT's checkpoints.
        self.bns = nn.ModuleList(
            nn.BatchNorm1d(d_model, eps=EPS, momentum=MOMENTUM, affine=False)
            for _ in range(n_domains)
        )

    def forward(self, x_NtD: Tensor, domains_Nt: Tensor, counts_Nt: Tensor) -> Tensor:
        """Normalise tokens of any arrangement.

        Parameters
        ----------
        x_NtD
            float [..., D].
        domains_Nt
            int64 [...]: each token's domain, 0 to n_domains - 1.
        counts_Nt
            bool [...]: the tokens that the statistics are taken over.

        Returns
        -------
        Tensor
            float32 [..., D].
        """
        with torch.autocast(x_NtD.device.type, enabled=False):
            x = x_NtD.float()
            if self.training:
                mean_KD, variance_KD = self._measure(x, domains_Nt, counts_Nt)
            else:
                mean_KD, variance_KD = self._stacked("running_mean"), self._stacked("running_var")
            scale_KD = torch.rsqrt(variance_KD + EPS)
            return (x - mean_KD[domains_Nt]) * scale_KD[domains_Nt]

    def _measure(self, x: Tensor, domains: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each domain; zeros for a domain without tokens."""
        x_ND, domains_N = x.flatten(0, -2), domains.flatten()
        # A product with 0 and 1 rather than index_add: that adds up in any order on CUDA.
        is_of_KN = nn.functional.one_hot(domains_N, len(self.bns)).T * counts.flatten()
        weights_KN = is_of_KN.to(x_ND.dtype)
        n_K = weights_KN.sum(1)
        some_K1 = n_K.clamp(min=1)[:, None]
        mean_KD = weights_KN @ x_ND / some_K1
        variance_KD = weights_KN @ (x_ND - mean_KD[domains_N]).square() / some_K1
        self._remember(mean_KD.detach(), variance_KD.detach(), n_K)
        return mean_KD, variance_KD

    @torch.no_grad()
    def _remember(self, mean_KD: Tensor, variance_KD: Tensor, n_K: Tensor) -> None:
        unbiased_KD = variance_KD * (n_K / (n_K - 1).clamp(min=1))[:, None]
        for k, bn in enumerate(self.bns):
            step = MOMENTUM * (n_K[k] > 0)  # a tensor: no waiting for the device
            bn.get_buffer("running_mean").lerp_(mean_KD[k], step)
            bn.get_buffer("running_var").lerp_(unbiased_KD[k], step)
            bn.get_buffer("num_batches_tracked").add_(n_K[k] > 0)

    def _stacked(self, name: str) -> Tensor:
        return torch.stack([bn.get_buffer(name) for bn in self.bns]).float()

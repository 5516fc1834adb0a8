"""One optimizer step: the global batch in micro-batches, the loss over the global count.

    batch of this rank -> what each loss term is divided by, summed over ranks (once)
    each micro-batch: forward -> local sums / global counts * ranks -> backward (synced on the last)
    -> clip -> optimizer

What a term counts, such as masked values, differs in number per cell, rank and micro-batch, so a mean
of means would be biased; dividing each sum by the count of the whole step makes every split of a batch
the same step. DDP averages gradients over ranks, hence the factor. Called by the loop.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scshards.base import seeds
from scshards.base.errors import ScshardsError
from scshards.train.config import TrainConfig
from scshards.train.micro import AnyBatch, cut, token_counts
from scshards.train.optim import learning_rate, set_learning_rate
from scshards.train.setup import Ranks
from scshards.train.tasks import Task


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes
    ----------
    terms
        The names of the loss terms.
    sums
        float64 [terms] on the CPU: this rank's sum of each.
    counts
        float64 [terms] on the CPU: what each is divided by, of the global batch; 0 for a term that
        was left out of this step.
    tokens, padded_tokens, cells
        Of this rank: tokens without and with padding, cells.
    stop
        Whether any rank was asked to stop.
    """

    terms: tuple[str, ...]
    sums: Tensor
    counts: Tensor
    tokens: int
    padded_tokens: int
    cells: int
    lr: float
    grad_norm: float
    stop: bool


class Stepper:
    """Takes optimizer steps on a task's model.

    Parameters
    ----------
    task
        The losses, over a model on its device; wrapped for several ranks here.
    micro_batch
        Cells per rank and forward pass.
    total_steps
        Steps of the whole run, for the learning rate.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        ranks: Ranks,
        *,
        micro_batch: int,
        total_steps: int,
    ) -> None:
        self._task, self._optimizer, self._config, self._ranks = task, optimizer, config, ranks
        self._micro_batch, self._total_steps = micro_batch, total_steps
        self._forward = ranks.wrapped(task)

    def step(self, batch: AnyBatch, step: int, *, stop: bool = False) -> StepResult:
        """Step number `step` (from 0) on this rank's share of its global batch.

        Raises
        ------
        ScshardsError
            When the loss or the gradient is not finite; the optimizer has not stepped then.
        """
        config, ranks, weights = self._config, self._ranks, self._task.terms
        terms = tuple(weights)
        micros = list(cut(batch, self._micro_batch))
        each = [self._task.counts(m) for m in micros]
        mine = torch.tensor([*(sum(c[t] for c in each) for t in terms), int(stop)])
        *counts, stops = ranks.total_(mine).tolist()
        scale = [
            weights[t] * ranks.world_size / max(n, 1) for t, n in zip(terms, counts, strict=True)
        ]

        self._task.train()
        on_device = torch.zeros(len(terms), dtype=torch.float64, device=ranks.device)
        has = torch.zeros(len(terms), dtype=torch.bool)
        for i, micro in enumerate(micros):
            # Keyed by what it is for, so that a resumed run draws the same and nothing is saved.
            key = seeds.key(config.run.seed, "dropout", step, i, ranks.rank)
            torch.manual_seed(key)
            with self._synced_if(i == len(micros) - 1):
                with ranks.autocast():
                    sums = self._forward(micro.to(ranks.device, non_blocking=True), step)
                parts = [sums[t] * k for t, k in zip(terms, scale, strict=True) if t in sums]
                torch.stack(parts).sum().backward()
            has = torch.tensor([t in sums for t in terms])
            on_device[has] += torch.stack([sums[t].detach().double() for t in terms if t in sums])

        norm = nn.utils.clip_grad_norm_(self._task.parameters(), config.optim.clip).item()
        totals = on_device.cpu()
        if not math.isfinite(norm):
            self._refuse(step, batch, totals, norm)
        lr = learning_rate(step, self._total_steps, config.optim)
        set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        tokens = [token_counts(m) for m in micros]
        return StepResult(
            terms=terms,
            sums=totals,
            counts=torch.tensor(counts, dtype=torch.float64) * has,
            tokens=sum(real for real, _ in tokens),
            padded_tokens=sum(padded for _, padded in tokens),
            cells=len(batch),
            lr=lr,
            grad_norm=norm,
            stop=stops > 0,
        )

    def _synced_if(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._forward, DistributedDataParallel) and not last:
            return self._forward.no_sync()
        return contextlib.nullcontext()

    def _refuse(self, step: int, batch: AnyBatch, sums: Tensor, norm: float) -> None:
        # The summed gradient is not finite on every rank; name the cells of those that made it so.
        mine = None if bool(sums.isfinite().all()) else batch.cell_keys
        bad = [keys for keys in self._ranks.gather(mine) if keys is not None]
        if bad:
            what = "the loss is not finite"
            keys = [k for some in bad for k in some]
        else:
            what = f"the loss is finite but the gradient is not (norm {norm})"
            keys = [k for some in self._ranks.gather(batch.cell_keys) for k in some]
        raise ScshardsError(
            f"step {step + 1}: {what}; the weights were left as they were",
            where=f"cells {', '.join(keys)}",
            advice="lower optim.lr, lengthen optim.warmup_steps, or use run.precision=fp32; "
            "the same command goes on from the latest checkpoint",
        )

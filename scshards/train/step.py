"""One optimizer step: the global batch in micro-batches, the loss over the global count.

    batch of this rank -> what each loss term is divided by, summed over ranks (once)
    each micro-batch: forward -> local sums / global counts * ranks -> backward (synced on the last)
    -> clip -> is it finite on all ranks? -> optimizer -> moving average

What a term counts, such as masked values, differs in number per cell, rank and micro-batch, so a mean
of means would be biased; dividing each sum by the count of the whole step makes every split of a batch
the same step. DDP and FSDP2 average gradients over ranks, hence the factor. Called by the loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scshards.base import seeds
from scshards.base.errors import ScshardsError
from scshards.train.config import TrainConfig
from scshards.train.ema import WeightAverage
from scshards.train.guard import Guard, Skip
from scshards.train.micro import AnyBatch, cut, token_counts
from scshards.train.optim import learning_rate, set_learning_rate
from scshards.train.parallel import as_wide, clip_norm, synced_if, wrapped
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
    skip
        Why the step was left out; its sums and counts are 0 then.
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
    skip: Skip | None = None


class Stepper:
    """Takes optimizer steps on a task's model.

    Parameters
    ----------
    task
        The losses, over a model on its device, sharded or not; wrapped for several ranks here.
    micro_batch
        Cells per rank and forward pass.
    total_steps, steps_per_epoch
        Steps of the whole run and of an epoch, for the learning rate.
    average
        Is updated after each step.
    skipped_in_a_row
        Steps that were skipped just before.
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
        steps_per_epoch: int = 1,
        average: WeightAverage | None = None,
        skipped_in_a_row: int = 0,
    ) -> None:
        self._task, self._optimizer, self._config, self._ranks = task, optimizer, config, ranks
        self._micro_batch, self._total_steps = micro_batch, total_steps
        self._steps_per_epoch, self._average = steps_per_epoch, average
        self._forward = wrapped(task, ranks)
        self._guard = Guard(ranks, config.optim.max_skipped, skipped_in_a_row)

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the latest steps were skipped, one after another."""
        return self._guard.in_a_row

    def step(self, batch: AnyBatch, step: int, *, stop: bool = False) -> StepResult:
        """Step number `step` (from 0) on this rank's share of its global batch.

        Raises
        ------
        ScshardsError
            When the loss or the gradient was not finite too often, or memory is full; the optimizer
            has not stepped then.
        """
        config, ranks, weights = self._config, self._ranks, self._task.terms
        terms = tuple(weights)
        micros = list(cut(batch, self._micro_batch))
        if config.run.compile:
            micros = [as_wide(m, self._task.model.config) for m in micros]
        each = [self._task.counts(m) for m in micros]
        mine = torch.tensor([*(sum(c[t] for c in each) for t in terms), int(stop)])
        *counts, stops = ranks.total_(mine).tolist()
        scale = [
            weights[t] * ranks.world_size / max(n, 1) for t, n in zip(terms, counts, strict=True)
        ]

        self._task.train()
        # What a forward pass itself changes: running statistics, small, of domain norm alone.
        buffers = [(b, b.clone()) for b in self._task.buffers()]
        on_device = torch.zeros(len(terms), dtype=torch.float64, device=ranks.device)
        has = torch.zeros(len(terms), dtype=torch.bool)
        for i, micro in enumerate(micros):
            # Keyed by what it is for, so that a resumed run draws the same and nothing is saved.
            key = seeds.key(config.run.seed, "dropout", step, i, ranks.rank)
            torch.manual_seed(key)
            with synced_if(i == len(micros) - 1, self._forward), self._memory(micro):
                with ranks.autocast():
                    sums = self._forward(micro.to(ranks.device, non_blocking=True), step)
                parts = [sums[t] * k for t, k in zip(terms, scale, strict=True) if t in sums]
                torch.stack(parts).sum().backward()
            has = torch.tensor([t in sums for t in terms])
            on_device[has] += torch.stack([sums[t].detach().double() for t in terms if t in sums])

        norm = clip_norm(self._task.parameters(), config.optim.clip)
        totals = on_device.cpu()
        lr = learning_rate(
            step, self._total_steps, config.optim, steps_per_epoch=self._steps_per_epoch
        )
        skip = self._guard.judge(step, totals.tolist(), norm, batch.cell_keys)
        if skip is None:
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
            if self._average is not None:
                self._average.update(step)
        else:
            totals, has = torch.zeros_like(totals), torch.zeros_like(has)
            for buffer, before in buffers:
                buffer.copy_(before)
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
            skip=skip,
        )

    @contextlib.contextmanager
    def _memory(self, micro: AnyBatch) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:
            # CUDA has an error of its own for it; the CPU's allocator says it in words.
            if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
                raise
            fewer = max((d for d in range(1, len(micro)) if len(micro) % d == 0), default=0)
            advice = [f"run.micro_batch={fewer}"] if fewer else []
            advice += ["a smaller data.max_length", "model.d_model or model.n_layers"]
            if self._ranks.world_size > 1 and self._config.run.parallel == "ddp":
                advice.append('run.parallel="fsdp2"')
            raise ScshardsError(
                f"out of memory: a forward pass of {len(micro)} cells of up to "
                f"{self._config.collate.max_length} tokens does not fit",
                where=str(self._ranks.device),
                advice=f"use {', '.join(advice)}; the same command goes on from the latest checkpoint",
            ) from e

"""One optimizer step: the global batch in micro-batches, the loss over the global count.

    prepare   batch of this rank -> what each loss term is divided by, summed over ranks in the
              background; the batch on its way to the device
    step      each micro-batch: forward -> local sums / global counts * ranks -> backward (synced on
              the last) -> clip -> settle the step before -> optimizer, unless the gradient is not finite
    settle    sums and norm, read back -> was it left out? -> moving average

What a term counts, such as masked values, differs in number per cell, rank and micro-batch, so a mean
of means would be biased; dividing each sum by the count of the whole step makes every split of a batch
the same step. DDP and FSDP2 average gradients over ranks, hence the factor. The host waits for nothing
but the step before, while the device has this one to compute. Called by the loop.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scshards.base import seeds
from scshards.base.errors import ScshardsError
from scshards.model.transformer import AnyBatch
from scshards.ranks.ranks import Ranks
from scshards.tasks.base import Task
from scshards.training.config import TrainConfig
from scshards.training.ema import WeightAverage
from scshards.training.guard import Skip, judge, seed, too_many
from scshards.training.log.flops import Amounts
from scshards.training.micro import as_wide, cut, padded_tokens
from scshards.training.optim import learning_rate, update
from scshards.training.parallel import clip_norm, synced_if, wrapped
from scshards.training.trained import still
from scshards.training.transfer import Report, Sender


@dataclass(frozen=True)
class Share:
    """A rank's share of a global batch, ready for a step.

    Attributes
    ----------
    batch, sent
        On the CPU, and on the device, perhaps on its way there.
    micros
        The micro-batches of `sent`.
    total
        Waits for what each term is divided by, of the global batch, and how many ranks are to stop.
    """

    batch: AnyBatch
    sent: AnyBatch
    micros: list[AnyBatch]
    amounts: Amounts
    total: Callable[[], Tensor]

    @cached_property
    def counts(self) -> list[int]:
        """What each term is divided by."""
        return self.total()[:-1].tolist()

    @cached_property
    def stop(self) -> bool:
        """Whether any rank was asked to stop when it had this batch."""
        return bool(self.total()[-1] > 0)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes
    ----------
    step
        Its number, from 0.
    terms
        The names of the loss terms.
    sums
        float64 [terms] on the CPU: this rank's sum of each.
    counts
        float64 [terms] on the CPU: what each is divided by, of the global batch; 0 for a term that
        was left out of this step.
    amounts, padded_tokens
        Of this rank: cells, tokens and so on, without padding; tokens with it.
    skip
        Why the step was left out; its sums and counts are 0 then.
    """

    step: int
    terms: tuple[str, ...]
    sums: Tensor
    counts: Tensor
    amounts: Amounts
    padded_tokens: int
    lr: float
    grad_norm: float
    skip: Skip | None = None


class Stepper:
    """Takes optimizer steps on a task's model.

    Parameters
    ----------
    task
        The losses, over a model on its device, sharded or not; wrapped for several ranks here.
    optimizer
        A fused one: it can do nothing where the device says so.
    micro_batch
        Cells per rank and forward pass.
    total_steps, steps_per_epoch
        Steps of the whole run and of an epoch, for the learning rate.
    average
        Is updated after each step.
    skipped_in_a_row
        Steps that were skipped just before; as an attribute, how many of the latest were, one after
        another, of those that are settled.
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
        assert optimizer.defaults["fused"], "another kind would take steps that are to be left out"
        self._task, self._optimizer, self._config, self._ranks = task, optimizer, config, ranks
        self._micro_batch, self._total_steps = micro_batch, total_steps
        self._steps_per_epoch, self._average = steps_per_epoch, average
        self._forward, self._still = wrapped(task, ranks), still(task)
        self.skipped_in_a_row = skipped_in_a_row
        self._sender = Sender(ranks.device)
        self._taken: Callable[[], StepResult] | None = None

    def prepare(self, batch: AnyBatch, *, stop: bool = False) -> Share:
        """This rank's share of the next global batch, made ready while the device computes.

        Every rank must call it. `stop` says that this rank was asked to.
        """
        terms = tuple(self._task.terms)
        pieces = [self._task.counts(piece) for piece in cut(batch, self._micro_batch)]
        mine = torch.tensor([*(sum(c[t] for c in pieces) for t in terms), int(stop)])
        sent = self._sender.send(batch)
        micros = list(cut(batch, self._micro_batch, sent=sent))
        return Share(batch, sent, micros, Amounts.of(batch), self._ranks.total_later(mine))

    def step(self, share: Share, step: int) -> StepResult | None:
        """Take step number `step` (from 0); what comes back is the result of the one before it.

        Raises
        ------
        ScshardsError
            When loss or gradient of the step before was not finite, too often, or memory is full; the
            optimizer has not taken this step then.
        """
        config, ranks, weights = self._config, self._ranks, self._task.terms
        terms = tuple(weights)
        scale = [
            weights[t] * ranks.world_size / max(n, 1)
            for t, n in zip(terms, share.counts, strict=True)
        ]
        self._sender.arrived(share.sent)
        micros = share.micros
        if config.run.compile:
            kept = config.collate.n_leads + config.collate.kept_genes
            micros = [as_wide(m, self._task.model.config, kept) for m in micros]

        self._task.train()
        for frozen in self._still:
            frozen.eval()
        # What a forward pass itself changes: running statistics, small, of domain norm alone.
        buffers = [(b, b.clone()) for b in self._task.buffers()]
        totals = torch.zeros(len(terms), dtype=torch.float64, device=ranks.device)
        none = torch.zeros((), device=ranks.device)
        has = torch.zeros(len(terms), dtype=torch.bool)
        for i, micro in enumerate(micros):
            # Keyed by what it is for, so that a resumed run draws the same and nothing is saved.
            torch.manual_seed(seeds.key(config.run.seed, "dropout", step, i, ranks.rank))
            with synced_if(i == len(micros) - 1, self._forward), self._memory(micro):
                with ranks.autocast():
                    sums = self._forward(micro, step)
                found = torch.stack([sums[t].detach() if t in sums else none for t in terms])
                parts = [sums[t] * k for t, k in zip(terms, scale, strict=True) if t in sums]
                torch.stack(parts).sum().backward(seed(found))
            has = torch.tensor([t in sums for t in terms])
            totals += found

        norm = clip_norm(self._task.parameters(), config.optim.clip)
        before = self.settle()
        lr = learning_rate(
            step, self._total_steps, config.optim, steps_per_epoch=self._steps_per_epoch
        )
        is_good = norm.isfinite()
        update(self._optimizer, lr, is_good)
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(torch.where(is_good, buffer, was))
        report = Report(torch.cat([totals, norm.double()[None]]))
        tokens = sum(map(padded_tokens, micros))
        self._taken = functools.partial(self._settled, step, share, has, tokens, lr, report)
        return before

    def settle(self) -> StepResult | None:
        """The result of the latest step, once; every rank must call it.

        Whoever looks at weights, moments or average has to have called it: of a step that is not
        settled nobody knows yet whether it was taken.
        """
        taken, self._taken = self._taken, None
        return None if taken is None else taken()

    def _settled(
        self, step: int, share: Share, has: Tensor, tokens: int, lr: float, report: Report
    ) -> StepResult:
        """What a step did, by its sums and its norm, for which it waits."""
        *sums, norm = report.read().tolist()
        skip = judge(self._ranks, sums, norm, share.batch.cell_keys)
        self.skipped_in_a_row = 0 if skip is None else self.skipped_in_a_row + 1
        most = self._config.optim.max_skipped
        if skip is not None and self.skipped_in_a_row > most:
            raise too_many(skip, step, most)
        if skip is None and self._average is not None:
            self._average.update(step)
        counts = torch.tensor(share.counts, dtype=torch.float64) * has
        totals = torch.tensor(sums, dtype=torch.float64)
        return StepResult(
            step=step,
            terms=tuple(self._task.terms),
            sums=torch.zeros_like(totals) if skip else totals,
            counts=torch.zeros_like(counts) if skip else counts,
            amounts=share.amounts,
            padded_tokens=tokens,
            lr=lr,
            grad_norm=norm,
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
            if not self._config.run.activation_checkpointing:
                advice.append("run.activation_checkpointing=true")
            raise ScshardsError(
                f"out of memory: a forward pass of {len(micro)} cells of up to "
                f"{self._config.collate.max_length} tokens does not fit",
                where=str(self._ranks.device),
                advice=f"use {', '.join(advice)}; the same command goes on from the latest checkpoint",
            ) from e

"""One optimizer step: the global batch in micro-batches, the loss over the global count.

    batch of this rank -> count masked values, sum over ranks (once)
    each micro-batch: forward -> local sum / global count * ranks -> backward (synced on the last)
    -> clip -> optimizer

Masked values differ in number per cell, rank and micro-batch, so a mean of means would be biased;
dividing each sum by the count of the whole step makes every split of a batch the same step. DDP
averages gradients over ranks, hence the factor. Called by the loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scshards.base import seeds
from scshards.base.errors import ScshardsError
from scshards.cells.batch import Batch
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import ModelOutput
from scshards.train.config import TrainConfig
from scshards.train.optim import learning_rate, set_learning_rate
from scshards.train.setup import Ranks


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes
    ----------
    sums
        float64 [2] on the CPU: this rank's summed squared errors, masked values and MVC.
    n_masked
        Masked values of the global batch.
    tokens, padded_tokens, cells
        Of this rank: tokens without and with padding, cells.
    stop
        Whether any rank was asked to stop.
    """

    sums: Tensor
    has_mvc: bool
    n_masked: int
    tokens: int
    padded_tokens: int
    cells: int
    lr: float
    grad_norm: float
    stop: bool


class Stepper:
    """Takes optimizer steps on a model.

    Parameters
    ----------
    model
        The model on its device; wrapped for several ranks here.
    micro_batch
        Cells per rank and forward pass.
    total_steps
        Steps of the whole run, for the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        ranks: Ranks,
        *,
        micro_batch: int,
        total_steps: int,
    ) -> None:
        self._model, self._optimizer, self._config, self._ranks = model, optimizer, config, ranks
        self._micro_batch, self._total_steps = micro_batch, total_steps
        self._forward = ranks.wrapped(model)

    def step(self, batch: Batch, step: int, *, stop: bool = False) -> StepResult:
        """Step number `step` (from 0) on this rank's share of its global batch.

        Raises
        ------
        ScshardsError
            When the loss or the gradient is not finite; the optimizer has not stepped then.
        """
        config, ranks = self._config, self._ranks
        micros = list(cut(batch, self._micro_batch))
        counts = torch.tensor([_n_masked(batch), int(stop)])
        n_masked, stops = ranks.total_(counts).tolist()
        scale = ranks.world_size / max(n_masked, 1)

        self._model.train()
        on_device = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        has_mvc = False
        for i, micro in enumerate(micros):
            # Keyed by what it is for, so that a resumed run draws the same and nothing is saved.
            key = seeds.key(config.run.seed, "dropout", step, i, ranks.rank)
            torch.manual_seed(key)
            with self._synced_if(i == len(micros) - 1):
                masked, mvc = self._losses(micro.to(ranks.device, non_blocking=True))
                loss = masked * scale
                if mvc is not None:
                    has_mvc = True
                    loss = loss + config.run.mvc_weight * scale * mvc
                loss.backward()
            on_device[0] += masked.detach()
            if mvc is not None:
                on_device[1] += mvc.detach()

        norm = nn.utils.clip_grad_norm_(self._model.parameters(), config.optim.clip).item()
        sums = on_device.cpu()
        if not math.isfinite(norm):
            self._refuse(step, batch, sums, norm)
        lr = learning_rate(step, self._total_steps, config.optim)
        set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(
            sums=sums,
            has_mvc=has_mvc,
            n_masked=n_masked,
            tokens=int((~batch.is_pad).sum()),
            padded_tokens=sum(m.genes.numel() for m in micros),
            cells=len(batch),
            lr=lr,
            grad_norm=norm,
            stop=stops > 0,
        )

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        with self._ranks.autocast():
            out = self._forward(batch)
        return summed_errors(out, batch)[:2]

    def _synced_if(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._forward, DistributedDataParallel) and not last:
            return self._forward.no_sync()
        return contextlib.nullcontext()

    def _refuse(self, step: int, batch: Batch, sums: Tensor, norm: float) -> None:
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


def summed_errors(out: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
    """Squared errors summed over the masked values, of the predictions and of MVC, and their count.

    All three are 0-d; sums are float32 or better whatever the model computed in.
    """
    masked, count = masked_squared_error(
        out.predictions.float(), batch.targets, batch.is_masked, batch.weight
    )
    if out.mvc_predictions is None:
        return masked, None, count
    mvc, _ = masked_squared_error(
        out.mvc_predictions.float(), batch.targets, batch.is_masked, batch.weight
    )
    return masked, mvc, count


def cut(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in pieces of `rows` cells, each only as wide as its own longest cell."""
    if rows >= len(batch):
        yield batch
        return
    for i in range(0, len(batch), rows):
        r = slice(i, i + rows)
        width = int((~batch.is_pad[r]).sum(dim=1).max())
        yield dataclasses.replace(
            batch,
            genes=batch.genes[r, :width],
            values=batch.values[r, :width],
            targets=batch.targets[r, :width],
            is_masked=batch.is_masked[r, :width],
            is_pad=batch.is_pad[r, :width],
            keys=batch.keys[r],
            labels={k: v[r] for k, v in batch.labels.items()},
            weight=batch.weight[r],
        )


def _n_masked(batch: Batch) -> int:
    return int((batch.is_masked & (batch.weight > 0)[:, None]).sum())

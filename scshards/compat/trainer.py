"""scGPT's train and evaluate, and the losses that its scripts hand them. See compat.

`model` is a `TransformerModel` or whatever takes the same arguments. Metrics go to Weights & Biases
when the script has a run open there, and come back as a dictionary in any case.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scshards.base.errors import ConfigError, ScshardsError
from scshards.cells.vocab import Vocab
from scshards.model.loss import masked_squared_error, zero_log_loss

CLIP = 1.0
"""The norm that scGPT clips gradients to."""

ECS_WEIGHT = 10.0
"""What scGPT weighs the similarity loss with."""


class Batches(Protocol):
    """What both take of a loader."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]: ...


MaskedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
LabelLoss = Callable[[Tensor, Tensor], Tensor]


def masked_mse_loss(input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the positions of a bool mask; 0 when there is none."""
    total, count = masked_squared_error(input, target, mask)
    return total / count.clamp(min=1)


def criterion_neg_log_bernoulli(input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log p(the target is zero, or is not) over the positions of a mask; 0 without any."""
    total, count = zero_log_loss(input, target, mask)
    return total / count.clamp(min=1)


def train(
    model: nn.Module,
    loader: Batches,
    vocab: Vocab | Mapping[str, int],
    criterion_gep_gepc: MaskedLoss,
    criterion_dab: LabelLoss | None,
    criterion_cls: LabelLoss | None,
    scaler: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    device: torch.device | str,
    config: Any,
    logger: Any,
    epoch: int,
) -> dict[str, float]:
    """Train for one epoch, as scGPT does: a step a batch, the terms added up with scGPT's weights.

    Parameters
    ----------
    loader
        Of `prepare_dataloader`.
    vocab
        Gives the id of `config.pad_token`.
    criterion_gep_gepc, criterion_dab, criterion_cls
        Of predicted values (with a mask), of domains, of classes.
    scaler
        torch's GradScaler.
    scheduler
        Only its learning rate is logged; scripts step it after each epoch.
    config
        scGPT's: `task`, `pad_token`, `mask_value`, `amp`, `log_interval`, `dab_weight`, and the flags
        `GEP`, `GEPC`, `CLS`, `ESC`, `DAR`, `DSBN`, `use_batch_labels`, `explicit_zero_prob`.
    logger
        Gets a line every `log_interval` batches.

    Returns
    -------
    dict
        The mean of each term over the batches of the epoch, under the names that scGPT logs
        (`train/gep`, `train/mvc`, ...), and of all together, `train/loss`.

    Raises
    ------
    ScshardsError
        When a gradient is not finite and the scaler is off: with it, such a step is left out and logged.
    """
    model.train()
    n_batches = len(loader)
    sums: dict[str, float] = defaultdict(float)
    shown: dict[str, float] = defaultdict(float)
    n, started = 0, time.monotonic()
    for n, data in enumerate(loader, 1):
        with _autocast(device, config.amp):
            inputs, output = _forward(model, data, vocab, device, config, training=True)
            terms = _terms(inputs, output, config, criterion_gep_gepc, criterion_dab, criterion_cls)
            weights = {
                "train/ecs": ECS_WEIGHT,
                "train/dab": float(getattr(config, "dab_weight", 1)),
            }
            loss = torch.stack([weights.get(k, 1.0) * v for k, v in terms.items()]).sum()
        model.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not bool(norm.isfinite()):
            if not scaler.is_enabled():
                raise ScshardsError(
                    f"epoch {epoch}, batch {n}: the gradient is not finite; the weights were left "
                    "as they were",
                    advice="lower the learning rate, or look for values that are no numbers",
                )
            logger.warning(f"infinite gradient at scale {scaler.get_scale()}: the step is left out")
        scaler.step(optimizer)
        scaler.update()
        numbers = {k: float(v.detach()) for k, v in terms.items()}
        _log(numbers)
        for name, value in (numbers | {"train/loss": float(loss.detach())}).items():
            sums[name] += value
            shown[name] += value
        if n % config.log_interval == 0:
            ms = 1000 * (time.monotonic() - started) / config.log_interval
            parts = [
                f"{k.removeprefix('train/')} {v / config.log_interval:5.2f}"
                for k, v in shown.items()
            ]
            logger.info(
                f"| epoch {epoch:3d} | {n:3d}/{n_batches:3d} batches | "
                f"lr {scheduler.get_last_lr()[0]:05.5f} | ms/batch {ms:5.2f} | " + " | ".join(parts)
            )
            shown.clear()
            started = time.monotonic()
    return {k: v / n for k, v in sums.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Batches,
    vocab: Vocab | Mapping[str, int],
    criterion_gep_gepc: MaskedLoss,
    criterion_dab: LabelLoss | None,
    criterion_cls: LabelLoss | None,
    device: torch.device | str,
    config: Any,
    epoch: int,
) -> float:
    """The mean loss over cells: of classes for the task "annotation", else of masked values.

    As in scGPT, the mean of a batch counts by its cells. With `config.DAR` that of domains, times
    `dab_weight`, is added to the `valid/loss` that is logged, and not to what is returned. Parameters
    are those of `train`.
    """
    model.eval()
    total = total_dab = 0.0
    cells = 0
    for data in loader:
        with _autocast(device, config.amp):
            inputs, output = _forward(model, data, vocab, device, config, training=False)
            if config.task == "annotation":
                loss = _needed(criterion_cls, "criterion_cls")(
                    output["cls_output"], inputs["celltype_labels"]
                )
            else:
                hidden = inputs["values"].eq(config.mask_value)
                loss = criterion_gep_gepc(output["mlm_output"], inputs["target_values"], hidden)
            if config.DAR:
                dab = _needed(criterion_dab, "criterion_dab")
                total_dab += float(dab(output["dab_output"], inputs["batch_labels"])) * len(
                    data["gene_ids"]
                )
        total += float(loss) * len(data["gene_ids"])
        cells += len(data["gene_ids"])
    if not cells:
        raise ConfigError("the loader gives no cells to evaluate on")
    weighted = total_dab * config.dab_weight if config.DAR else 0.0
    _log({"valid/loss": (total + weighted) / cells, "epoch": epoch})
    return total / cells


def _forward(
    model: nn.Module,
    data: Mapping[str, Tensor],
    vocab: Vocab | Mapping[str, int],
    device: torch.device | str,
    config: Any,
    *,
    training: bool,
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    inputs = {name: tensor.to(device) for name, tensor in data.items()}
    if getattr(config, "use_mod", False):
        raise ConfigError("config.use_mod: this model has no modalities", advice="leave it out")
    needs_domains = config.use_batch_labels or config.DSBN
    output = model(
        inputs["gene_ids"],
        inputs["values"],
        src_key_padding_mask=inputs["gene_ids"].eq(vocab[config.pad_token]),
        batch_labels=inputs["batch_labels"] if needs_domains else None,
        CLS=config.CLS,
        MVC=training and config.GEPC,
        ECS=training and config.ESC,
    )
    return inputs, output


def _terms(
    inputs: Mapping[str, Tensor],
    output: Mapping[str, Tensor],
    config: Any,
    criterion_gep_gepc: MaskedLoss,
    criterion_dab: LabelLoss | None,
    criterion_cls: LabelLoss | None,
) -> dict[str, Tensor]:
    """Each loss term that the config asks for, under the name that scGPT logs it by."""
    targets, hidden = inputs["target_values"], inputs["values"].eq(config.mask_value)
    terms: dict[str, Tensor] = {}
    if config.GEP:
        terms["train/gep"] = criterion_gep_gepc(output["mlm_output"], targets, hidden)
    if config.GEP and config.explicit_zero_prob:
        terms["train/nzlp"] = criterion_neg_log_bernoulli(output["mlm_zero_probs"], targets, hidden)
    if config.GEPC:
        terms["train/mvc"] = criterion_gep_gepc(output["mvc_output"], targets, hidden)
    if config.GEPC and config.explicit_zero_prob:
        terms["train/mvc_nzlp"] = criterion_neg_log_bernoulli(
            output["mvc_zero_probs"], targets, hidden
        )
    if config.CLS:
        cls = _needed(criterion_cls, "criterion_cls")
        terms["train/cls"] = cls(output["cls_output"], inputs["celltype_labels"])
    if config.ESC:
        terms["train/ecs"] = output["loss_ecs"]
    if config.DAR:
        dab = _needed(criterion_dab, "criterion_dab")
        terms["train/dab"] = dab(output["dab_output"], inputs["batch_labels"])
    if not terms:
        raise ConfigError(
            "the config asks for no loss term", advice="set GEP, GEPC, CLS, ESC or DAR"
        )
    return terms


def _needed(criterion: LabelLoss | None, name: str) -> LabelLoss:
    if criterion is None:
        raise ConfigError(f"the config asks for a loss that needs {name}, which is None")
    return criterion


def _autocast(device: torch.device | str, enabled: bool) -> torch.autocast:
    """scGPT's mixed precision: float16 on CUDA, torch's default elsewhere."""
    return torch.autocast(torch.device(device).type, enabled=bool(enabled))


def _log(metrics: Mapping[str, float]) -> None:
    """To Weights & Biases, when the script has imported it and opened a run."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.log(dict(metrics))

"""The cells of one step of a run, and the loss of each: what was in the batch of a spike.

    RUN, step -> the checkpoint before -> its place in the stream -> the batch of all ranks -> its cells

The order is a function of the config, so no run has to note its cells. Called by `scshards replay`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from scshards.base.errors import ConfigError
from scshards.base.progress import Table
from scshards.cells.batch import Labels, split_keys
from scshards.model.transformer import AnyBatch
from scshards.ranks.ranks import Ranks, ranks
from scshards.shards.shardset import ShardSet
from scshards.streaming.loader import CellLoader
from scshards.tasks.base import Task
from scshards.training.data import train_loader
from scshards.training.micro import cut, padded_tokens
from scshards.training.plan import TaskPlan
from scshards.training.save.checkpoint import Checkpoints, complete, step_of
from scshards.training.save.folder import RunFolder
from scshards.training.trained import choose_trained

_SHOWN = 10
"""Cells that a person is shown, those with the largest losses."""


@dataclass(frozen=True, kw_only=True)
class ReplayedCell:
    """A cell of the batch: where it is from, its tokens, and its mean loss, None where it has none."""

    key: str
    source: str
    row: int
    labels: dict[str, str]
    tokens: int
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The batch of a step.

    Attributes
    ----------
    step, epoch
        The step, counted from 1 as in metrics.jsonl, and its epoch, from 0.
    weights_of
        The step after which the weights were that the losses are computed by; 0: before the first.
    criterion
        The loss term.
    cells
        By falling loss; those whose loss is not finite come first.
    """

    step: int
    epoch: int
    weights_of: int
    criterion: str
    cells: tuple[ReplayedCell, ...]

    def text(self) -> list[str | Table]:
        """The parts of what a person is shown."""
        losses = sorted(c.loss for c in self.cells if c.loss is not None and math.isfinite(c.loss))
        rows = [
            (
                c.key,
                c.source,
                c.row,
                ", ".join(f"{k}={v}" for k, v in c.labels.items()) or None,
                f"{c.tokens:,}",
                None if c.loss is None else f"{c.loss:.4g}",
            )
            for c in self.cells[:_SHOWN]
        ]
        said = f"step {self.step:,}, epoch {self.epoch}: {len(self.cells):,} cells"
        if losses:
            said += (
                f"; {self.criterion} of a cell, by the weights after step {self.weights_of:,}: "
                f"{losses[len(losses) // 2]:.4g} in the middle, {losses[-1]:.4g} at most"
            )
        return [Table(("key", "source", "row", "labels", "tokens", self.criterion), rows), said]


@torch.no_grad()
def replay(
    folder: str,
    step: int,
    *,
    root: str | None = None,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> Replay:
    """The cells that a run took step number `step` with, from 1 on, over all its ranks.

    Losses are those of each cell alone, without dropout, by the weights of the latest checkpoint before
    the step. A run on a number of ranks that does not divide its lanes, as only a resumed one can be,
    had the cells of that epoch in other batches.

    Parameters
    ----------
    folder
        What `scshards train -o` wrote.
    root
        The shard set; None: the address that the run was started with.

    Raises
    ------
    ConfigError
        When `folder` is no run, or the run is a branch that has no checkpoint before the step.
    """
    run = RunFolder(folder)
    config = run.config()
    if step < 1:
        raise ConfigError(f"steps are counted from 1, not {step}", where="STEP")
    root, taken = root or run.root(), 0
    with ranks(device, config.run.precision) as here:
        # Cut into cells, which packed batches can't be; the cells are the same.
        whole = replace(config.data, collate=replace(config.data.collate, tokens_per_batch=None))
        padded, alone = replace(config, data=whole), Ranks(0, 1, here.device)
        loader = train_loader(root, padded, alone, config.run.batch_size, storage_options)
        place = run.place(config, storage_options)
        before = [name for name in complete(place) if step_of(name) < step]
        plan = TaskPlan(config, ShardSet(root, storage_options))
        model = plan.fresh()
        choose_trained(model, config.optim, seed=config.run.seed)
        if before:
            weights = {f"model/{name}": t for name, t in model.state_dict().items()}
            checkpoints = Checkpoints(place, alone, keep_last=1)
            state = checkpoints.load(before[-1], weights)
            loader.load_state_dict(state.loader)
            taken = state.step
        elif config.run.branch is not None:
            raise ConfigError(
                f"the run is a branch of {config.run.branch}, and has no checkpoint before step "
                f"{step}",
                where=run.path,
                advice="give the run that it is a branch of, or a later step",
            )
        else:
            plan.start(model)
        _skip(loader, step - 1 - taken)
        epoch = loader.epoch
        with loader:
            batch = next(iter(loader))
        task = plan.task(model.to(here.device)).eval()
        cells = _cells(loader, batch, [_told(task, piece, here) for piece in cut(batch, 1)])
    return Replay(step=step, epoch=epoch, weights_of=taken, criterion=task.criterion, cells=cells)


def _skip(loader: CellLoader, batches: int) -> None:
    """Go on by so many batches, over ends of epochs, without reading one."""
    while batches >= (left := loader.batches_left):
        batches -= left
        loader.set_epoch(loader.epoch + 1)
    loader.load_state_dict(loader.state_after(batches))


def _told(task: Task, cell: AnyBatch, here: Ranks) -> tuple[int, float | None]:
    """The tokens of one cell, and its mean loss."""
    n = task.counts(cell)[task.criterion]
    moved = cell.to(here.device)
    with here.autocast():
        out = task.run(moved, None)
    loss = float(task.sums(moved, out)[task.criterion]) / n if n else None
    return padded_tokens(cell), loss


def _cells(
    loader: CellLoader, batch: AnyBatch, told: list[tuple[int, float | None]]
) -> tuple[ReplayedCell, ...]:
    assert isinstance(batch.labels, Labels)
    labels = {c: batch.labels.text(c) for c in batch.labels}
    sources, rows = split_keys(batch.key.numpy())
    found = [
        ReplayedCell(
            key=key,
            source=loader.sources[sources[i]].name,
            row=int(rows[i]),
            labels={c: texts[i] for c, texts in labels.items()},
            tokens=told[i][0],
            loss=told[i][1],
        )
        for i, key in enumerate(batch.cell_keys)
    ]

    def height(cell: ReplayedCell) -> float:
        if cell.loss is None:
            return -math.inf
        return cell.loss if math.isfinite(cell.loss) else math.inf

    return tuple(sorted(found, key=height, reverse=True))

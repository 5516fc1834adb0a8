"""What a run has before its first step: cells, model, optimizer, and where it goes on; `prepared`.

    config, shard set -> loaders -> model, task, optimizer -> the latest checkpoint -> RUN is claimed

Nothing is written before config, shard set and folder are known to fit together. Called by the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scshards.base.errors import StateError
from scshards.model.scgpt import write_folder
from scshards.model.transformer import CellModel
from scshards.ranks.ranks import Ranks, check_packed
from scshards.shards.shardset import ShardSet
from scshards.streaming.loader import CellLoader
from scshards.tasks.base import Task
from scshards.training.config import TrainConfig, with_unknown
from scshards.training.data import train_loader
from scshards.training.ema import WeightAverage
from scshards.training.heldout import HeldOut
from scshards.training.log.metrics import MetricsLog
from scshards.training.log.trackers import check_trackers, open_trackers
from scshards.training.optim import decay, make_optimizer, moments, warmup
from scshards.training.parallel import prepare, unsharded
from scshards.training.plan import TaskPlan, plan_task
from scshards.training.save.branch import branch_state
from scshards.training.save.checkpoint import Checkpoints, TrainState
from scshards.training.save.folder import RunFolder
from scshards.training.trained import choose_trained


@dataclass(kw_only=True)
class Run:
    """All that a run is made of.

    Attributes
    ----------
    loader
        A batch of it is this rank's share of one step, on any number of ranks.
    held_out
        What is evaluated.
    micro_batch
        Cells of a rank in a forward pass.
    total, steps_per_epoch
        Steps.
    state
        Where the run is.
    notes
        What a person should know, in sentences.
    """

    config: TrainConfig
    here: Ranks
    folder: RunFolder
    plan: TaskPlan
    loader: CellLoader
    held_out: HeldOut
    micro_batch: int
    total: int
    steps_per_epoch: int
    model: CellModel
    task: Task
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    checkpoints: Checkpoints
    state: TrainState
    log: MetricsLog
    notes: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """What this rank saves; buffers, which ranks may differ in, are the first one's."""
        return _tensors(self.model, self.optimizer, self.average, shared=self.here.is_main)

    def judged(self) -> AbstractContextManager[None]:
        """The model has the weights that evaluations, and so `best_model.pt`, take."""
        average = self.average
        return average.swapped() if average and self.config.optim.ema_best else nullcontext()

    def publish(self) -> None:
        """The model as it is becomes RUN's; every rank must call it."""
        whole = unsharded(self.model)
        if self.here.is_main:
            args = self.plan.args(self.state.step)
            write_folder(str(self.folder.path), whole, self.plan.vocab.to_dict(), args)
            self.plan.write_names(self.folder.path)

    def about(self) -> dict[str, Any]:
        """What is computed, and on what."""
        parameters = list(self.model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "ranks": self.here.world_size,
            "device": str(self.here.device),
            "precision": "bf16" if self.here.bf16 else "fp32",
        }


def prepared(
    root: str,
    folder: str | Path,
    config: TrainConfig,
    here: Ranks,
    stack: ExitStack,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """The run in `folder`, new or where it was; what has to be closed is on the `stack`.

    The parameters, and what is raised, are those of `train`. Every rank must call it.
    """
    every = config.run
    if config.collate.tokens_per_batch is not None:
        check_packed(here.device)
    check_trackers(every.trackers)
    run = RunFolder(folder)
    run.check(config)

    # Cells.
    rank_batch, micro_batch = config.rank_batch(here.world_size)
    plan = plan_task(config, ShardSet(root, storage_options))
    loader = train_loader(root, config, here, rank_batch, storage_options)
    if len({*here.gather(loader.state_dict()["fingerprint"])}) > 1:
        raise StateError(
            "ranks have other cells than each other: some found an index bad that others could read",
            where=root,
            advice="start again; where it lasts, run scshards verify on the shard set",
        )
    steps_per_epoch = len(loader)
    total = config.total_steps(steps_per_epoch)
    warmup(config.optim, total)  # both refuse to be longer than the run
    decay(config.optim, total)

    # Model: made from the seed and the checkpoint to start from, the same on every rank.
    model = plan.fresh()
    notes = plan.notes + plan.start(model)
    choose_trained(model, config.optim, seed=every.seed)
    model.to(here.device)
    task = plan.task(model)
    prepare(model, here, every)
    held_out = HeldOut(root, config, plan, task, here, micro_batch, storage_options)
    notes += held_out.notes
    optimizer = make_optimizer(model, config.optim)
    average = WeightAverage(model, config.optim.ema) if config.optim.ema else None

    # Resume: every rank looks at RUN before the first one writes there; nobody else does meanwhile.
    here.first(lambda: stack.enter_context(run.lock()))
    changed = run.check(config)  # it may have been another's since
    checkpoints = stack.enter_context(
        Checkpoints(
            every.checkpoints or run.checkpoints,
            here,
            keep_last=every.keep_last,
            keep_every=every.keep_every,
        )
    )
    state = TrainState()
    if saved := checkpoints.latest():
        state = checkpoints.load(saved, _tensors(model, optimizer, average, shared=True))
        changed |= run.refuse_other(state.config, config, every.checkpoints or run.path)
        loader.load_state_dict(state.loader)
        if not (run.path / "best_model.pt").exists():  # a new folder, or lost: choose anew
            state.best_step = state.best_loss = None
            state.best = {}
        if {"evaluate.sets", "evaluate.probe", "evaluate.probe_cells"} & changed.keys():
            state.best = {n: v for n, v in state.best.items() if not HeldOut.may_mean_another(n)}
    elif every.branch is not None:
        state = branch_state(config, here, _tensors(model, optimizer, average, shared=True))
        loader.load_state_dict(state.loader)
        notes = (*notes, f"goes on from {every.branch}, after step {state.step:,}")
    else:
        config.check_lanes(here.world_size)
    state.config = with_unknown(config.tables(), state.config)
    here.barrier()
    if here.is_main:
        run.claim(state.config, root)
        notes = (*notes, *run.unknown(state.others))
    for name, (old, new) in changed.items():
        notes = (*notes, f"changed since this run started: {name} was {old}, is {new}")
    trackers = stack.enter_context(
        open_trackers(
            every.trackers if here.is_main else (), run.path, config.tables(), step=state.step
        )
    )
    return Run(
        config=config,
        here=here,
        folder=run,
        plan=plan,
        loader=loader,
        held_out=held_out,
        micro_batch=micro_batch,
        total=total,
        steps_per_epoch=steps_per_epoch,
        model=model,
        task=task,
        optimizer=optimizer,
        average=average,
        checkpoints=checkpoints,
        state=state,
        log=MetricsLog(run.metrics, state.step, enabled=here.is_main, trackers=trackers),
        notes=notes,
    )


def _tensors(
    model: CellModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    *,
    shared: bool,
) -> dict[str, Tensor]:
    mine = model.state_dict()
    if not shared:
        mine = {n: mine[n] for n, _ in model.named_parameters()}
    kinds = {"model": mine, "optimizer": moments(model, optimizer)}
    kinds |= {"average": average.tensors()} if average is not None else {}
    return {f"{kind}/{name}": t for kind, of in kinds.items() for name, t in of.items()}

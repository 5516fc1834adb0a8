"""What a run has before its first step: cells, model, optimizer, and where it goes on; `Run`.

    config, shard set -> loaders -> model, task, optimizer -> the latest checkpoint -> RUN is claimed

Nothing is written before config, shard set and folder are known to fit together. Called by the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from scshards.base.errors import ScshardsError, StateError
from scshards.model.scgpt import write_folder
from scshards.ranks.ranks import Ranks, check_packed
from scshards.shards.before import another_set
from scshards.shards.shardlist import ShardList
from scshards.shards.shardset import ShardSet
from scshards.training.config import TrainConfig, with_unknown
from scshards.training.data import train_loader
from scshards.training.ema import WeightAverage
from scshards.training.heldout import HeldOut
from scshards.training.log.metrics import MetricsLog
from scshards.training.log.trackers import check_trackers, open_trackers
from scshards.training.optim import decay, make_optimizer, moments, warmup
from scshards.training.parallel import prepare, unsharded
from scshards.training.plan import TaskPlan
from scshards.training.save.branch import branch_state
from scshards.training.save.checkpoint import Checkpoints, TrainState
from scshards.training.save.folder import RunFolder
from scshards.training.trained import choose_trained


class Run:
    """A run in its folder, new or where it was; what has to be closed is on the `stack`.

    The parameters, and what is raised, are those of `train`. Every rank must make one.

    Attributes
    ----------
    shardset
        The cells, as they were when this call began.
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

    def __init__(
        self,
        root: str,
        folder: str | Path,
        config: TrainConfig,
        here: Ranks,
        stack: ExitStack,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.here, every = config, here, config.run
        if config.collate.tokens_per_batch is not None:
            check_packed(here.device)
        check_trackers(every.trackers)
        self.folder = run = RunFolder(folder)
        run.check(config)

        # Cells.
        rank_batch, self.micro_batch = config.rank_batch(here.world_size)
        self.shardset, self._storage_options = ShardSet(root, storage_options), storage_options
        self.plan = TaskPlan(config, self.shardset)
        self.loader = train_loader(root, config, here, rank_batch, storage_options)
        if len({*here.gather(self.loader.state_dict()["fingerprint"])}) > 1:
            raise StateError(
                "ranks have other cells than each other: some found an index bad that others could "
                "read",
                where=root,
                advice="start again; where it lasts, run scshards verify on the shard set",
            )
        self.steps_per_epoch = len(self.loader)
        self.total = config.total_steps(self.steps_per_epoch)
        warmup(config.optim, self.total)  # both refuse to be longer than the run
        decay(config.optim, self.total)

        # Model: made from the seed and the checkpoint to start from, the same on every rank.
        self.model = self.plan.fresh()
        notes = [*self.plan.notes, *self.plan.start(self.model)]
        choose_trained(self.model, config.optim, seed=every.seed)
        self.model.to(here.device)
        self.task = self.plan.task(self.model)
        prepare(self.model, here, every)
        self.held_out = HeldOut(
            root, config, self.plan, self.task, here, self.micro_batch, storage_options
        )
        notes += self.held_out.notes
        self.optimizer = make_optimizer(self.model, config.optim)
        self.average = WeightAverage(self.model, config.optim.ema) if config.optim.ema else None

        # Resume: every rank looks at RUN before the first one writes there; nobody else does meanwhile.
        here.first(lambda: stack.enter_context(run.lock()))
        changed = run.check(config)  # it may have been another's since
        held: list[Callable[[], None] | None] = []
        here.first(
            lambda: held.append(stack.enter_context(run.lock_place(config, storage_options)))
        )
        self.checkpoints = stack.enter_context(
            Checkpoints(
                run.place(config, storage_options),
                here,
                keep_last=every.keep_last,
                keep_every=every.keep_every,
                held=next(iter(held), None),
            )
        )
        here.first(self.checkpoints.clear)
        self.state = TrainState()
        if saved := self.checkpoints.latest():
            self.state = self.checkpoints.load(saved, self._tensors(shared=True))
            changed |= run.refuse_other(self.state.config, config, every.checkpoints or run.path)
            if not (run.path / "best_model.pt").exists():  # a new folder, or lost: choose anew
                self.state.best_step, self.state.best = None, {}
            if {"evaluate.sets", "evaluate.probe", "evaluate.probe_cells"} & changed.keys():
                best = self.state.best.items()
                self.state.best = {n: v for n, v in best if not HeldOut.may_mean_another(n)}
        elif every.branch is not None:
            self.state = branch_state(config, here, self._tensors(shared=True), storage_options)
            notes.append(f"goes on from {every.branch}, after step {self.state.step:,}")
        else:
            config.check_lanes(here.world_size)
        if self.state.loader:
            self.loader.load_state_dict(self.state.loader)
        self.state.config = with_unknown(config.tables(), self.state.config)
        here.barrier()
        if here.is_main:
            run.claim(self.state.config, root)
            notes += run.unknown(self.state.others)
        for name, (old, new) in changed.items():
            notes.append(f"changed since this run started: {name} was {old}, is {new}")
        self.notes, step = notes, self.state.step
        opened = open_trackers(
            every.trackers if here.is_main else (), run.path, config.tables(), step=step
        )
        trackers = stack.enter_context(opened)
        self.log = MetricsLog(run.metrics, step, enabled=here.is_main, trackers=trackers)

    def tensors(self) -> dict[str, Tensor]:
        """What this rank saves; buffers, which ranks may differ in, are the first one's."""
        return self._tensors(shared=self.here.is_main)

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

    def refused(self) -> str | None:
        """Why the same command can't go on with this run and what to do, None where it can.

        The set may have grown while this run was reading it as it was.
        """
        began = self.shardset
        try:
            now = ShardList([began.storage.url], "train", self._storage_options)
            told = another_set(now, began.manifest.fingerprint("train"), run=str(self.folder.path))
        except ScshardsError as e:
            return f"the shard set can't be opened now: {e.what}"
        return None if told is None else f"{told.what}\n  to do: {told.advice}"

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

    def _tensors(self, *, shared: bool) -> dict[str, Tensor]:
        mine = self.model.state_dict()
        if not shared:
            mine = {n: mine[n] for n, _ in self.model.named_parameters()}
        kinds = {"model": mine, "optimizer": moments(self.model, self.optimizer)}
        kinds |= {"average": self.average.tensors()} if self.average is not None else {}
        return {f"{kind}/{name}": t for kind, of in kinds.items() for name, t in of.items()}

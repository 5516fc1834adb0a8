"""The story of a run, top to bottom: `train`.

    shards -> loader -> [ step -> log -> evaluate -> save ] until the last step or a signal
                                                      `-- written while the next steps are taken

It runs alone or under torchrun, and always starts from the latest complete checkpoint in RUN: a run
that was stopped goes on as if it had not been. Called by `scshards train` and by users.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from scshards.base.errors import StateError
from scshards.base.progress import Progress
from scshards.model.scgpt import write_folder
from scshards.shards.shardset import ShardSet
from scshards.train.checkpoint import Checkpoints, TrainState
from scshards.train.config import TrainConfig, with_unknown
from scshards.train.data import endless, has_split, once_loader, train_loader
from scshards.train.ema import WeightAverage
from scshards.train.evaluate import validate
from scshards.train.flops import peak_flops
from scshards.train.folder import RunFolder
from scshards.train.integration_cells import IntegrationMetrics
from scshards.train.metrics import MetricsLog, Window
from scshards.train.optim import decay, make_optimizer, moments, warmup
from scshards.train.parallel import eager, prepare, unsharded
from scshards.train.preempt import StopSignals
from scshards.train.profiling import StepProfile
from scshards.train.setup import check_packed, ranks
from scshards.train.step import Share, Stepper, StepResult
from scshards.train.summary import Summary, opening, progress_note
from scshards.train.tasks_setup import plan_task
from scshards.train.trackers import check_trackers, open_trackers


def train(
    root: str,
    folder: str | Path,
    config: TrainConfig,
    *,
    storage_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> Summary:
    """Train on a shard set until the last step, or until a signal asks to stop.

    Parameters
    ----------
    root
        The shard set: a path or a URL.
    folder
        The run's local folder. The same call on the same folder resumes.
    config
        Data, model, optimizer and run settings.
    storage_options
        For the shard set's file system.
    shown
        Show progress on standard error (on the first rank).

    Raises
    ------
    ConfigError, OutputExistsError
        Before anything is written, when config, shard set and folder do not fit together.
    CheckpointError
        When the checkpoint to resume from is damaged.
    ScshardsError
        When the loss or the gradient stays not finite, or memory is full.
    """
    every = config.run
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        here = stack.enter_context(
            ranks(every.device, every.precision, deterministic=every.deterministic)
        )
        shown = shown and here.is_main
        if config.collate.tokens_per_batch is not None:
            check_packed(here.device)
        check_trackers(every.trackers)
        run = RunFolder(folder)
        changed = run.check(config)

        # Cells: one batch of the loader is this rank's share of one step, on any number of ranks.
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
        vocab = plan.vocab
        valid = measure = None
        if has_split(loader.shardset, "valid"):
            valid = once_loader(
                root, config, here, "valid", micro_batch, storage_options=storage_options
            )
            if config.task.metric_cells and config.task.name == "integrate":
                measure = IntegrationMetrics(
                    root, config, here, "valid", micro_batch, storage_options
                )

        # Model: made from the seed and the checkpoint to start from, the same on every rank.
        model = plan.fresh()
        notes = plan.notes + plan.start(model)
        model.to(here.device)
        task = plan.task(model)
        prepare(model, here, every)
        optimizer = make_optimizer(model, config.optim)
        average = WeightAverage(model, config.optim.ema) if config.optim.ema else None

        def tensors(shared: bool = True) -> dict[str, Tensor]:
            """All that a checkpoint holds; buffers, which ranks may differ in, are the first rank's."""
            mine = model.state_dict()
            if not shared and not here.is_main:
                mine = {n: mine[n] for n, _ in model.named_parameters()}
            kinds = {"model": mine, "optimizer": moments(model, optimizer)}
            kinds |= {"average": average.tensors()} if average is not None else {}
            return {f"{kind}/{name}": t for kind, of in kinds.items() for name, t in of.items()}

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
            state = checkpoints.load(saved, tensors())
            changed |= run.refuse_other(state.config, config, every.checkpoints or run.path)
            loader.load_state_dict(state.loader)
            if not (run.path / "best_model.pt").exists():  # a new folder, or lost: choose anew
                state.best_step = state.best_loss = None
        else:
            config.check_lanes(here.world_size)
        state.config = with_unknown(config.tables(), state.config)
        here.barrier()
        if here.is_main:
            run.claim(state.config, root)
            notes = (*notes, *run.unknown(state.others))
        names = every.trackers if here.is_main else ()
        trackers = stack.enter_context(
            open_trackers(names, run.path, config.tables(), step=state.step)
        )
        log = MetricsLog(run.metrics, state.step, enabled=here.is_main, trackers=trackers)
        if shown:
            for note in notes:
                print(note, file=sys.stderr)
            for name, (old, new) in changed.items():
                print(
                    f"changed since this run started: {name} was {old}, is {new}", file=sys.stderr
                )
        about: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "ranks": here.world_size,
            "device": str(here.device),
            "precision": "bf16" if here.bf16 else "fp32",
        }
        if shown and state.step < total:
            print(
                opening(
                    **about,
                    cells={"train": loader.cells, "valid": 0 if valid is None else valid.cells},
                    max_length=config.collate.max_length,
                    batch_size=every.batch_size,
                    steps=(state.step, total),
                    steps_per_epoch=steps_per_epoch,
                ),
                file=sys.stderr,
            )
        start, spent, began = state.step, state.seconds, time.perf_counter()
        stepper = Stepper(
            task,
            optimizer,
            config,
            here,
            micro_batch=micro_batch,
            total_steps=total,
            steps_per_epoch=steps_per_epoch,
            average=average,
            skipped_in_a_row=state.skipped_in_a_row,
        )
        peak = peak_flops(here.device, bf16=here.bf16, told=every.peak_tflops)
        window = Window(here, task.terms, model.config, peak)
        batches = stack.enter_context(closing(endless(loader)))
        terms: dict[str, float] = {}
        note, valid_note, stopped = "", "", False
        progress = stack.enter_context(
            Progress(
                "train" if start == 0 else f"train, on from step {start}",
                max(total - start, 0),
                "steps",
                shown=shown and start < total,
            )
        )

        def weights_to_judge() -> AbstractContextManager[None]:
            return average.swapped() if average and config.optim.ema_best else nullcontext()

        def publish() -> None:
            whole = unsharded(model)
            if here.is_main:
                write_folder(str(run.path), whole, vocab.to_dict(), plan.args(state.step))
                plan.write_names(run.path)

        def save() -> None:
            state.seconds = spent + time.perf_counter() - began
            checkpoints.save(state, tensors(shared=False))

        def assess() -> bool:
            """Score the valid split, publish the best model; False when asked to stop meanwhile."""
            nonlocal valid_note
            is_due = state.step % every.eval_every == 0 or state.step == total
            if valid is None or not is_due or state.evaluated_step == state.step:
                return True
            with weights_to_judge(), eager():
                score = validate(task, valid, here, should_stop=lambda: bool(signals))
                if score is None:
                    return False
                is_best = score.is_better_than(state.best_loss)
                if is_best:
                    state.best_step, state.best_loss = state.step, score.loss
                    publish()
                # Scores of what is not finite are none, and scikit-learn says so by an error.
                figures = measure(task) if measure is not None and not score.not_finite else {}
            state.evaluated_step = state.step
            epoch = state.step / steps_per_epoch
            log.write(
                "valid", state.step, epoch=epoch, **score.tables(), **figures, is_best=is_best
            )
            if shown and score.not_finite:
                print(
                    f"step {state.step}: on the valid split the model computes NaN or infinity, so it "
                    f"is not the best; cells: {', '.join(score.not_finite)}",
                    file=sys.stderr,
                )
            valid_note = f", valid {score.loss:.4g}"
            return True

        def ahead() -> tuple[Share | None, float]:
            """The next step's batch, on its way, if there is a next step; seconds waited for it."""
            state.loader = loader.state_dict()  # before it: that step is not taken yet
            if state.step == total:
                return None, 0.0
            t0 = time.perf_counter()
            batch = next(batches)
            return stepper.prepare(batch, stop=bool(signals)), time.perf_counter() - t0

        def take_in(result: StepResult | None) -> None:
            """Count and tell what a step did, once it is settled."""
            if result is None:
                return
            window.add(result)
            if result.skip is not None:
                at = result.step + 1
                state.skipped += 1
                log.write("skipped", at, why=result.skip.why, cells=result.skip.cells)
                if shown:
                    print(f"step {at} skipped: {result.skip.why}", file=sys.stderr)

        profile = stack.enter_context(StepProfile(every.profile, run.path / "profile", here))
        share, waited = ahead()
        if start:  # a run that was stopped at an evaluation makes up for it
            stopped = not assess()
            save()
        t0 = time.perf_counter() - waited
        while share is not None and not stopped:
            profile.before(state.step + 1)
            take_in(stepper.step(share, state.step))
            state.step += 1
            share, next_waited = ahead()  # while the device computes
            stopped = share is not None and share.stop  # of all ranks: a signal to one is enough
            is_last = stopped or state.step == total
            is_logged = is_last or state.step % every.log_every == 0
            if is_logged or not (state.step % every.eval_every and state.step % every.save_every):
                take_in(stepper.settle())
                state.skipped_in_a_row = stepper.skipped_in_a_row
            window.took(time.perf_counter() - t0, waited=waited)
            waited = next_waited
            profile.after(state.step)
            if is_logged:
                line = window.close()
                log.write("train", state.step, epoch=state.step / steps_per_epoch, **line)
                terms = {name: line[name] for name in task.terms if line[name] is not None}
                note = progress_note(state.step, task.criterion, terms, line) + valid_note
            progress.add(1, note)
            stopped = stopped or not assess()
            if state.step % every.save_every == 0 or stopped or state.step == total:
                save()
            t0 = time.perf_counter()

        if state.best_step is None:  # nothing to choose by: the latest model is the best there is
            with weights_to_judge():
                publish()
        checkpoints.wait()
        if stopped and here.is_main:
            run.write(run.stopped.name, {"signal": signals.caught, "step": state.step})
        here.barrier()  # nobody leaves before everything is written
        return Summary(
            run=str(run.path),
            start=start,
            step=state.step,
            total_steps=total,
            epochs=state.step / steps_per_epoch,
            cells=state.step * config.run.batch_size,
            **about,
            seconds=state.seconds,
            criterion=task.criterion,
            train_loss=terms.get(task.criterion),
            terms=terms,
            rates=window.whole(),
            best_step=state.best_step,
            best_loss=state.best_loss,
            stopped_by=(signals.caught or "a signal to another rank") if stopped else None,
        )

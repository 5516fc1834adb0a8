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
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from scshards.base.progress import Progress
from scshards.ranks.ranks import ranks
from scshards.training.config import TrainConfig
from scshards.training.data import endless
from scshards.training.log.flops import peak_flops
from scshards.training.log.metrics import Window
from scshards.training.log.profiling import StepProfile
from scshards.training.log.summary import Summary, found_note, opening, progress_note
from scshards.training.parallel import eager
from scshards.training.preempt import StopSignals
from scshards.training.prepare import Run
from scshards.training.step import Share, Stepper, StepResult


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
        run = Run(root, folder, config, here, stack, storage_options)
        state, task, log, total = run.state, run.task, run.log, run.total
        held_out = run.held_out
        shown = shown and here.is_main
        start, spent, began = state.step, state.seconds, time.perf_counter()
        if shown:
            told = [*run.notes, *([opening(run)] if start < total else [])]
            print(*told, sep="\n", file=sys.stderr, end="\n" if told else "")
        stepper = Stepper(
            task,
            run.optimizer,
            config,
            here,
            micro_batch=run.micro_batch,
            total_steps=total,
            steps_per_epoch=run.steps_per_epoch,
            average=run.average,
            skipped_in_a_row=state.skipped_in_a_row,
        )
        peak = peak_flops(here.device, bf16=here.bf16, told=every.peak_tflops)
        if config.optim.freeze or config.optim.lora_rank:
            peak = None  # what a backward pass leaves out, nobody has counted
        window = Window(here, task.terms, run.model.config, peak)
        batches = stack.enter_context(closing(endless(run.loader)))
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

        def save() -> None:
            state.seconds = spent + time.perf_counter() - began
            run.checkpoints.save(state, run.tensors())

        def assess() -> bool:
            """Score all that is held out, publish the best model; False when asked to stop meanwhile."""
            nonlocal valid_note
            is_due = state.step % every.eval_every == 0 or state.step == total
            if not held_out.cells or not is_due or state.evaluated_step == state.step:
                return True
            with run.judged(), eager():
                found = held_out(lambda: bool(signals))
                if found is None:
                    return False
                is_best = found.is_better_than(state.best, config.evaluate.best_by, task.terms)
                if is_best:
                    state.best_step, state.best = state.step, found.figures
                    run.publish()
            state.evaluated_step = state.step
            epoch = state.step / run.steps_per_epoch
            log.write("valid", state.step, epoch=epoch, **found.line, is_best=is_best)
            if shown and found.not_finite:
                print(
                    f"step {state.step}: on held-out cells the model computes NaN or infinity, so it "
                    f"is not the best; cells: {', '.join(found.not_finite)}",
                    file=sys.stderr,
                )
            valid_note = found_note(found.figures)
            return True

        def ahead() -> tuple[Share | None, float]:
            """The next step's batch, on its way, if there is a next step; seconds waited for it."""
            state.loader = run.loader.state_dict()  # before it: that step is not taken yet
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

        profile = stack.enter_context(StepProfile(every.profile, run.folder.path / "profile", here))
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
                log.write("train", state.step, epoch=state.step / run.steps_per_epoch, **line)
                terms = {name: line[name] for name in task.terms if line[name] is not None}
                note = progress_note(state.step, task.criterion, terms, line, valid_note)
            progress.add(1, note)
            stopped = stopped or not assess()
            if state.step % every.save_every == 0 or stopped or state.step == total:
                save()
            t0 = time.perf_counter()

        if state.best_step is None:  # nothing to choose by: the latest model is the best there is
            with run.judged():
                run.publish()
        run.checkpoints.wait()
        if stopped and here.is_main:
            stop = {"signal": signals.caught, "step": state.step}
            run.folder.write(run.folder.stopped.name, stop)
        return Summary(
            run=str(run.folder.path),
            start=start,
            step=state.step,
            total_steps=total,
            epochs=state.step / run.steps_per_epoch,
            cells=state.step * config.run.batch_size,
            **run.about(),
            seconds=state.seconds,
            criterion=task.criterion,
            train_loss=terms.get(task.criterion),
            terms=terms,
            rates=window.whole(),
            best_step=state.best_step,
            best_by=config.evaluate.best_by,
            best=state.best,
            stopped_by=(signals.caught or "a signal to another rank") if stopped else None,
            refused=run.refused() if stopped and here.is_main else None,
        )

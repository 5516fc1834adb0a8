"""A branch of a run: a run of its own that goes on from a checkpoint of another, by another schedule.

    RUN@STEP --branch_config--> the other's config with what is set anew
             --branch_state---> its weights, moments, average and place in the stream

The other run is only read. Called by `scshards train --from` and training.prepare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from scshards.base.errors import ConfigError
from scshards.ranks.ranks import Ranks
from scshards.training.config import MAY_CHANGE, TrainConfig, differences
from scshards.training.save.checkpoint import Checkpoints, TrainState, complete, step_of
from scshards.training.save.folder import RunFolder

_FIXED = {
    *("run.seed", "optim.name", "optim.ema", "optim.freeze"),
    *("optim.lora_rank", "optim.lora_alpha", "optim.lora_feed_forward"),
    *("task.name", "task.objective", "task.start"),
    *("task.label", "task.domain", "task.domain_norm", "task.domain_labels"),
}
"""Beside [model] and [data], what a branch has of its run: its tensors and its cells."""


def branch_config(
    branch: str, file: str | Path | None = None, settings: Iterable[str] = ()
) -> TrainConfig:
    """The config of the run that is branched, with those of a file and `a.b=value` settings on top.

    Its checkpoints go to the new run's own folder, and its length is the other's unless it is set.

    Raises
    ------
    ConfigError
        When there is no such run or step, or a setting is changed that its tensors and cells hang on.
    """
    run, _ = _place(branch)
    old = run.config().tables()
    old["run"] |= {"checkpoints": None, "branch": None}
    new = TrainConfig.read(file, [*settings, f"run.branch={branch}"], base=old)
    _refuse_other(old, new, branch)
    return new


def branch_state(
    config: TrainConfig,
    here: Ranks,
    tensors: Mapping[str, Tensor],
    storage_options: Mapping[str, Any] | None = None,
) -> TrainState:
    """Where a new branch begins, its tensors copied into `tensors`; every rank must call it.

    Best score and counters are the branch's own: it has none yet.
    """
    branch = config.run.branch
    assert branch is not None
    run, step = _place(branch)
    root = run.place(run.config(), storage_options)
    names = here.gather(complete(root) if here.is_main else [])[0]
    steps = [step_of(name) for name in names]
    if not steps or (step is not None and step not in steps):
        raise ConfigError(
            f"the run has no checkpoint of step {step}" if steps else "the run has no checkpoint",
            where=f"run.branch: {branch}",
            advice=f"there are those of steps {', '.join(map(str, steps))}; run.keep_every keeps more"
            if steps
            else "give a run that has saved one",
        )
    name = names[-1 if step is None else steps.index(step)]
    state = Checkpoints(root, here, keep_last=1).load(name, tensors)
    _refuse_other(state.config, config, branch)
    return TrainState(step=state.step, loader=state.loader, config=state.config)


def _place(branch: str) -> tuple[RunFolder, int | None]:
    """The run, and the step if one is named."""
    folder, at, step = branch.rpartition("@")
    if at and step.isdecimal():
        return RunFolder(folder), int(step)
    return RunFolder(branch), None


def _refuse_other(old: Mapping[str, object], new: TrainConfig, branch: str) -> None:
    changed = differences(dict(old), new.tables())
    fixed = [
        f"{key} is {was!r} there, {now!r} now"
        for key, (was, now) in changed.items()
        if key not in MAY_CHANGE and (key.startswith(("model.", "data.")) or key in _FIXED)
    ]
    if fixed:
        raise ConfigError(
            f"a branch has the model, the task and the data of its run: {', '.join(fixed)}",
            where=branch,
            advice="leave these settings out; optim, run.steps and run.batch_size may be others",
        )

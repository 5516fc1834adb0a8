"""Metrics to TensorBoard and Weights & Biases, for those who ask: `run.trackers`.

They get every number of every line of metrics.jsonl, which is written whether there are trackers or
not. Neither library is imported unless it was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scshards.base.errors import ConfigError

Tracker = Callable[[str, int, Mapping[str, float]], None]
"""Takes the numbers of a line: its kind, "train" or "valid", its step, and they."""


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError when the library of one of the trackers is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no library
            raise ConfigError(
                f"{name} is not installed",
                where="run.trackers",
                advice=f"pip install 'scshards[{name}]'",
            )


@contextlib.contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], *, step: int
) -> Iterator[list[Tracker]]:
    """The trackers of a run, for the rank that writes; closed at the end.

    Parameters
    ----------
    names
        "tensorboard" and "wandb", each at most once.
    folder
        The run's. TensorBoard's events lie in its `tensorboard/`, what W&B keeps in its `wandb/`.
    config
        Tables of settings, for W&B's page of the run.
    step
        The step that the run goes on from: what was written of later ones is superseded.

    Raises
    ------
    ConfigError
        When W&B can't start.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(makers[name](folder, config, step)) for name in names]


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers, True and False as 1 and 0."""
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float)}


@contextlib.contextmanager
def _tensorboard(folder: Path, config: Mapping[str, Any], step: int) -> Iterator[Tracker]:
    from torch.utils.tensorboard import SummaryWriter

    # Readers drop what an earlier start wrote about steps that are now taken again.
    purge = step + 1 if step else None
    with SummaryWriter(str(folder / "tensorboard"), purge_step=purge) as writer:

        def write(kind: str, step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(f"{kind}/{name}", value, step)
            writer.flush()

        yield write


@contextlib.contextmanager
def _wandb(folder: Path, config: Mapping[str, Any], step: int) -> Iterator[Tracker]:
    """A run's page has the folder's name, and is gone on with when the run is resumed.

    Project, entity, mode (`WANDB_MODE=offline`) and key are W&B's own variables.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    path = str(folder.resolve())
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "scshards"),
            name=folder.name,
            id=hashlib.sha256(path.encode()).hexdigest()[:12],
            resume="allow",
            dir=path,
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as e:
        raise ConfigError(
            f"Weights & Biases can't start: {e}",
            where="run.trackers",
            advice="`wandb login`, or WANDB_MODE=offline to sync the run later",
        ) from None
    # Their own counter of steps only goes up; a run that was resumed may go back.
    for kind in ("train", "valid"):
        run.define_metric(f"{kind}/*", step_metric="step")
    failed = True
    try:
        yield lambda kind, step, numbers: run.log(
            {"step": step} | {f"{kind}/{k}": v for k, v in numbers.items()}
        )
        failed = False
    finally:
        run.finish(exit_code=int(failed))

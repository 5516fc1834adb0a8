"""Checkpoints: RUN/checkpoints/step-00000020/ with model.pt, optimizer.pt and state.json.

One rank writes into a hidden folder and renames it, so a checkpoint is complete or invisible; what
a killed run left behind is removed by the next save. All randomness is keyed (masks and samples by
cell, dropout by step), so these three files are the whole state, for any number of ranks. Called by
the loop.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scshards.base.errors import CheckpointError, StorageError
from scshards.base.storage import Storage

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class TrainState:
    """Where a run is: everything but the tensors.

    Attributes
    ----------
    step
        Optimizer steps taken.
    best_step, best_loss
        The best validation so far, None before the first.
    evaluated_step
        The last step that was evaluated.
    seconds
        Time spent training, over all its starts.
    loader
        The training loader's state.
    """

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluated_step: int = 0
    seconds: float = 0.0
    loader: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep_last: int,
) -> Path:
    """The complete checkpoint of `state.step`, under `folder`; older ones but `keep_last` go."""
    target = folder / f"step-{state.step:08d}"
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(state)}, indent=2)
    if target.exists():  # the tensors of a step are what they are; only what is told of it may grow
        Storage(target).write("state.json", text.encode())
        return target
    temporary = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.partial"):
            shutil.rmtree(left)
        temporary.mkdir()
        torch.save(model.state_dict(), temporary / "model.pt")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        (temporary / "state.json").write_text(text)
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.rename(target)
        _sync(folder)
        for old in complete(folder)[:-keep_last]:
            shutil.rmtree(old)
    except OSError as e:
        raise StorageError(
            f"the checkpoint can't be written: {e.strerror}",
            where=target,
            advice="free some space; the same command goes on from the checkpoint before",
        ) from None
    return target


def complete(folder: Path) -> list[Path]:
    """All complete checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """The state of a checkpoint, its tensors put into `model` and `optimizer`.

    Raises
    ------
    CheckpointError
        For a file that is damaged, of another format, or of another model.
    """
    try:
        about = json.loads((path / "state.json").read_text())
        weights = torch.load(path / "model.pt", map_location="cpu", weights_only=True)
        moments = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as e:
        # torch.load raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file.
        raise CheckpointError(
            f"the checkpoint can't be read: {type(e).__name__}",
            where=path,
            advice="remove this folder; the same command goes on from the checkpoint before",
        ) from e
    if about.pop("format", None) != FORMAT:
        raise CheckpointError(
            "the checkpoint has another format",
            where=path,
            advice="resume it with the version of scshards that wrote it (RUN/config.json)",
        )
    try:
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        return TrainState(**about)
    except (RuntimeError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(
            f"the checkpoint is of another model: {str(e).splitlines()[0]}", where=path
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

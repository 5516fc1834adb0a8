"""Small batches, models and configs for the tests of training and the processes they start."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from scshards.base.storage import Storage
from scshards.cells.batch import Batch
from scshards.model.config import ModelConfig
from scshards.model.transformer import CellModel
from scshards.training.config import TrainConfig
from scshards.training.micro import AnyBatch
from scshards.training.save.store import TensorReader
from scshards.training.step import Stepper, StepResult

N_GENES = 40
PAD, CLS = N_GENES, N_GENES + 1

SMALL = (
    "data.max_length=40",
    "data.shuffle_buffer=64",
    "data.lanes=4",
    "model.d_model=16",
    "model.n_heads=2",
    "model.d_hid=16",
    "model.n_layers=2",
    "optim.lr=3e-3",
    "run.batch_size=16",
    "run.steps=20",
    "run.eval_every=10",
    "run.save_every=10",
    "run.log_every=5",
    "run.device=cpu",
)
"""Settings of a model that trains in a second."""


def small_config(*settings: str) -> TrainConfig:
    return TrainConfig.read(None, [*SMALL, *settings])


def small_model(dropout: float = 0.0, **options: Any) -> CellModel:
    config = ModelConfig(
        n_tokens=N_GENES + 2,
        pad_id=PAD,
        d_model=16,
        n_heads=2,
        d_hid=16,
        n_layers=2,
        dropout=dropout,
        **options,
    )
    return CellModel(config, seed=1)


def small_batch(n: int, seed: int = 0, weight: list[float] | None = None) -> Batch:
    """`n` cells of very different lengths and numbers of masked values."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, N_GENES, (n,), generator=g)
    width = 1 + int(lengths.max())
    genes = torch.full((n, width), PAD, dtype=torch.int32)
    targets = torch.full((n, width), -2.0)
    is_masked = torch.zeros(n, width, dtype=torch.bool)
    genes[:, 0] = CLS
    for b, length in enumerate(lengths.tolist()):
        ids = torch.randperm(N_GENES, generator=g)[:length].sort().values
        genes[b, 1 : length + 1] = ids.int()
        targets[b, 1 : length + 1] = torch.randint(1, 51, (length,), generator=g).float()
        is_masked[b, 1 : 1 + length] = torch.rand(length, generator=g) < (b + 1) / (n + 1)
    return Batch(
        genes=genes,
        values=torch.where(is_masked, -1.0, targets),
        targets=targets,
        is_masked=is_masked,
        is_pad=genes == PAD,
        key=torch.arange(n) + (7 << 40),
        labels={"batch": torch.arange(n)},
        weight=torch.tensor(weight or [1.0] * n),
    )


def take(stepper: Stepper, batch: AnyBatch, step: int) -> StepResult:
    """One step, and what it did, at once."""
    assert stepper.step(stepper.prepare(batch), step) is None
    result = stepper.settle()
    assert result is not None
    return result


def read_tensors(folder: str | Path, kind: str = "model") -> dict[str, Tensor]:
    """The tensors of a checkpoint's folder on the CPU: of the "model", "optimizer" or "average"."""
    reader = TensorReader(Storage(folder))
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and name.startswith(f"{kind}/")
    }
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as e:
        raise next(cause for cause, _ in e.failures.values()) from e
    return {name.removeprefix(f"{kind}/"): t for name, t in tensors.items()}

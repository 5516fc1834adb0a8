"""What the model's tests share: one thread, the golden folder, small models and batches."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from model_support import as_batch

from scshards.cells.batch import Batch
from scshards.model.config import ModelConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden() -> Path:
    """tests/golden: what scGPT's own code computes (README there)."""
    return Path(__file__).parent.parent / "golden"


@pytest.fixture
def copy(golden: Path, tmp_path: Path) -> Path:
    """A checkpoint folder to spoil."""
    return Path(shutil.copytree(golden / "mask_in_proj", tmp_path / "checkpoint"))


@pytest.fixture
def small() -> ModelConfig:
    return ModelConfig(n_tokens=40, pad_id=37, d_model=16, n_heads=4, d_hid=24, n_layers=2)


@pytest.fixture
def make_batch(small: ModelConfig) -> Callable[..., Batch]:
    """Random, unmasked cells of the given lengths, padded to the longest."""

    def make(*lengths: int, to: int | None = None, seed: int = 0) -> Batch:
        g = torch.Generator().manual_seed(seed)
        shape = (len(lengths), to or max(lengths))
        genes = torch.randint(0, small.pad_id, shape, generator=g, dtype=torch.int32)
        values = torch.randint(-1, 51, shape, generator=g).float()
        is_pad = torch.arange(shape[1])[None, :] >= torch.tensor(lengths)[:, None]
        genes[is_pad] = small.pad_id
        values[is_pad] = small.pad_value
        return as_batch(genes, values, is_pad)

    return make

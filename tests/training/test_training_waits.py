"""A step in progress waits for nothing of the device: it reads no value, and no copy stops the host.

The device is torch's "meta", which has shapes and no values: whatever would read one can't. Copies to and
from it are watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from train_support import small_batch, small_config, small_model

from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.transformer import CellModel
from scshards.ranks.ranks import Ranks
from scshards.tasks.base import Task
from scshards.tasks.finetune import AnnotateTask, IntegrateTask
from scshards.tasks.pretrain import GenerateTask, MaskTask
from scshards.training.ema import WeightAverage
from scshards.training.micro import AnyBatch
from scshards.training.optim import make_optimizer
from scshards.training.step import Stepper

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Notes the copies between host and device, and gives zeros for what can't come from "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.reports = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if name == "_to_copy" and kwargs.get("device") is not None:
            there, here = torch.device(kwargs["device"]), given[0].device
            if there != here:
                if not kwargs.get("non_blocking"):
                    self.waiting.append(f"a copy from {here} to {there}")
                if there.type == "cpu":
                    self.reports += 1
                    return torch.zeros(given[0].shape, dtype=given[0].dtype)
        if name == "copy_" and given[0].device != given[1].device and not (args[2:] and args[2]):
            self.waiting.append(f"a copy from {given[1].device} to {given[0].device}")
        return op(*args, **kwargs)


class Made(TorchFunctionMode):
    """Notes where values of the host are made into a tensor there, which no operator shows."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = op(*args, **(kwargs or {}))
        if op in (torch.tensor, torch.as_tensor) and made.device == META:
            self._copies.waiting.append(f"{op.__name__} of values of the host")
        return made


@contextlib.contextmanager
def watched() -> Iterator[Copies]:
    with Copies() as copies, Made(copies):
        yield copies


def labelled() -> Batch:
    batch = small_batch(4)
    batch.labels["kind"] = torch.tensor([0, 1, -1, 1])
    return batch


def generated() -> GenerateBatch:
    batch = small_batch(4)
    return GenerateBatch(
        known_genes=batch.genes,
        known_values=batch.targets,
        known_is_pad=batch.is_pad,
        unknown_genes=batch.genes,
        unknown_targets=batch.targets,
        unknown_is_pad=batch.is_pad,
        ratio=0.5,
        key=batch.key,
        labels=batch.labels,
        weight=batch.weight,
    )


def packed() -> PackedBatch:
    batch = small_batch(4)
    real = ~batch.is_pad
    lengths = real.sum(1)
    fields = {n: getattr(batch, n)[real] for n in ("genes", "values", "targets", "is_masked")}
    return PackedBatch(
        **fields,
        is_pad=torch.zeros(int(real.sum()), dtype=torch.bool),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        max_seqlen=int(lengths.max()),
        key=batch.key,
        labels=batch.labels,
        weight=batch.weight,
    )


def integrate(model: CellModel) -> Task:
    return IntegrateTask(model, "batch", codes=[1, 0, 1, 0])


CASES: dict[str, tuple[Callable[[CellModel], Task], dict[str, Any], Callable[[], AnyBatch], int]]
CASES = {
    "mask": (MaskTask, {"explicit_zero_prob": True}, labelled, 2),
    "generate": (lambda m: GenerateTask(m, cell_prompt_after=0), {"generate": True}, generated, 2),
    "packed": (MaskTask, {}, packed, 4),
    "integrate": (integrate, {"n_domains": 2, "adversary": True}, labelled, 2),
    "domain norm": (integrate, {"n_domains": 2, "domain_norm": True}, labelled, 2),
    "annotate": (
        lambda m: AnnotateTask(m, "kind", codes=[1, 0]), {"n_classes": 2}, labelled, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options, batch, micro = CASES[name]
    # "meta" has no autocast, and these steps are in float32.
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    model = small_model(dropout=0.1, **options).to(META)
    task = make(model)
    config = small_config()
    stepper = Stepper(
        task,
        make_optimizer(model, config.optim),
        config,
        Ranks(0, 1, META),
        micro_batch=micro,
        total_steps=9,
        average=WeightAverage(model, 0.9),
    )
    shares = [stepper.prepare(batch()) for _ in range(3)]
    with watched() as first:
        stepper.step(shares[0], 0)  # what is brought there once
    assert first.reports == 1
    with watched() as copies:
        assert stepper.step(shares[1], 1) is not None, "the one before"
        following = stepper.prepare(batch())
        assert stepper.step(following, 2) is not None
    assert copies.waiting == []
    assert copies.reports == 2, "a step says what it did, once"
    assert stepper.settle() is not None
    assert stepper.settle() is None


def test_what_waits_is_seen() -> None:
    there = torch.ones(3, device=META)
    with watched() as copies:
        there.cpu()
        there.to("cpu", non_blocking=True)
        torch.ones(3).to(META)
        torch.tensor([1.0], device=META)
        there.copy_(torch.ones(3))
        there.copy_(torch.ones(3), non_blocking=True)
    assert len(copies.waiting) == 4 and copies.reports == 2
    for read in (there.sum().item, there.tolist, lambda: there[there > 0], there.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()

"""A whole step of each task on fake CUDA tensors, in bf16; started by test_training_fake_cuda.py.

Fake tensors have a device, a dtype and a shape, and no values. Prints what each step did, as JSON.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
from typing import Any
from unittest.mock import patch

import torch
from test_training_waits import CASES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_support import small_config, small_model

from scshards.ranks.ranks import Ranks
from scshards.training.ema import WeightAverage
from scshards.training.optim import make_optimizer
from scshards.training.step import Stepper
from scshards.training.transfer import Report, Sender

DEVICE = torch.device("cuda", 0)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_varlen_attn")


class Stream:
    """Stands for a CUDA stream and for an event on one."""

    def __init__(self, *_: Any) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self) -> Stream:
        return self


class Watch(TorchDispatchMode):
    """Notes operators whose tensors are on two devices, and the dtypes of products, norms and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self.dtypes: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.on_device = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in given}
        if len(devices) > 1 and name not in ("_to_copy", "copy_"):
            self.mixed.append(f"{op}: {', '.join(f'{t.device} {[*t.shape]}' for t in given)}")
        self.on_device += devices == {"cuda"}
        kind = "product" if name.startswith(PRODUCTS) else name
        floats = {str(t.dtype).removeprefix("torch.") for t in given if t.is_floating_point()}
        if kind in (
            "product",
            "native_layer_norm",
            "_softmax",
            "_log_softmax",
            "log",
            "exp",
            "pow",
        ):
            self.dtypes[kind]["+".join(sorted(floats))] += 1
        return op(*args, **kwargs)


def bring(model: torch.nn.Module) -> None:
    """As `model.to(DEVICE)`, which can't make a real parameter a fake one."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(
                    p.detach().to(DEVICE), p.requires_grad
                )
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = b.to(DEVICE)


def step(name: str) -> dict[str, Any]:
    make, options, batch, micro = CASES[name]
    mode, config = FakeTensorMode(allow_non_fake_inputs=True), small_config()
    send = Sender.send

    def sent(self: Sender, given: Any) -> Any:
        with mode:
            return send(self, given)

    def read(self: Report) -> Tensor:
        with unset_fake_temporarily():
            return torch.zeros(self._values.shape, dtype=self._values.dtype)

    with patch.object(Sender, "send", sent), patch.object(Report, "read", read):
        model = small_model(dropout=0.1, **options)
        with mode:
            bring(model)
        task = make(model)
        with mode:
            optimizer, average = make_optimizer(model, config.optim), WeightAverage(model, 0.9)
        here = Ranks(0, 1, DEVICE, bf16=True)
        stepper = Stepper(
            task, optimizer, config, here, micro_batch=micro, total_steps=9, average=average
        )
        shares = [stepper.prepare(batch()) for _ in range(2)]
        assert all(share.counts for share in shares)  # read while numbers are numbers
        grads: dict[str, str] = {}
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for n, p in trained.items():
            p.register_hook(lambda g, n=n: grads.update({n: f"{g.device} {g.dtype}"}))
        with mode, Watch() as watch:
            for i, share in enumerate(shares):
                stepper.step(share, i)
            result = stepper.settle()
    state = [t for of in optimizer.state.values() for t in of.values()]
    kept = {
        f"{t.device} {t.dtype}" for t in (*model.parameters(), *state, *average.tensors().values())
    }
    return {
        "mixed": watch.mixed,
        "dtypes": watch.dtypes,
        "operators": watch.on_device,
        "grads": sorted({*grads.values()}),
        "without": sorted(trained.keys() - grads),
        "kept": sorted(kept),
        "step": None if result is None else result.step,
    }


def seen() -> dict[str, Any]:
    """What is noted of a number, an index and a tensor on the CPU beside tensors on the device."""
    with FakeTensorMode(), Watch() as watch:
        there, here = torch.ones(3, 2, device=DEVICE), torch.ones(3, 2)
        _ = there * here[0, 0], there[torch.tensor([0, 1])], there + here.to(DEVICE)
        try:
            _ = there + here
        except RuntimeError as e:
            return {"mixed": watch.mixed, "refused": str(e)}
    return {}


def main() -> None:
    with contextlib.ExitStack() as stack:
        for there, attribute, instead in (
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "stream", lambda s: contextlib.nullcontext()),
            (torch.cuda, "current_stream", Stream),
            (Tensor, "record_stream", lambda self, s: None),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ):
            stack.enter_context(patch.object(there, attribute, instead))
        json.dump({name: step(name) for name in CASES} | {"seen": seen()}, sys.stdout)


if __name__ == "__main__":
    main()

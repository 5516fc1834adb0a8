"""No step adds up numbers of half precision one by one, as the gradient of a gather does.

Rows that are taken more than once have their gradients added in their own dtype on CUDA, and on the
CPU too: of a thousand bfloat16 numbers a third of the sum is lost. All operators of a step are
watched for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_worker import tasks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_support import small_batch, small_model

from scshards.cells.batch import Batch, PackedBatch
from scshards.tasks.base import Task
from scshards.tasks.finetune import AnnotateTask, IntegrateTask
from scshards.tasks.pretrain import MaskTask

HALF = (torch.bfloat16, torch.float16)


class HalfSums(TorchDispatchMode):
    """The operators that added to one place of a half tensor more than once, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.halves = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        self.halves += any(isinstance(a, Tensor) and a.dtype in HALF for a in args)
        if isinstance(args[0] if args else None, Tensor) and args[0].dtype in HALF:
            places = self._places(name, *args, **(kwargs or {}))
            if places is not None and len(places.unique(dim=0)) < len(places):
                self.found.append(name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _places(name: str, *args: Any, **kwargs: Any) -> Tensor | None:
        """Where an operator adds something, one row each; None for one that adds nowhere by index."""
        if name in ("index_add", "index_reduce"):
            return args[2][:, None]
        if name in ("scatter_add", "scatter_reduce"):
            _, dim, index = args[:3]
            places = torch.ones_like(index).nonzero()
            places[:, dim] = index.flatten()
            return places
        if name in ("index_put", "_index_put_impl") and (
            kwargs.get("accumulate") or args[3:4] == (True,)
        ):
            indices = torch.broadcast_tensors(*(i for i in args[1] if i is not None))
            return torch.stack([i.flatten() for i in indices], 1)
        if name == "embedding_dense_backward":
            return args[1][args[1] != args[3]].flatten()[:, None]
        return None


def packed(whole: Batch) -> PackedBatch:
    """The cells one behind another, with some room behind them."""
    real = ~whole.is_pad
    n, ends = int(real.sum()) + 9, real.sum(1).cumsum(0)

    def lay(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x[real], torch.full((9,), fill, dtype=x.dtype)])

    return PackedBatch(
        genes=lay(whole.genes, int(whole.genes.max())),
        values=lay(whole.values, -2.0),
        targets=lay(whole.targets, -2.0),
        is_masked=lay(whole.is_masked, False),
        is_pad=torch.arange(n) >= ends[-1],
        cu_seqlens=torch.cat([torch.zeros(1), ends]).int(),
        max_seqlen=50,
        key=whole.key,
        labels=whole.labels,
        weight=whole.weight,
    )


def every_task() -> dict[str, tuple[Task, Any]]:
    found: dict[str, tuple[Task, Any]] = dict(tasks())
    whole = small_batch(8)
    whole.labels["kind"] = torch.tensor([0, 1, 2, -1, 2, 1, 0, 2])
    whole.labels["domain"] = torch.tensor([0, 1, 1, 1, 0, 1, 0, 0])
    annotate = AnnotateTask(small_model(n_classes=3, cell_style="avg-pool"), "kind")
    domains = {"n_domains": 2, "adversary": True, "use_domain_labels": True, "domain_norm": True}
    for name, batch in (("padded", whole), ("packed", packed(whole))):
        categories = {"value_style": "category", "pad_value": 51.0, "mask_value": 52.0}
        zeros = small_model(explicit_zero_prob=True, **categories)
        binned = batch._each(["values"], lambda v: torch.where(v < 0, v + 53, v))
        integrate = IntegrateTask(small_model(**domains, explicit_zero_prob=True), "domain")
        found |= {
            f"mask {name}": (MaskTask(small_model()), batch),
            f"zeros {name}": (MaskTask(zeros), binned),
            f"integrate {name}": (integrate, batch),
            f"annotate {name}": (annotate, batch),
        }
    return found


@pytest.mark.parametrize("name", every_task())
@pytest.mark.parametrize("dtype", HALF)
def test_nothing_is_added_up_in_half_precision(name: str, dtype: torch.dtype) -> None:
    task, batch = every_task()[name]
    with HalfSums() as watch:
        with torch.autocast("cpu", dtype=dtype):
            sums = task(batch, 0)
        torch.stack(list(sums.values())).sum().backward()
    assert watch.halves > 50, "the step must have been in half precision"
    assert watch.found == []


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(
    "take",
    [
        lambda x, i: x.index_select(0, i),
        lambda x, i: x[i],
        lambda x, i: x.gather(0, i[:, None].expand(-1, 2)),
        lambda x, i: torch.nn.functional.embedding(i, x),
    ],
    ids=["index_select", "index", "gather", "embedding"],
)
def test_the_watch_sees_what_is_taken_twice(take: Any, dtype: torch.dtype) -> None:
    for index, twice in (([0, 2, 1], False), ([0, 2, 0], True)):
        x = torch.ones(3, 2, dtype=dtype, requires_grad=True)
        with HalfSums() as watch:
            take(x, torch.tensor(index)).sum().backward()
        assert bool(watch.found) == (twice and dtype in HALF)

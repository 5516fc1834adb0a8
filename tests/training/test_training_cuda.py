"""Whole runs on CUDA: near the CPU's, the same again, stopped and resumed, on one device and on two.

With SCSHARDS_GPU_TESTS_ON=cpu they run on a CPU, which proves the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_support import pack_cells
from train_support import SMALL, small_batch, small_config, small_model

from scshards.ranks.ranks import Ranks
from scshards.tasks.pretrain import MaskTask
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.optim import make_optimizer
from scshards.training.step import Stepper

DEVICE = os.environ.get("SCSHARDS_GPU_TESTS_ON", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]

# Heads of 8: the kernel of packed attention takes no narrower ones.
PLAIN = ("model.dropout=0", "run.log_every=1", "run.eval_every=100")
KINDS = {
    "mask": (),
    "packed": ("data.tokens_per_batch=700",),
    "generate": ("task.objective=generate", "task.cell_prompt_after=3"),
    "integrate": ("task.name=integrate", "task.domain=donor", "model.explicit_zero_prob=true"),
    "annotate": ("task.name=annotate", "task.label=kind"),
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack_cells(tmp_path_factory.mktemp("cells"))


def losses(shards: str, run: Path, *settings: str) -> list[dict[str, Any]]:
    """The lines of the steps of a short run, without what a clock says."""
    given = ("run.steps=6", f"run.device={DEVICE}", "run.precision=fp32", *settings)
    train(shards, run, small_config(*PLAIN, *given), shown=False)
    lines = [m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "train"]
    return [
        {k: m[k] for k in m if k in ("step", "loss", "grad_norm") or "_mse" in k} for m in lines
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_near_the_losses_of_the_cpu(
    cells: str, tmp_path: Path, kind: str, precision: str, tolerance: float
) -> None:
    expected = losses(cells, tmp_path / "cpu", *KINDS[kind], "run.device=cpu")
    found = losses(cells, tmp_path / "cuda", *KINDS[kind], f"run.precision={precision}")
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * tolerance)


@pytest.mark.parametrize("kind", ["mask", "packed", "generate"])
def test_compiled_steps_are_the_same_steps(cells: str, tmp_path: Path, kind: str) -> None:
    for precision, tolerance in (("fp32", 1e-3), ("bf16", 0.05)):
        given = (*KINDS[kind], f"run.precision={precision}")
        eager = losses(cells, tmp_path / f"eager-{precision}", *given)
        compiled = losses(cells, tmp_path / f"compiled-{precision}", *given, "run.compile=true")
        for a, b in zip(eager, compiled, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deterministic_run_gives_the_same_bits_again(
    cells: str, tmp_path: Path, kind: str
) -> None:
    given = (*KINDS[kind], "run.deterministic=true", "model.dropout=0.2", "run.precision=auto")
    assert losses(cells, tmp_path / "a", *given) == losses(cells, tmp_path / "b", *given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_goes_on_to_the_bit(cells: str, tmp_path: Path, kind: str) -> None:
    """Checkpoints are written while later steps are taken."""
    given = (
        *KINDS[kind], "run.deterministic=true", "run.save_every=1", "model.dropout=0.2",
        "optim.schedule=constant", "optim.warmup_steps=0",
    )  # fmt: skip
    whole = losses(cells, tmp_path / "whole", *given)
    losses(cells, tmp_path / "parts", *given, "run.steps=4")
    assert losses(cells, tmp_path / "parts", *given) == whole


def test_memory_does_not_grow_with_steps(cells: str, tmp_path: Path) -> None:
    config = small_config(*PLAIN, "run.steps=40", f"run.device={DEVICE}")
    train(cells, tmp_path / "run", config, shown=False)
    lines = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "train"]
    few, many = (lines[i]["memory_bytes"] for i in (4, -1))
    assert 0 < many <= 1.2 * few


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="there are no two CUDA devices"
)
@pytest.mark.parametrize("kind", ["mask", "packed", "generate", "annotate"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_devices_take_the_steps_of_one(
    cells: str, tmp_path: Path, kind: str, parallel: str
) -> None:
    """Packed batches hold what fits on a rank, so that two ranks need half of the tokens each."""
    given = (*KINDS[kind], "run.steps=6", "run.precision=fp32", f"run.device={DEVICE}")
    one = losses(cells, tmp_path / "one", *given)
    halved = [s.replace("=700", "=350") for s in given]
    settings = (*SMALL, *PLAIN, *halved, f"run.parallel={parallel}")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = (*launch, "-m", "scshards", "train", cells, "-o", str(tmp_path / "two"))
    subprocess.run(
        [*command, *(x for s in settings for x in ("--set", s))], check=True, timeout=600
    )
    lines = [m for m in read_metrics(tmp_path / "two" / "metrics.jsonl") if m["kind"] == "train"]
    for a, b in zip(one, lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)


def test_a_step_waits_for_nothing() -> None:
    """torch raises an error where it would; and batches that are sent ahead are what is trained on."""
    sums = {}
    for device in (torch.device("cpu"), torch.device(DEVICE, 0)):
        model, config = small_model().to(device), small_config()
        optimizer, here = make_optimizer(model, config.optim), Ranks(0, 1, device)
        stepper = Stepper(MaskTask(model), optimizer, config, here, micro_batch=2, total_steps=9)
        batches = [small_batch(8, seed=i) for i in range(4)]
        if device.type == "cuda":
            batches = [b.pin_memory() for b in batches]
        stepper.step(stepper.prepare(batches[0]), 0)
        results = []
        with refused_waits() if device.type == "cuda" else nullcontext():
            for i, batch in enumerate(batches[1:], 1):
                results.append(stepper.step(stepper.prepare(batch), i))
        results.append(stepper.settle())
        sums[device] = torch.stack([r.sums for r in results if r is not None])
    for found in sums.values():
        torch.testing.assert_close(found, sums[torch.device("cpu")], rtol=1e-3, atol=0)


@contextmanager
def refused_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""{alone, DDP, FSDP2} x {as written, compiled} x {what is trained}: the same losses, or a refusal.

Compiled code is that of torch.compile's backend aot_eager: dynamo and AOTAutograd trace the layers, with
DDP's and FSDP2's hooks around them, and the traced operators run as they are. That shows that layers can
be traced, in one graph of one shape, and that the traced steps are the steps; what inductor makes of them
is compared for one of them, as it takes a C++ compiler many seconds.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train_worker
from train_support import read_tensors, small_config

from scshards.base.errors import ConfigError
from scshards.training.log.metrics import read_metrics

COMMON = (
    "data.max_length=30",
    "model.n_layers=1",
    "model.dropout=0",
    "optim.eps=1e-2",
    "run.steps=4",
    "run.log_every=1",
    "run.eval_every=4",
    "run.save_every=4",
)
INTEGRATE = ("task.name=integrate", "task.domain=kind", "task.metric_cells=0")
KINDS = {
    "mask": ("model.n_layers=2",),
    "generate": ("task.objective=generate", "task.cell_prompt_after=2", "data.mask_ratio=0.5"),
    "packed": ("data.tokens_per_batch=480",),
    "micro-batches": ("model.n_layers=2", "run.micro_batch=2"),
    "annotate": ("task.name=annotate", "task.label=kind"),
    # Cell similarity compares the cells of a rank with each other: that depends on their number.
    "integrate": (*INTEGRATE, "task.domain_norm=false", "task.similarity_weight=0"),
    "average": ("optim.ema=0.9", "optim.ema_best=true"),
    "idle heads": ("model.explicit_zero_prob=true", "task.zero_weight=0", "task.mvc_weight=0"),
}
"""Of several ranks each has an equal part of a packed batch's tokens."""

RANKS = {"alone": (), "ddp": ("run.parallel=ddp",), "fsdp2": ("run.parallel=fsdp2",)}
CODE = {"eager": (), "compiled": ("run.compile=true",)}

# Batches are of one domain each, so that two ranks see other batches than one does.
NORM = {
    f"domain norm {parallel} {code}": (*INTEGRATE, *RANKS[parallel], *CODE[code])
    for parallel, code in itertools.product(("ddp", "fsdp2"), CODE)
}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


def of(parallel: str, code: str, kind: str) -> tuple[str, ...]:
    settings = KINDS[kind]
    if parallel != "alone":
        settings = tuple(s.replace("=480", "=240") for s in settings)
    return (*COMMON, *settings, *RANKS[parallel], *CODE[code])


TRACED = ("mask", "generate", "annotate")
"""What is compiled in every run of the tests; compiling the others takes a minute: they are slow ones."""


def is_slow(code: str, kind: str) -> bool:
    return code == "compiled" and kind not in TRACED


def cases() -> Iterator[Any]:
    for parallel, code, kind in itertools.product(RANKS, CODE, KINDS):
        marks = [pytest.mark.slow] if is_slow(code, kind) else []
        yield pytest.param(parallel, code, kind, marks=marks, id=f"{parallel}-{code}-{kind}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def runs(folder, shards, two_ranks) -> Path:
    """All but what is slow."""
    return train_all(folder, shards, two_ranks, slow=False)


@pytest.fixture(scope="module")
def slow_runs(runs, shards, two_ranks) -> Path:
    return train_all(runs, shards, two_ranks, slow=True)


def train_all(folder: Path, shards: str, two_ranks: Any, *, slow: bool) -> Path:
    what: dict[bool, list[tuple[str, tuple[str, ...]]]] = {False: [], True: []}
    for parallel, code, kind in itertools.product(RANKS, CODE, KINDS):
        if is_slow(code, kind) == slow:
            name = f"{parallel} {code} {kind}"
            what[parallel == "alone"].append((str(folder / name), of(parallel, code, kind)))
    what[False] += [
        (str(folder / name), (*COMMON, *s))
        for name, s in NORM.items()
        if name.endswith("compiled") == slow
    ]
    assert train_worker.runs(shards, what[True], "aot_eager") == len(what[True]) * [""]
    said = two_ranks.run("train_worker:runs", shards, what[False], "aot_eager")
    assert said == 2 * [len(what[False]) * [""]]
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    """Losses and gradient norms of all steps and of the valid split."""
    timed = ("_per_s", "_s", "wait", "memory_bytes")
    return [
        {k: v for k, v in m.items() if isinstance(v, float | int) and not k.endswith(timed)}
        for m in read_metrics(run / "metrics.jsonl")
    ]


def same(a: Path, b: Path, rel: float) -> None:
    mine, other = lines(a), lines(b)
    assert [m["step"] for m in mine] == [1, 2, 3, 4, 4]
    assert len({m["loss"] for m in other if "loss" in m}) == 4, "steps must do something"
    for x, y in zip(mine, other, strict=True):
        assert x.keys() == y.keys()
        for name, value in y.items():
            assert x[name] == pytest.approx(value, rel=10 * rel if name == "grad_norm" else rel), (
                name
            )
    for kind in ("model", "average"):
        found = [read_tensors(run / "checkpoints" / "step-00000004", kind) for run in (a, b)]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=rel)


@pytest.mark.parametrize(("parallel", "code", "kind"), [*cases()])
def test_losses_are_those_of_one_process_that_runs_what_is_written(
    request: pytest.FixtureRequest, parallel: str, code: str, kind: str
) -> None:
    runs = request.getfixturevalue("slow_runs" if is_slow(code, kind) else "runs")
    whole = "mask" if kind == "micro-batches" else kind
    rel = 1e-6 if code == "eager" else 1e-5
    same(runs / f"{parallel} {code} {kind}", runs / f"alone eager {whole}", rel)


def test_batch_norm_by_domain_is_the_same_under_shards(runs: Path) -> None:
    ddp, fsdp2 = (runs / name for name in NORM if name.endswith("eager"))
    same(fsdp2, ddp, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NORM if name.endswith("compiled")])
def test_batch_norm_by_domain_is_the_same_compiled(slow_runs: Path, name: str) -> None:
    same(slow_runs / name, slow_runs / next(iter(NORM)), 1e-5)


@needs_compiler
def test_shards_of_layers_that_inductor_compiled_take_the_same_steps(
    runs: Path, shards: str, two_ranks
) -> None:
    what = [(str(runs / "inductor"), of("fsdp2", "compiled", "mask"))]
    assert two_ranks.run("train_worker:runs", shards, what, "inductor") == [[""], [""]]
    same(runs / "inductor", runs / "alone eager mask", 1e-5)


REFUSED = {
    ("packed", "micro-batches"): "packed batches are not cut",
    ("packed", "generate"): "does not go with task.objective='generate'",
    ("annotate", "generate"): "task.objective means nothing to the task annotate",
    ("integrate", "generate"): "task.objective means nothing to the task integrate",
}
"""What can't be together; it is so on any number of ranks, compiled or not."""


@pytest.mark.parametrize("pair", REFUSED, ids=" and ".join)
@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("parallel", RANKS)
def test_what_does_not_go_together_is_refused(
    shards: str, tmp_path: Path, parallel: str, code: str, pair: tuple[str, str]
) -> None:
    settings = (*(s for kind in pair for s in of(parallel, code, kind)),)
    with pytest.raises(ConfigError, match=REFUSED[pair]):
        _ = small_config(*settings).collate

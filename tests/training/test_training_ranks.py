"""1, 2 and 4 ranks, DDP and FSDP2, accumulation: the same run; and a resume on fewer ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rank_host import RankTeam
from train_support import read_tensors, small_config

from scshards.model.scgpt import load_model
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.save.checkpoint import complete

# Adam divides by the root of a mean square: where that is nearly 0, rounding decides the step unless
# `eps` is large. No dropout: it is drawn by rank.
COMMON = (
    "model.dropout=0",
    "optim.lr=3e-3",
    "optim.eps=1e-2",
    "optim.ema=0.9",
    "run.steps=20",
    "run.log_every=1",
    "run.eval_every=20",
    "run.save_every=10",
    "run.keep_last=9",
)

# Elastic cell similarity compares the cells of a rank with each other: that depends on their number.
INTEGRATE = (
    "task.name=integrate",
    "task.domain=kind",
    "task.domain_norm=false",
    "task.similarity_weight=0",
    "task.metric_cells=30",
    "run.steps=3",
    "run.eval_every=3",
)

BF16 = ("run.precision=bf16", "run.steps=5", "run.eval_every=5")

DROPOUT = ("model.dropout=0.2", "run.micro_batch=4", "run.steps=4", "run.eval_every=4")

HSDP = ("run.parallel=fsdp2", "run.shard_ranks=2")

RUNS = {
    4: {
        "ddp4": (),
        "fsdp4": ("run.parallel=fsdp2",),
        "hsdp4": (*HSDP, "run.micro_batch=2"),
        "hsdp4 bf16": (*HSDP, *BF16),
    },
    2: {
        "ddp2": ("run.micro_batch=2",),
        "dropout": ("run.parallel=fsdp2", *DROPOUT),
        "dropout anew": ("run.parallel=fsdp2", "run.activation_checkpointing=true", *DROPOUT),
        "ddp4 to fsdp2": ("run.parallel=fsdp2", "run.micro_batch=4"),
        "fsdp4 to ddp2": (),
        "fsdp2 integrate": ("run.parallel=fsdp2", *INTEGRATE),
        "fsdp2 bf16": ("run.parallel=fsdp2", "run.micro_batch=4", *BF16),
    },
}
"""By number of ranks. "a to b" goes on, on 2 ranks, from the checkpoint that a wrote at step 10."""


def _ranks(team: RankTeam, n: int, shards: str, folder: Path) -> None:
    what = [[str(folder / name), [*COMMON, *extra]] for name, extra in RUNS[n].items()]
    assert team.run("train_worker:runs", shards, what) == n * [len(what) * [""]]


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory, rank_host, two_ranks) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(shards, folder / "one", small_config(*COMMON), shown=False)
    train(shards, folder / "pieces", small_config(*COMMON, "run.micro_batch=2"), shown=False)
    train(shards, folder / "integrate", small_config(*COMMON, *INTEGRATE), shown=False)
    train(shards, folder / "bf16", small_config(*COMMON, *BF16), shown=False)
    with rank_host.team(4) as four:
        _ranks(four, 4, shards, folder)
    for name in (n for n in RUNS[2] if " to " in n):
        shutil.copytree(folder / name.split()[0], folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-00000020")
        (folder / name / "best_model.pt").unlink()
    _ranks(two_ranks, 2, shards, folder)
    return folder


@pytest.mark.parametrize(
    "name", ["pieces", "ddp4", "fsdp4", "hsdp4", "ddp2", "ddp4 to fsdp2", "fsdp4 to ddp2"]
)
def test_a_run_is_that_of_one_rank(runs, name):
    mine, one = (_lines(runs / n) for n in (name, "one"))
    assert [m["step"] for m in mine if m["kind"] == "train"] == list(range(1, 21))
    for a, b in zip(mine, one, strict=True):
        assert a["masked_mse"] == pytest.approx(b["masked_mse"], rel=1e-6)
        assert a["mvc_mse"] == pytest.approx(b["mvc_mse"], rel=1e-6)
        if a["kind"] == "train":
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for kind in ("model", "average"):
        a, b = (_tensors(runs / n, kind) for n in (name, "one"))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    middle = read_tensors(runs / "one" / "checkpoints" / "step-00000010")
    moved = max((t - _tensors(runs / "one", "model")[n]).abs().max() for n, t in middle.items())
    assert moved > 5e-3, "the weights must have gone somewhere"
    best = [load_model(str(runs / n)).model.state_dict() for n in (name, "one")]
    torch.testing.assert_close(best[0], best[1], rtol=0, atol=1e-6)


def test_a_sharded_model_embeds_and_has_other_heads(runs):
    mine, one = (_lines(runs / n) for n in ("fsdp2 integrate", "integrate"))
    assert [m["step"] for m in mine] == [1, 2, 3, 3]
    for a, b in zip(mine, one, strict=True):
        figures = [k for k, v in b.items() if isinstance(v, float) and not k.endswith("_per_s")]
        assert {"masked_mse"} < set(figures)
        for k in set(figures) - {"data_wait"}:
            assert a[k] == pytest.approx(b[k], rel=1e-5), k


@pytest.mark.parametrize("name", ["fsdp2 bf16", "hsdp4 bf16"])
def test_shards_in_bf16_are_near_autocast_alone(runs, name):
    mine, one = (_lines(runs / n) for n in (name, "bf16"))
    assert [m["step"] for m in mine] == [1, 2, 3, 4, 5, 5]
    for a, b in zip(mine, one, strict=True):
        assert a["masked_mse"] == pytest.approx(b["masked_mse"], rel=1e-3)
    weights = read_tensors(runs / name / "checkpoints" / "step-00000005")
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_layers_that_are_computed_anew_take_the_same_steps_under_shards(runs):
    a, b = (read_tensors(runs / n / "checkpoints/step-00000004") for n in RUNS[2] if "drop" in n)
    assert a.keys() == b.keys() and all(t.equal(b[name]) for name, t in a.items())


def test_every_rank_wrote_its_share(runs):
    for name, ranks in (("ddp4", 4), ("fsdp4", 4), ("ddp2", 2), ("fsdp4 to ddp2", 2)):
        (*_, latest) = complete(runs / name / "checkpoints")
        folder = runs / name / "checkpoints" / latest
        sizes = [p.stat().st_size for p in sorted(folder.glob("*.bin"))]
        assert len(sizes) == ranks
        assert max(sizes) < 2 * min(sizes)
    index = json.loads((runs / "fsdp4/checkpoints/step-00000010/index.json").read_text())
    assert len(index["tensors"]["model/decoder.fc.0.weight"]["pieces"]) == 4
    # Two ranks share a model, and of its two copies one is written.
    index = json.loads((runs / "hsdp4/checkpoints/step-00000010/index.json").read_text())
    assert len(index["tensors"]["model/decoder.fc.0.weight"]["pieces"]) == 2


def _lines(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl")


def _tensors(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return read_tensors(run / "checkpoints" / "step-00000020", kind)

"""The cells of a step, against those that the stream gives when it is read from its beginning."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from train_support import small_config

from scshards.applying.replay import replay
from scshards.base.errors import ConfigError
from scshards.cli import main
from scshards.ranks.ranks import Ranks
from scshards.shards.shardset import ShardSet
from scshards.training.data import endless, train_loader
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.save.branch import branch_config

ALONE = Ranks(0, 1, torch.device("cpu"))
BASE = ("model.dropout=0", "run.log_every=1")
KINDS = {
    "mask": BASE,
    "generate": (*BASE, "task.objective=generate", "task.cell_prompt_after=100"),
    "packed": (*BASE, "data.tokens_per_batch=640"),
    "domains": (*BASE, "task.name=integrate", "task.domain=kind", "task.metric_cells=0"),
    "classes": (*BASE, "task.name=annotate", "task.label=kind"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def run(request, shards, tmp_path_factory):
    config = small_config(*KINDS[request.param])
    folder = tmp_path_factory.mktemp("replay") / "run"
    train(shards, folder, config, shown=False)
    return folder, config, request.param


@pytest.mark.parametrize("step", [1, 10, 11, 18])
def test_its_cells_are_those_of_the_stream(run, shards, step):
    """Before and behind the checkpoint at step 10, and in the second epoch, of 14 steps."""
    folder, config, _ = run
    with train_loader(shards, config, ALONE, 16) as loader:
        batch = next(itertools.islice(endless(loader), step - 1, None))
    found = replay(str(folder), step)
    assert sorted(c.key for c in found.cells) == sorted(batch.cell_keys)
    assert found.weights_of == (10 if step > 10 else 0)
    shard_set = ShardSet(shards)
    for cell in found.cells[:3]:
        there = shard_set.cell(cell.key)
        assert (cell.source, cell.labels["kind"]) == (there.source, there.labels["kind"])


def test_the_losses_of_its_cells_make_the_loss_of_the_step(run):
    """Where a checkpoint stands right before it: values are masked as they were."""
    folder, _, kind = run
    if kind == "domains":
        pytest.skip("a training step normalises by its batch, a cell alone by running statistics")
    found = replay(str(folder), 11)
    line = next(m for m in read_metrics(folder / "metrics.jsonl") if m["step"] == 11)
    losses = [c.loss for c in found.cells if c.loss is not None]
    assert losses == sorted(losses, reverse=True)
    assert min(losses) <= line[found.criterion] <= max(losses)
    if kind == "classes":  # one class a cell: the plain mean
        assert sum(losses) / len(losses) == pytest.approx(line["class_ce"], rel=1e-5)


def test_a_cell_that_is_not_finite_comes_first(shards, tmp_path, monkeypatch):
    from scshards.tasks.pretrain import MaskTask

    train(shards, tmp_path / "run", small_config("run.steps=10"), shown=False)
    worst = replay(str(tmp_path / "run"), 4).cells[-1]
    code = [int(part) for part in worst.key.split("-")]
    sums = MaskTask.sums

    def spoilt(self, batch, out):
        found = sums(self, batch, out)
        at = batch.key.tolist() == [code[0] << 40 | code[1]]
        return {n: t * float("nan") if at else t for n, t in found.items()}

    monkeypatch.setattr(MaskTask, "sums", spoilt)
    assert replay(str(tmp_path / "run"), 4).cells[0].key == worst.key


def test_the_command_shows_them(shards, tmp_path):
    train(shards, tmp_path / "run", small_config(), shown=False)
    done = CliRunner().invoke(main, ["replay", str(tmp_path / "run"), "12", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["step"], found["epoch"], len(found["cells"])) == (12, 0, 16)
    text = CliRunner().invoke(main, ["replay", str(tmp_path / "run"), "12"]).output
    assert found["cells"][0]["key"] in text and "by the weights after step 10" in text


def shown_by_command(*words: str) -> tuple[int, str]:
    """Exit code and standard output of `scshards replay`: a job for ranks of rank_host.py."""
    done = CliRunner().invoke(main, ["replay", *words])
    return done.exit_code, done.stdout


def test_of_several_ranks_the_first_one_shows_them(shards, tmp_path, two_ranks):
    train(shards, tmp_path / "run", small_config("run.steps=4"), shown=False)
    said = two_ranks.run(f"{__name__}:shown_by_command", str(tmp_path / "run"), "3")
    assert [code for code, _ in said] == [0, 0]
    assert ["step 3, epoch 0" in out for _, out in said] == [True, False]


def test_a_branch_knows_its_own_steps_alone(shards, tmp_path):
    old = ("run.save_every=5", "run.keep_every=5")
    train(shards, tmp_path / "old", small_config(*old), shown=False)
    config = branch_config(f"{tmp_path / 'old'}@10", None, ["run.batch_size=8", "run.steps=16"])
    train(shards, tmp_path / "new", config, shown=False)
    mine = replay(str(tmp_path / "new"), 16)
    assert (len(mine.cells), mine.weights_of) == (8, 15)
    with pytest.raises(ConfigError, match=r"branch of .*old@10, and has no checkpoint before"):
        replay(str(tmp_path / "new"), 8)

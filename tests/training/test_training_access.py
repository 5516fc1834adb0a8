"""A run whose addresses lie in a store that only `--storage-options` leads to."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from train_support import SMALL, small_config

from scshards.applying.replay import replay
from scshards.base.storage import Storage
from scshards.cli import main
from scshards.model.scgpt import load_model
from scshards.training.loop import train
from scshards.training.save.checkpoint import complete

STEPS = ("run.steps=2", "run.save_every=1", "run.log_every=1", "model.dropout=0")


@pytest.fixture
def store(s3, monkeypatch):
    """A bucket, and the options without which nobody is let in."""
    for name in s3.env:
        monkeypatch.delenv(name)
    return Storage(s3.url, s3.options)


def _call(*words, settings=(), options=None):
    sets = [x for s in settings for x in ("--set", s)]
    given = ["--storage-options", json.dumps(dict(options))] if options is not None else []
    done = CliRunner().invoke(main, [*map(str, words), *sets, *given, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("task", ["pretrain", "annotate"])
def test_a_run_starts_from_a_model_in_the_store(task, shards, store, tmp_path):
    named = ("task.name=annotate", "task.label=kind") if task == "annotate" else ()
    train(shards, tmp_path / "first", small_config(*STEPS, *named), shown=False)
    for file in ("args.json", "vocab.json", "best_model.pt", *(["classes.json"] if named else [])):
        store.write(f"model/{file}", (tmp_path / "first" / file).read_bytes())
    own = [s for s in (*SMALL, *STEPS, *named) if not s.startswith("model.")]
    run, start = tmp_path / "run", f"{store.url}/model"
    # Nothing is trained, so that what it starts from can be seen.
    _call(
        *("train", shards, "-o", run, "--start", start),
        settings=[*own, 'optim.freeze=["encoder", "value_encoder", "transformer_encoder"]'],
        options=store.options,
    )
    first, second = (load_model(str(tmp_path / r)).model for r in ("first", "run"))
    theirs = second.state_dict()
    trunk = [n for n in theirs if n.startswith(("encoder", "value_encoder", "transformer_encoder"))]
    assert trunk and all(torch.equal(theirs[n], first.state_dict()[n]) for n in trunk)


def test_checkpoints_in_the_store_are_written_read_branched_and_replayed(shards, store, tmp_path):
    place, run = f"{store.url}/run", tmp_path / "run"
    settings = [*SMALL, *STEPS, f"run.checkpoints={place}"]
    done = _call("train", shards, "-o", run, settings=settings, options=store.options)
    assert done["step"] == 2
    assert complete(Storage(place, store.options)) == ["step-00000001", "step-00000002"]
    # The folder is lost: the run goes on from the store.
    again = _call("train", shards, "-o", tmp_path / "b", settings=settings, options=store.options)
    assert (again["start"], again["step"]) == (2, 2)
    branch = _call(
        *("train", shards, "-o", tmp_path / "branch", "--from", f"{run}@1"),
        settings=["run.steps=3"],
        options=store.options,
    )
    assert (branch["start"], branch["step"]) == (1, 3)
    assert replay(str(run), 2, storage_options=store.options).weights_of == 1

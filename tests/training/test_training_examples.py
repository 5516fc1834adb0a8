"""The configs that come with scshards are read, say what their headers say, and train."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from scshards.base.errors import ConfigError
from scshards.cli import main
from scshards.model.classes import CLASSES, read_names
from scshards.model.config import ModelConfig
from scshards.model.transformer import CellModel
from scshards.training.config import SHIPPED, TrainConfig
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train

SHORT = (
    "run.eval_every=4",
    "run.log_every=2",
    "run.device=cpu",
    "run.batch_size=16",
    "data.lanes=4",
)


@pytest.fixture(scope="module")
def tiny(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("tiny") / "run"
    train(shards, run, TrainConfig.read("tiny", [*SHORT, "run.steps=4"]), shown=False)
    return run


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda f: f.stem)
def test_every_config_is_read_and_commented(file):
    config = TrainConfig.read(file.stem)
    assert config == TrainConfig.read(file) != TrainConfig()
    text = file.read_text()
    assert text.startswith("# ")
    assert text.count("#") >= 5
    assert f"--config {file.stem}" in text
    said = CliRunner().invoke(main, ["train", "--help"]).output
    assert file.stem in said, "the help names it"


def test_a_name_is_of_a_file_or_of_a_config_that_comes_with_scshards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder is no config
    assert TrainConfig.read("quickstart") == TrainConfig.read(SHIPPED / "quickstart.toml")
    (tmp_path / "tiny").write_text("[run]\nsteps = 7\n")
    assert TrainConfig.read("tiny").run.steps == 7
    with pytest.raises(ConfigError) as e:
        TrainConfig.read("quickstrat")
    assert "'quickstart'" in str(e.value)
    for name in ("quickstart.toml", "configs/quickstart"):
        with pytest.raises(ConfigError, match="does not exist"):
            TrainConfig.read(name)


def test_the_published_hyper_parameters():
    """Those of the args.json of scGPT_human, and its number of parameters."""
    config = TrainConfig.read("scgpt_51m")
    o, r, d = config.optim, config.run, config.collate
    assert (o.name, o.lr, o.betas, o.weight_decay) == ("adam", 1e-4, (0.9, 0.999), 0.0)
    assert (o.warmup_steps, o.schedule, r.epochs) == (10_000, "cosine", 6)
    assert r.batch_size == 16 * 32
    assert all(config.rank_batch(ranks) == (512 // ranks, 32) for ranks in (1, 2, 4, 8, 16))
    assert (d.max_length, d.n_bins, d.mask_ratio) == (1200, 51, (0.25, 0.5, 0.75))
    # Their counter of batches begins at an epoch's number of them: more than the 1,000 it asks for.
    assert (config.task.objective, config.task.cell_prompt_after) == ("generate", 0)
    shape = ModelConfig(
        n_tokens=60697, pad_id=60694, generate=True, **dataclasses.asdict(config.model)
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in CellModel(shape).parameters()) == 51_330_049


def test_tiny_trains(tiny):
    lines = [m for m in read_metrics(tiny / "metrics.jsonl") if m["kind"] == "train"]
    assert [m["step"] for m in lines] == [2, 4]
    assert (tiny / "best_model.pt").exists()


def test_annotate_starts_from_it(shards, tiny, tmp_path):
    settings = (
        *SHORT,
        "run.epochs=1",
        f"task.start={tiny}",
        "task.label=kind",
        "data.max_length=60",
    )
    config = TrainConfig.read("finetune_annotate", settings)
    assert config.model.d_model == 32, "the checkpoint says how large it is"
    assert config.collate.cls_value == 0, "scGPT's fine-tuning has it, its pretraining pad_value"
    train(shards, tmp_path / "run", config, shown=False)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {"class_ce", "accuracy", "macro_f1"} <= last.keys()
    assert read_names(str(tmp_path / "run"), CLASSES).names == ("k0", "k1", "k2")


def test_integrate_starts_from_it(shards, tiny, tmp_path):
    settings = (
        *SHORT,
        "run.epochs=1",
        f"task.start={tiny}",
        "task.domain=kind",
        "data.max_length=60",
    )
    config = TrainConfig.read("finetune_integrate", settings)
    assert config.collate.cls_value == 0
    train(shards, tmp_path / "run", config, shown=False)
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert {"masked_mse", "mvc_mse", "zero_nll", "mvc_zero_nll", "similarity", "domain_ce"} <= (
        first.keys()
    )

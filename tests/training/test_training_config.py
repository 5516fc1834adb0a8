from __future__ import annotations

import dataclasses
import json

import pytest

from scshards.base.errors import ConfigError, OutputExistsError
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.options import FIELDS
from scshards.streaming.read.options import ReadOptions
from scshards.streaming.sets.options import SetOptions
from scshards.training.config import MAY_CHANGE, TrainConfig
from scshards.training.save.folder import RunFolder


def test_file_and_settings_make_one_config(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nlr = 1e-3\nbetas = [0.9, 0.95]\n[run]\nsteps = 7\n")
    config = TrainConfig.read(file, ["optim.lr=2e-3", "run.precision=bf16", "model.mvc=false"])
    assert config.optim.lr == 2e-3
    assert config.optim.betas == (0.9, 0.95)
    assert config.run.steps == 7
    assert config.run.precision == "bf16"
    assert config.model.mvc is False


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.lrr=1", "did you mean 'lr'"),
        ("optm.lr=1", "did you mean 'optim'"),
        ("run.batchsize=1", "did you mean 'batch_size'"),
        ("data.tie_break=low", "'high', 'random'"),
        ("data.mask_ratio=1.5", "in [0, 1), not 1.5"),
        ("model.n_heads=7", "must divide"),
        ("optim.betas=[0.9]", "a list of 2"),
        ("run.batch_size=0", "at least 1"),
        ("data.where=donor ==", "can't be parsed"),
        ("data.take=0", "a whole number from 1"),
        ("data.weights={donor='even'}", "no rule"),
        ("data.weights=3", "takes one column"),
        ("data.retries=-1", "a whole number from 0"),
        ("data.timeout=0", "above 0"),
        ("data.cache_dir=/tmp/x", "cache_size"),
        ("data.on_bad_shard=skip", "'raise', 'quarantine'"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_right(setting, said):
    with pytest.raises(ConfigError) as e:
        TrainConfig.read(None, [setting])
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("setting", "at", "instead"),
    [
        ('data.arrays=["X_pca"]', "data", "CollateOptions(arrays=...)"),
        ("task.objective=counts", "task.objective", "CollateOptions(objective='counts')"),
        ("task.objective=ranks", "task.objective", "CollateOptions(objective='ranks')"),
        ("task.objective=own", "task.objective", "CollateOptions(objective='own')"),
        ('data.genes=["G1"]', "data", "CollateOptions(objective='counts')"),
        ("data.medians=m.json", "data", "CollateOptions(objective='ranks')"),
        ("data.add_cls=true", "data", "CollateOptions(objective='ranks')"),
        ("data.tokenize=f", "data", "CollateOptions(objective='own')"),
        ('data.by=["line"]', "data", "CellLoader(sets=...)"),
        ("data.sets.size=3", "data", "CellLoader(sets=...)"),
        ("sets.size=3", "sets", "CellLoader(sets=...)"),
    ],
)
def test_what_only_loaders_give_is_refused_and_where_to_get_it_is_said(
    setting, at, instead, tmp_path
):
    name, _, value = setting.partition("=")
    table, _, key = name.rpartition(".")
    file = tmp_path / "run.toml"
    is_list = value.startswith("[") or value in ("true", "3")
    file.write_text(f"[{table}]\n{key} = {value if is_list else json.dumps(value)}\n")
    for said in ((None, [setting]), (file,)):
        with pytest.raises(ConfigError) as e:
            TrainConfig.read(*said)
        assert e.value.where.removeprefix("config.") == at
        assert instead in e.value.advice.partition("a loop of your own gets them, from ")[2]
    assert not {"arrays", "genes", "medians", "tokenize"} & TrainConfig().tables()["data"].keys()


# [data] as the version before the option classes wrote it into config.json.
OLD = {
    "max_length": 300, "mask_ratio": [0.25, 0.5], "tokens_per_batch": None, "include_zero_genes": 3,
    "n_bins": 51, "tie_break": "random", "pad_value": -2.0, "mask_value": -1.0, "lanes": 32,
    "shuffle_buffer": 100, "where": "n_genes>5", "take": None, "weights": {"donor": {"b": 2, "a": 1}},
    "epoch_cells": 70, "threads": 2, "retries": None, "timeout": None, "cache_dir": "/tmp/x",
    "cache_size": "1 GB", "on_bad_shard": "raise", "max_bad_cells": 10000,
}  # fmt: skip


def test_an_older_config_is_the_same_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    settings = [
        "data.max_length=300", "data.mask_ratio=[0.25, 0.5]", "data.include_zero_genes=3",
        "data.tie_break=random", "data.lanes=32", "data.shuffle_buffer=100", "data.where=n_genes > 5",
        "data.weights={donor={a=1, b=2.0}}", "data.epoch_cells=70", "data.cache_dir=/tmp/x",
        "data.cache_size=1 GB",
    ]  # fmt: skip
    config = TrainConfig.read(None, settings)
    folder.claim(config.tables(), "shards")
    path = tmp_path / "run" / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"config": written["config"] | {"data": OLD}}))
    assert set(folder.check(config)) <= {"data.threads"}
    assert folder.config().data.choose == config.data.choose
    with pytest.raises(ConfigError, match=r"data.tie_break is 'random' there, 'high' now"):
        folder.check(TrainConfig.read(None, [*settings, "data.tie_break=high"]))


def test_what_the_loader_can_do_can_be_set(tmp_path):
    settings = [
        "data.values=log1p", "data.target_sum=1e4", "data.exact_mask=true", "data.cls_value=0",
        "data.keep_first=3", "data.pad_to=64", "data.prefetch=64 MB", "data.pin_memory=false",
        "data.stratify=donor", "data.domain_by=donor", "data.on_small_domain=raise",
    ]  # fmt: skip
    config = TrainConfig.read(None, settings)
    assert config.collate == CollateOptions(
        values="log1p", target_sum=1e4, exact_mask=True, cls_value=0.0, keep_first=3, pad_to=64
    )
    assert config.data.read == ReadOptions(prefetch="64 MB", pin_memory=False)
    assert config.data.choose.stratify == "donor"
    folder = RunFolder(tmp_path / "run")
    folder.claim(config.tables(), "shards")
    assert folder.config() == config and folder.check(config) == {}


def test_every_option_of_a_loader_is_a_key_or_says_why_not():
    keys = set(TrainConfig().tables()["data"])
    for name in FIELDS.keys() - keys:
        with pytest.raises(ConfigError, match=f"unknown key {name!r}(.|\\n)*to do: "):
            TrainConfig.read(None, [f"data.{name}=1"])
    sets = {f.name for f in dataclasses.fields(SetOptions)}
    of_others = {"arrays", "genes", "medians", "add_cls", "add_eos", "tokenize"}
    elsewhere = {"objective", "storage_options", "device_collate"}
    assert FIELDS.keys() - keys == elsewhere | of_others | sets


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.exact_mask=true", "task.objective=generate"], "does not go with task.objective"),
        (["data.exact_mask=true", "task.name=annotate", "task.label=x"], "the task annotate"),
        (["data.target_sum=10"], "data.target_sum"),
        (
            ["data.domain_by=a", "task.name=integrate", "task.domain=b"],
            "one domain of task.domain='b'",
        ),
        (["data.values=counts", "model.value_style=category"], "wants bins"),
        (["data.max_lenght=3"], "did you mean 'max_length'"),
        (["data.objective=none"], "task.objective says"),
    ],
)
def test_contradictions_are_refused(settings, said):
    with pytest.raises(ConfigError) as e:
        TrainConfig.read(None, settings)
    assert said in str(e.value)


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(ConfigError, match="not both"):
        TrainConfig.read(None, ["run.steps=1", "run.epochs=1"])
    assert TrainConfig.read(None, ["run.steps=30"]).total_steps(7) == 30
    assert TrainConfig.read(None, ["run.epochs=3"]).total_steps(7) == 21
    assert TrainConfig.read(None, []).total_steps(7) == 7


def test_a_batch_that_can_not_be_dealt_names_the_numbers_that_fit():
    config = TrainConfig.read(None, ["run.batch_size=100", "run.micro_batch=16"])
    with pytest.raises(ConfigError) as e:
        config.rank_batch(2)
    assert "batch_size=96 or 128" in str(e.value)
    assert "micro_batch=10" in str(e.value)  # 50 cells a rank: 5 micro-batches of 10
    assert TrainConfig.read(None, ["run.batch_size=96", "run.micro_batch=16"]).rank_batch(2) == (
        48,
        16,
    )
    assert TrainConfig.read(None, ["run.batch_size=96"]).rank_batch(3) == (32, 32)
    with pytest.raises(ConfigError, match="3 ranks"):
        TrainConfig.read(None, ["run.batch_size=64"]).rank_batch(3)


def test_a_run_is_resumed_with_its_own_config_only(tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = TrainConfig.read(None, ["run.steps=10"])
    assert folder.check(config) == {}
    folder.claim(config.tables(), "s3://key:secret@host/shards")
    assert folder.config() == config
    assert "secret" not in (tmp_path / "run" / "config.json").read_text()

    longer = TrainConfig.read(None, ["run.steps=20", "run.log_every=3"])
    assert folder.check(longer) == {"run.steps": (10, 20), "run.log_every": (10, 3)}
    other = TrainConfig.read(None, ["run.steps=10", "optim.lr=1.0", "model.n_layers=2"])
    with pytest.raises(ConfigError) as e:
        folder.check(other)
    assert "optim.lr is 0.0001 there, 1.0 now" in str(e.value)
    assert "model.n_layers is 12 there, 2 now" in str(e.value)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputExistsError, match="not a run"):
        RunFolder(tmp_path).check(TrainConfig())
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RunFolder(tmp_path).config()
    with pytest.raises(ConfigError, match="local"):
        RunFolder("s3://bucket/run")


def test_what_may_change_are_keys_that_exist():
    tables = TrainConfig().tables()
    assert {f"{table}.{key}" for table, keys in tables.items() for key in keys} >= MAY_CHANGE


def test_packed_batches_are_refused_where_they_can_not_be():
    for setting in ("run.micro_batch=8", "task.objective=generate"):
        with pytest.raises(ConfigError, match="leave"):
            TrainConfig.read(None, ["data.tokens_per_batch=5000", setting])


@pytest.mark.parametrize("key", ["task.start", "run.checkpoints", "evaluate.sets.other.root"])
@pytest.mark.parametrize("secret", ["user:hunter2@", "?X-Amz-Signature=hunter2"])
def test_addresses_hold_no_credentials(key, secret):
    """They would stand in config.json and in every checkpoint."""
    end = secret if secret[0] == "?" else ""
    address = f"s3://{'' if end else secret}bucket/run{end}"
    with pytest.raises(ConfigError, match="no credentials") as e:
        TrainConfig.read(None, [f"{key}={address}"])
    assert "hunter2" not in str(e.value) and key in str(e.value)

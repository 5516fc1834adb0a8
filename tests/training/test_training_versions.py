"""Runs outlive versions: what an older one wrote goes on, what a newer one added is named and kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_run import RUNS, golden_shards

from scshards.applying.evaluate import evaluate_run
from scshards.base.errors import CheckpointError, ConfigError
from scshards.model.scgpt import load_model
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.save.checkpoint import read_state
from scshards.training.save.folder import RunFolder

GOLDEN = Path(__file__).parents[1] / "golden"
TIMING = ("cells_per_s", "tokens_per_s", "padded_tokens_per_s", "data_wait", "memory_bytes")


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> str:
    return golden_shards(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def run(tmp_path) -> Path:
    shutil.copytree(GOLDEN / "run_pretrain", tmp_path / "run")
    return tmp_path / "run"


def on(cells: str, run: Path, *settings: str, name: str = "run_pretrain", steps: int = 4, **more):
    config = TrainConfig.read(None, [*RUNS[name], f"run.steps={steps}", *settings])
    return train(cells, run, config, **({"shown": False} | more))


def state_file(run: Path, step: int = 2) -> Path:
    return run / "checkpoints" / f"step-{step:08d}" / "state.json"


def change(file: Path, how: Callable[[Any], Any]) -> None:
    """Let the JSON of a file be what `how` makes of it, in place or anew."""
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(how(tree) or tree))


def put(*path: str, value: Any) -> Callable[[Any], None]:
    def how(tree: Any) -> None:
        for name in path[:-1]:
            tree = tree[name]
        tree[path[-1]] = value

    return how


def deep(levels: int) -> Any:
    tree: Any = 1
    for _ in range(levels):
        tree = {"a": [tree]}
    return tree


# --- older versions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_an_early_version_goes_on(cells, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / name, run)
    summary = on(cells, run, name=name)
    assert (summary.start, summary.step) == (2, 4)
    lines, then = (read_metrics(f) for f in (run / "metrics.jsonl", GOLDEN / f"{name}_on.jsonl"))
    assert [(m["kind"], m["step"]) for m in lines] == [(m["kind"], m["step"]) for m in then]
    for mine, theirs in zip(lines, then, strict=True):
        for key in theirs.keys() - {*TIMING, "kind"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3), (mine["step"], key)
    assert state_file(run, 4).exists()


@pytest.mark.parametrize("name", RUNS)
def test_what_an_early_version_published_is_read(cells, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / name, run)
    assert load_model(str(run)).args["scshards"]["step"] == 2
    (valid,) = (m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "valid")
    found = evaluate_run(str(run), cells, shown=False)
    assert found.model == pytest.approx(valid["masked_mse"], rel=1e-3)


SETTINGS = [(t, k) for t, keys in TrainConfig().tables().items() for k in keys]


@pytest.mark.parametrize(("table", "key"), SETTINGS, ids=".".join)
def test_a_setting_that_an_upgrade_adds_does_not_block_a_resume(tmp_path, table, key):
    config = TrainConfig()
    run = RunFolder(tmp_path)
    tables = config.tables()
    del tables[table][key]  # as a version wrote it that had no such setting
    (tmp_path / "config.json").write_text(json.dumps({"config": tables}))
    assert run.check(config) == {} and run.config() == config
    del tables[table]
    (tmp_path / "config.json").write_text(json.dumps({"config": tables}))
    assert run.check(config) == {}


def test_what_was_the_best_loss_is_the_figure_to_beat(run):
    found = read_state(str(state_file(run).parent))
    assert (found.best_step, found.best) == (2, {"loss": 941.1350812815657})
    assert "best_loss" not in found.others


def test_a_checkpoint_without_newer_settings_and_counters_goes_on(cells, run):
    def older(tree: Any) -> None:
        for table, key in (
            ("data", "epoch_cells"),
            ("run", "deterministic"),
            ("optim", "ema_best"),
        ):
            del tree["config"][table][key]

    change(run / "config.json", older)
    change(state_file(run), older)

    def fewer(tree: Any) -> None:
        del tree["skipped_in_a_row"], tree["loader"]["epoch_cells"]

    change(state_file(run), fewer)
    assert on(cells, run).start == 2
    written = json.loads((run / "config.json").read_text())["config"]
    assert written["run"]["deterministic"] is False


# --- newer versions ------------------------------------------------------------------------------


def test_what_a_newer_version_added_is_named_in_one_line_and_kept(cells, run, capsys):
    def newer(tree: Any) -> None:
        tree["config"]["run"]["spare"] = 3
        tree["config"]["data"]["order"] = {"by": ["a", 1.5]}
        tree["config"]["lora"] = {"rank": 8}

    change(run / "config.json", newer)
    change(run / "config.json", put("torch", value="3.0"))
    change(state_file(run), newer)
    change(state_file(run), put("tokens", value=5))
    assert on(cells, run, shown=True).step == 4
    said = [
        line for line in capsys.readouterr().err.splitlines() if "another version wrote" in line
    ]
    assert len(said) == 1
    for name in ("config.data.order", "config.lora.rank", "config.run.spare", "torch"):
        assert name in said[0]

    for file in (state_file(run, 4), run / "config.json"):
        config = json.loads(file.read_text())["config"]
        assert config["run"]["spare"] == 3 and config["run"]["steps"] == 4
        assert (config["data"]["order"], config["lora"]) == ({"by": ["a", 1.5]}, {"rank": 8})
    assert json.loads(state_file(run, 4).read_text())["tokens"] == 5
    assert json.loads((run / "config.json").read_text())["torch"] == "3.0"

    evaluate_run(str(run), cells, shown=False)
    assert on(cells, run, steps=5).start == 4


def test_they_are_kept_where_only_checkpoints_are_left(cells, run, tmp_path):
    where = f"run.checkpoints={tmp_path / 'elsewhere'}"
    assert on(cells, tmp_path / "a", where, steps=2).step == 2
    file = tmp_path / "elsewhere" / "step-00000002" / "state.json"
    change(file, put("config", "run", "spare", value=3))
    assert on(cells, tmp_path / "b", where).start == 2
    assert json.loads((tmp_path / "b" / "config.json").read_text())["config"]["run"]["spare"] == 3


def test_a_value_that_only_a_newer_version_knows_asks_for_that_version(cells, run):
    change(run / "config.json", put("config", "optim", "name", value="muon"))
    change(run / "config.json", put("scshards", value="7.0"))
    with pytest.raises(ConfigError, match="'muon' is not one of 'adamw', 'adam'") as e:
        on(cells, run)
    assert f"{run / 'config.json'}: config.optim.name" in str(e.value)
    assert "scshards 7.0" in str(e.value)
    shutil.copy(GOLDEN / "run_pretrain" / "config.json", run)
    change(state_file(run), put("config", "optim", "name", value="muon"))
    change(state_file(run), put("scshards", value="7.0"))
    with pytest.raises(CheckpointError, match="'muon' is not one of 'adamw', 'adam'") as e:
        on(cells, run)
    assert f"{state_file(run)}: config.optim.name" in str(e.value)
    assert "go on with scshards 7.0, which wrote it; if the file is damaged" in str(e.value)
    change(state_file(run), put("format", value=3))
    with pytest.raises(CheckpointError, match="format 3, not 2") as e:
        on(cells, run)
    assert "scshards 7.0" in str(e.value)


# --- damage --------------------------------------------------------------------------------------


BAD_STATES = {
    "list": (lambda tree: [tree], "", "a table is needed"),
    "no step": (lambda tree: tree.pop("step") and None, "step", "missing"),
    "text for step": (put("step", value="4"), "step", "a whole number"),
    "negative step": (put("step", value=-1), "step", "a whole number"),
    "huge step": (put("step", value=10**400), "step", "401 digits"),
    "text for loss": (put("best_loss", value="low"), "best.loss", "a number"),
    "text for config": (put("config", value="x"), "config", "a table is needed"),
    "text for a table": (put("config", "run", value="x"), "config.run", "a table is needed"),
    "list for data": (put("config", "data", value=[1]), "config.data", "a table is needed"),
    "text for a number": (put("config", "run", "seed", value="x"), "config.run.seed", "number"),
    "not allowed": (put("config", "run", "steps", value=0), "config.run.steps", "at least 1"),
    "text for loader": (put("loader", value="x"), "loader", "a table is needed"),
    "deep": (put("more", value=deep(100)), "more", "nested too deep"),
    "deep config": (put("config", "x", value=deep(100)), "config.x", "nested too deep"),
    "deep setting": (put("config", "run", "x", value=deep(100)), "config.run.x", "too deep"),
    "deep known": (put("config", "run", "seed", value=deep(100)), "config.run.seed", "number"),
    "deep loader": (put("loader", "where", value=deep(100)), "loader.where", "nested too deep"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_state_that_can_not_be_says_where(cells, run, kind):
    how, at, what = BAD_STATES[kind]
    change(state_file(run), how)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.*")}
    with pytest.raises(CheckpointError, match=what) as e:
        on(cells, run)
    assert f"{state_file(run)}{': ' * bool(at)}{at}" in str(e.value)
    assert e.value.advice
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.*")} == before


BAD_CONFIGS = {
    "list": (lambda tree: [tree], "", "a table is needed"),
    "no config": (lambda tree: tree.pop("config") and None, "config", "missing"),
    "text for config": (put("config", value="x"), "config", "a table is needed"),
    "text for a table": (put("config", "run", value="x"), "config.run", "a table is needed"),
    "text for data": (put("config", "data", value="x"), "config.data", "a table is needed"),
    "text for a number": (put("config", "run", "seed", value="x"), "config.run.seed", "number"),
    "not allowed": (put("config", "run", "steps", value=0), "config.run.steps", "at least 1"),
    "list for a size": (
        put("config", "data", "cache_size", value=[]),
        "config.data.cache_size",
        "bytes",
    ),
    "endless size": (
        put("config", "data", "cache_size", value=1e999),
        "config.data.cache_size",
        "bytes",
    ),
    "deep": (put("x", value=deep(100)), "x", "nested too deep"),
    "deep config": (put("config", "x", value=deep(100)), "config.x", "nested too deep"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_config_that_can_not_be_says_where(cells, run, kind):
    how, at, what = BAD_CONFIGS[kind]
    change(run / "config.json", how)
    for call in (lambda: on(cells, run), lambda: evaluate_run(str(run), cells, shown=False)):
        with pytest.raises(ConfigError, match=what) as e:
            call()
        assert f"{run / 'config.json'}{': ' * bool(at)}{at}" in str(e.value)
        assert e.value.advice


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"step": 1' + "0" * 9999 + "}", "\x00"])
def test_files_that_are_no_json_are_told(cells, run, text):
    state_file(run).write_text(text)
    with pytest.raises(CheckpointError, match="not valid JSON") as e:
        on(cells, run)
    assert str(state_file(run)) in str(e.value)
    assert "remove this folder" in str(e.value)
    (run / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="not valid JSON") as e:
        on(cells, run)
    assert str(run / "config.json") in str(e.value)


BAD_INDEXES = {
    "text": (put("tensors", value="x"), "tensors"),
    "text for a tensor": (put("tensors", "model/a", value="x"), "tensors.model/a"),
    "no pieces": (put("tensors", "model/a", value={"dtype": "float32", "shape": [2]}), "pieces"),
    "deep": (put("tensors", "model/a", value=deep(100)), "tensors.model/a"),
    "fraction": (put("tensors", "model/a", value={"dtype": "float32", "shape": [1.5], "pieces": []}),
                 "tensors.model/a.shape[0]"),
    "infinite": (put("tensors", "model/a", value={"dtype": "float32", "shape": [], "pieces": [
                 {"file": "x", "start": float("inf"), "nbytes": 4, "crc32": 1, "offsets": [], "sizes": []}]}),
                 "pieces[0].start"),
    "holes": (put("tensors", "model/a", value={"dtype": "float32", "shape": [2], "pieces": []}),
              "model/a"),
    "dtype": (put("tensors", "model/a", value={"dtype": ["x"], "shape": [], "pieces": []}), "dtype"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_INDEXES)
def test_an_index_that_can_not_be_says_where(cells, run, kind):
    how, at = BAD_INDEXES[kind]
    file = state_file(run).with_name("index.json")
    change(file, how)
    with pytest.raises(CheckpointError) as e:
        on(cells, run)
    assert str(file) in str(e.value) and at in str(e.value)


@pytest.mark.parametrize("line", ["{", "[1]", '{"kind": "train"}', '{"kind": 1, "step": 1}',
                                  '{"kind": "train", "step": "1"}', "[" * 9999])  # fmt: skip
def test_a_line_of_metrics_that_can_not_be_says_where(cells, run, line):
    with (run / "metrics.jsonl").open("a") as f:
        f.write(line + "\n")
    with pytest.raises(CheckpointError) as e:
        on(cells, run)
    assert f"{run / 'metrics.jsonl'}, line 4" in str(e.value) and e.value.advice

"""TOML and key=value into dataclasses, and what is said about mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from scshards.base import config, text
from scshards.base.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    name: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError("the learning rate must be above 0", where="optimizer.lr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    steps: int
    label: str | None = None
    bf16: bool = False
    sizes: tuple[int, ...] = ()
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)


def test_toml_to_dataclass(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('steps = 5\nsizes = [1, 2]\nlabel = "a"\n[optimizer]\nlr = 1\nname = "sgd"\n')
    run = config.build(Run, config.read_toml(file))
    assert run == Run(
        steps=5, sizes=(1, 2), label="a", optimizer=Optimizer(lr=1.0, name="sgd"), bf16=False
    )
    assert isinstance(run.optimizer.lr, float)
    again = config.build(Run, dataclasses.asdict(run))
    assert again == run


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x = " + "7" * 5000, "x = \xff", "x"])
def test_toml_of_any_kind_is_read_or_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text("\ufeffsteps = 5\n", encoding="utf-8")
    assert config.read_toml(file) == {"steps": 5}
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"can't be read|not valid TOML"):
        config.read_toml(file)
    assert config.override({}, [text.replace("x = ", "x=", 1)]) if "=" in text else True


def test_override_sets_nested_keys_and_leaves_its_input() -> None:
    tables: dict[str, Any] = {"steps": 1, "optimizer": {"lr": 0.1, "name": "sgd"}}
    out = config.override(
        tables,
        ["steps=20", "optimizer.lr=3e-3", "label=plain text", 'x.y="quoted"', "z=[1,2]", "b=true"],
    )
    assert out == {
        "steps": 20,
        "optimizer": {"lr": 3e-3, "name": "sgd"},
        "label": "plain text",
        "x": {"y": "quoted"},
        "z": [1, 2],
        "b": True,
    }
    assert tables == {"steps": 1, "optimizer": {"lr": 0.1, "name": "sgd"}}


def test_override_takes_what_toml_has_and_json_has_not(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("when = 2026-01-01\n")
    assert "when" in config.override(config.read_toml(file), ["steps=1"])


def test_a_value_that_spans_lines_stays_text() -> None:
    assert config.override({}, ["a=1\nb=2"]) == {"a": "1\nb=2"}


@pytest.mark.parametrize("setting", ["steps", "=3", " =3", ""])
def test_settings_without_a_key_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        config.override({}, [setting])


def test_a_value_is_not_a_table() -> None:
    with pytest.raises(ConfigError, match="'steps' is a value"):
        config.override({"steps": 1}, ["steps.x=1"])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"step": 1}, "did you mean 'steps'"),
        ({"steps": 1, "optimiser": {}}, "did you mean 'optimizer'"),
        ({"steps": 1, "optimizer": {"wd": 1}}, "known names: lr, name"),
        ({"steps": "many"}, "a whole number is needed, not 'many'"),
        ({"steps": 1.5}, "a whole number is needed, not 1.5"),
        ({"steps": True}, "a whole number is needed, not true"),
        ({"steps": 1, "bf16": 1}, "true or false is needed, not 1"),
        ({"steps": 1, "bf16": "yes"}, "true or false is needed, not 'yes'"),
        ({"steps": 1, "label": 3}, "a text is needed, not 3"),
        ({"steps": 1, "sizes": 3}, "a list is needed"),
        ({"steps": 1, "sizes": [1, "x"]}, "a whole number is needed, not 'x'"),
        ({"steps": 1, "optimizer": 3}, "a table is needed"),
        ({"steps": 1, "optimizer": {"name": "adan"}}, "not one of 'adam', 'sgd'"),
        ({"steps": 1, "optimizer": {"lr": True}}, "a number is needed, not true"),
        ({"steps": 1, "optimizer": {"lr": -1}}, "must be above 0"),
        ({}, "it is missing"),
    ],
)
def test_mistakes(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.build(Run, tables)
    assert message in str(caught.value)


def test_the_place_of_a_mistake_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        config.build(Run, {"steps": 1, "optimizer": {"lr": "fast"}}, where="a.toml")
    assert caught.value.where == "a.toml.optimizer.lr"


def test_none_for_what_may_be_none() -> None:
    assert config.build(Run, {"steps": 1, "label": None}).label is None


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), (b"steps = ", "not valid TOML"), (b"a = '\xff'", "not valid TOML")],
)
def test_files_that_are_no_config(tmp_path: Path, text: bytes | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        config.read_toml(file)
    assert message in caught.value.what and caught.value.where == str(file)


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        config.read_toml(tmp_path)


def test_did_you_mean() -> None:
    assert text.did_you_mean("pak", ["pack", "plot", "verify"]) == "did you mean 'pack'?"
    assert text.did_you_mean("zzz", ["b", "a"]) == "known names: a, b"
    many = text.did_you_mean("zzz", [f"n{i:02d}" for i in range(30)])
    assert many.endswith("n19, ...")

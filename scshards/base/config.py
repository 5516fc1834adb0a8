"""Dataclasses from TOML and `key=value`: unknown keys are refused with the nearest name.

    file.toml --read_toml--> dict --override(["a.b=c"])--> dict --build(cls)--> frozen dataclass

A config class is a frozen, keyword-only dataclass beside what it configures and checks itself in
`__post_init__`, raising ConfigError; Options is a base for those.
"""

from __future__ import annotations

import copy
import dataclasses
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from scshards.base.errors import ConfigError
from scshards.base.records import Damaged, from_tree
from scshards.base.text import did_you_mean

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file as a dict; ConfigError when it is absent or malformed."""
    try:
        # Editors of Windows write a mark first.
        return parse_toml(Path(path).read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError("the config file does not exist", where=path) from None
    except OSError as e:
        raise ConfigError(f"the config file can't be read: {e.strerror}", where=path) from None
    except ValueError as e:
        raise ConfigError(f"the config file is not valid TOML: {e}", where=path) from None


def check(ok: bool, where: str, what: str) -> None:
    """ConfigError about the setting `where`, unless it is `ok`."""
    if not ok:
        raise ConfigError(f"{where}: {what}", where=where)


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text; ValueError when it is malformed, whatever is wrong with it."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def override(tables: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """A copy of `tables` with each `a.b=value` set; values are TOML, or else plain strings."""
    out: dict[str, Any] = copy.deepcopy(dict(tables))
    for setting in settings:
        name, eq, text = setting.partition("=")
        if not eq or not name.strip():
            raise ConfigError(
                f"--set takes key=value, not {setting!r}", advice="for example --set optim.lr=1e-4"
            )
        at = out
        *path, last = name.strip().split(".")
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{part!r} is a value, not a table", where=f"--set {setting}")
        at[last] = _value(text.strip())
    return out


def build(cls: type[T], tables: Mapping[str, Any], where: str = "config") -> T:
    """An instance of the dataclass `cls` from nested dicts.

    Raises
    ------
    ConfigError
        For an unknown key (with the nearest known one), a value of another type, or whatever the
        class itself refuses.
    """
    try:
        return from_tree(cls, tables)
    except Damaged as e:
        at = f"{where}.{e.at}" if e.at else where
        raise ConfigError(e.what, where=at, advice=e.advice) from None


class Options:
    """What frozen dataclasses of options inherit: their fields are told by name and of their types.

    Raises
    ------
    ConfigError
        For a name that is no field, with the nearest that is one, or a value of another type.
    """

    def __new__(cls, *args: Any, **given: Any) -> Self:
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"{cls.__name__} has no {name!r}", advice=did_you_mean(name, known)
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        conform(self)

    def changes(self) -> dict[str, Any]:
        """What is not as by default, without what a repr leaves out."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        of = {f.name: (getattr(self, f.name), f.default) for f in fields if f.repr}
        return {name: value for name, (value, default) in of.items() if value != default}


def conform(config: Any) -> None:
    """Make each field of a dataclass of the type that it is annotated with; for its `__post_init__`.

    Raises
    ------
    ConfigError
        For a value of another type; it names the field.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        try:
            value = from_tree(hints[field.name], getattr(config, field.name))
        except Damaged as e:
            e = e.below(field.name)
            raise ConfigError(e.what, where=e.at, advice=e.advice) from None
        object.__setattr__(config, field.name, value)


def _value(text: str) -> Any:
    try:
        parsed = parse_toml(f"v = {text}")
    except ValueError:
        return text
    return parsed["v"] if len(parsed) == 1 else text

"""Dataclasses from TOML and `key=value`: unknown keys are refused with the nearest name.

    file.toml --read_toml--> dict --override(["a.b=c"])--> dict --build(cls)--> frozen dataclass

A config class is a frozen, keyword-only dataclass beside what it configures and checks itself in
`__post_init__`, raising ConfigError. Called by train and the command line.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from scshards.base.errors import ConfigError

T = TypeVar("T")

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file as a dict; ConfigError when it is absent or malformed."""
    try:
        return parse_toml(
            Path(path).read_text("utf-8-sig")
        )  # editors of Windows write a mark first
    except FileNotFoundError:
        raise ConfigError("the config file does not exist", where=path) from None
    except OSError as e:
        raise ConfigError(f"the config file can't be read: {e.strerror}", where=path) from None
    except ValueError as e:
        raise ConfigError(f"the config file is not valid TOML: {e}", where=path) from None


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
    assert dataclasses.is_dataclass(cls)
    if not isinstance(tables, Mapping):
        raise ConfigError(f"a table is needed, not {tables!r:.60}", where=where)
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in tables.items():
        if name not in known:
            raise ConfigError(
                f"unknown key {name!r}", where=where, advice=did_you_mean(name, known)
            )
        values[name] = _convert(hints[name], value, f"{where}.{name}")
    try:
        return typing.cast(T, cls(**values))
    except TypeError as e:
        raise ConfigError(f"incomplete: {e}", where=where) from None


def conform(config: Any) -> None:
    """Make each field of a dataclass of the type that it is annotated with; for its `__post_init__`.

    Raises
    ------
    ConfigError
        For a value of another type; it names the field.
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = _convert(hints[f.name], getattr(config, f.name), f.name)
        object.__setattr__(config, f.name, value)


def as_tables(config: Any) -> dict[str, Any]:
    """The dataclass as plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A line of advice that names the nearest known names, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"known names: {shown}"


def _value(text: str) -> Any:
    try:
        parsed = parse_toml(f"v = {text}")
    except ValueError:
        return text
    return parsed["v"] if len(parsed) == 1 else text


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        options = tuple(o for o in options if o is not type(None))
        for option in options:
            try:
                return _convert(option, value, where)
            except ConfigError:
                if option is options[-1]:
                    raise
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"a table is needed, not {value!r:.60}", where=where)
        inner = typing.get_args(hint)[1]
        return {name: _convert(inner, v, f"{where}.{name}") for name, v in value.items()}
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigError(
                f"{value!r:.60} is not one of {', '.join(map(repr, allowed))}", where=where
            )
        return value
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"a list is needed, not {value!r:.60}", where=where)
        return tuple(_convert(item, v, where) for v in value)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError("the number does not fit in 64 bits", where=where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is bool or isinstance(value, bool):
        ok = hint is bool and isinstance(value, bool)
    else:
        ok = isinstance(value, hint) if isinstance(hint, type) else True
    if not ok:
        raise ConfigError(f"{value!r:.60} is not {_KINDS.get(hint, hint)}", where=where)
    return value

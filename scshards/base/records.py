"""Records: dataclasses from plain JSON and back, by their annotations, with the field at fault named.

    tree = read_json(data)            whatever a JSON text holds; Damaged when it is none
    record = from_tree(Mark, tree)    a dataclass of it, each field checked by its annotation
    tree = to_tree(record)            and back, ready for json.dumps

Annotations: str, int, float, bool, None, Literal, Any, unions, tuples, lists, dicts and dataclasses of
these. More is said of a field by Annotated: Count, Positive and Share (bounds), At (its place in the
tree, where that is not its name), Form (functions that read and write it). A class may check itself in
`__post_init__`, and raise Damaged there. base.config makes options of TOML by the same reader.

Damaged says `splits.train.shards[3].cells: ...`; whoever knows the file makes an error of that. Own code
and not msgspec: that refuses the lone surrogates that stand for file names which are no UTF-8, and names
no key of a table in a path (`splits[...]`).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

from scshards.base.text import did_you_mean

LONGEST = 1 << 30
"""Bytes of a record at most; the manifest of a hundred million cells has 30 million."""

DEEPEST = 32
_MOST = (1 << 63) - 1
_MISSING = object()

T = TypeVar("T")


class Damaged(ValueError):
    """What is wrong with a record, and which of its fields it is.

    Parameters
    ----------
    what
        One sentence.
    at
        The path of the field, from the record that is read.
    advice
        What to do next, where there is something.
    """

    def __init__(self, what: str, at: str = "", *, advice: str | None = None) -> None:
        self.what, self.at, self.advice = what, at, advice
        super().__init__(f"{at}: {what}" if at else what)

    def below(self, place: str) -> Damaged:
        """The same, where the record is a field of another: `name`, `a.b` or `[3]`."""
        dot = "." if self.at and not self.at.startswith("[") else ""
        return Damaged(self.what, f"{place:.80}{dot}{self.at}", advice=self.advice)


@dataclass(frozen=True)
class Within:
    """Of a number: from `least` to `most`."""

    least: float
    most: float


@dataclass(frozen=True)
class At:
    """Of a field: its path in the tree, such as `cells.rows`."""

    path: str


@dataclass(frozen=True)
class Form:
    """Of a field: what reads it from the tree, and writes it; None: as its annotation says.

    `read` raises Damaged.
    """

    read: Callable[[Any], Any] | None = None
    write: Callable[[Any], Any] | None = None


Count = Annotated[int, Within(0, _MOST)]
Positive = Annotated[int, Within(1, _MOST)]
Share = Annotated[float, Within(0, 1)]


def read_json(data: bytes | bytearray | memoryview | str) -> Any:
    """What a JSON text holds.

    Raises
    ------
    Damaged
        When it is no JSON, is nested without end, or has numbers of thousands of digits.
    """
    if isinstance(data, memoryview):
        data = bytes(data)
    if len(data) > LONGEST:
        raise Damaged(f"it has {len(data):,} bytes, more than any record")
    try:
        return json.loads(data)
    except json.JSONDecodeError as e:
        raise Damaged(f"not valid JSON: {e}") from None
    except UnicodeDecodeError as e:
        raise Damaged(f"not valid JSON: byte {e.start} is no text") from None
    except RecursionError:
        raise Damaged("not valid JSON: it is nested too deep") from None
    except ValueError:  # Python's own limit
        raise Damaged("not valid JSON: a number has thousands of digits") from None


def from_tree(cls: Callable[..., T], tree: Any, *, others: bool = False) -> T:
    """The dataclass `cls` of a tree: tables, lists and what is in them.

    Parameters
    ----------
    cls, tree
        What is made, and of what.
    others
        Leave keys aside that are no fields, in place of refusing them.

    Raises
    ------
    Damaged
        For a field that is missing or not what its annotation says, and what the class itself refuses.
    """
    return typing.cast(T, _reader(cls, others)(tree))


def to_tree(record: Any) -> dict[str, Any]:
    """The tree of a dataclass, ready for JSON."""
    tree: dict[str, Any] = {}
    for field in _fields(typing.cast(Hashable, type(record))):
        node = tree
        for name in field.path[:-1]:
            node = node.setdefault(name, {})
        node[field.path[-1]] = (field.write or _plain)(getattr(record, field.name))
    return tree


def shown(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, Mapping | list | tuple):
        return f"a {'table' if isinstance(value, Mapping) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > _MOST:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    return f"{value!r:.60}"


# --- what reads a value ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """Where a field of a dataclass is in its tree, and what it may be."""

    name: str
    path: tuple[str, ...]
    hint: Any
    write: Callable[[Any], Any] | None
    is_needed: bool


@functools.cache
def _fields(cls: Any) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        more = getattr(hints[f.name], "__metadata__", ())
        at = next((m.path for m in more if isinstance(m, At)), f.name)
        write = next((m.write for m in more if isinstance(m, Form)), None)
        is_needed = f.default is f.default_factory is dataclasses.MISSING
        found.append(_Field(f.name, tuple(at.split(".")), hints[f.name], write, is_needed))
    return tuple(found)


@functools.cache
def _reader(hint: Any, others: bool) -> Callable[[Any], Any]:
    """What turns a part of a tree into what an annotation says, or raises Damaged."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _anything
    if origin is Annotated:
        for more in args[1:]:
            if isinstance(more, Form) and more.read is not None:
                return more.read
            if isinstance(more, Within):
                return functools.partial(_number, args[0], more)
        return _reader(args[0], others)
    if origin in (Union, types.UnionType):
        readers = [_reader(a, others) for a in args if a is not type(None)]
        return functools.partial(_one_of, readers, type(None) in args)
    if origin is Literal:
        return functools.partial(_literal, args)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if args == (str, Any):
            return _table
        key = _number_of if args[0] is int else _reader(args[0], others)
        return functools.partial(_mapping, key, _reader(args[1], others))
    if origin in (list, tuple, collections.abc.Sequence):
        is_fixed = origin is tuple and args[-1] is not ...
        readers = [_reader(a, others) for a in args if a is not ...]
        return functools.partial(_items, readers, is_fixed, list if origin is list else tuple)
    if dataclasses.is_dataclass(hint):
        fields = [(f, _reader(f.hint, others)) for f in _fields(typing.cast(Hashable, hint))]
        return functools.partial(_record, hint, fields, others)
    if hint in (int, float):
        return functools.partial(_number, hint, None)
    return functools.partial(_exactly, hint, {str: "a text", bool: "true or false"}[hint])


def _record(
    cls: Any, fields: list[tuple[_Field, Callable[[Any], Any]]], others: bool, tree: Any
) -> Any:
    if not isinstance(tree, Mapping):
        raise Damaged(f"a table is needed, not {shown(tree)}")
    if not others and (unknown := tree.keys() - {f.path[0] for f, _ in fields}):
        name = min(unknown)
        advice = did_you_mean(name, [f.path[0] for f, _ in fields])
        raise Damaged(f"unknown key {name!r:.60}", advice=advice)
    values = {}
    for field, read in fields:
        node: Any = tree.get(field.path[0], _MISSING)
        if len(field.path) > 1:
            node = _below(node, field.path)
        try:
            if node is not _MISSING:
                values[field.name] = read(node)
            elif field.is_needed:
                raise Damaged("it is missing")
        except Damaged as e:
            raise e.below(".".join(field.path)) from None
    return cls(**values)


def _below(node: Any, path: tuple[str, ...]) -> Any:
    """What is at a path, of which `node` is the first part."""
    for i, name in enumerate(path[1:], 1):
        if node is _MISSING:
            break
        # To ask an abstract class takes longer than all the rest.
        if type(node) is not dict and not isinstance(node, Mapping):
            raise Damaged(f"a table is needed, not {shown(node)}", ".".join(path[:i]))
        node = node.get(name, _MISSING)
    return node


def _table(value: Any) -> Any:
    """A table of anything, which stays what it is: it may be more than a dict."""
    if not isinstance(value, Mapping):
        raise Damaged(f"a table is needed, not {shown(value)}")
    return _anything(value)


def _mapping(key: Callable[[Any], Any], read: Callable[[Any], Any], value: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise Damaged(f"a table is needed, not {shown(value)}")
    found = {}
    for name, inner in value.items():
        try:
            found[key(name)] = read(inner)
        except Damaged as e:
            raise e.below(str(name)) from None
    return found


def _items(readers: list[Callable[[Any], Any]], is_fixed: bool, kind: type, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise Damaged(f"a list is needed, not {shown(value)}")
    if is_fixed and len(value) != len(readers):
        raise Damaged(f"a list of {len(readers)} is needed, not {shown(value)}")
    found = []
    try:
        for item, read in zip(value, readers if is_fixed else readers * len(value), strict=True):
            found.append(read(item))
    except Damaged as e:
        raise e.below(f"[{len(found)}]") from None
    return kind(found)


def _one_of(readers: list[Callable[[Any], Any]], or_none: bool, value: Any) -> Any:
    if value is None and or_none:
        return None
    for read in readers[:-1]:
        try:
            return read(value)
        except Damaged:
            continue
    return readers[-1](value)


def _literal(allowed: tuple[Any, ...], value: Any) -> Any:
    for known in allowed:
        if type(value) is type(known) and value == known:
            return value
    raise Damaged(f"{shown(value)} is not one of {', '.join(map(repr, allowed))}")


def _number(kind: type, within: Within | None, value: Any) -> Any:
    if type(value) is int is kind and within is not None and within.least <= value <= within.most:
        return value  # nearly always, and a manifest has a hundred thousand of them
    value = _of_python(value)
    is_one = type(value) is int and -_MOST <= value <= _MOST
    is_one = is_one or (kind is float and type(value) is float)
    if is_one and (within is None or within.least <= value <= within.most):
        return kind(value)
    words = "a whole number" if kind is int else "a number"
    if within is not None:
        words += f" from {within.least}" + ("" if within.most == _MOST else f" to {within.most}")
    raise Damaged(f"{words} is needed, not {shown(value)}")


def _number_of(name: Any) -> int:
    """Numbers as names of a table's fields: JSON has texts there."""
    if isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 20:
        return int(name)
    raise Damaged(f"a whole number from 0 is needed, not {shown(name)}")


def _exactly(kind: type, words: str, value: Any) -> Any:
    value = _of_python(value)
    if type(value) is not kind:
        raise Damaged(f"{words} is needed, not {shown(value)}")
    return value


def _of_python(value: Any) -> Any:
    """A scalar of numpy as Python has it."""
    if type(value) not in (int, float, str, bool) and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _anything(value: Any, depth: int = 0) -> Any:
    """Anything that is not nested deep, and whose numbers are finite and fit in 64 bits."""
    if depth > DEEPEST:
        raise Damaged("it is nested too deep")
    if isinstance(value, Mapping | list):
        table = value if isinstance(value, Mapping) else {f"[{i}]": v for i, v in enumerate(value)}
        for name, inner in table.items():
            try:
                _anything(inner, depth + 1)
            except Damaged as e:
                raise e.below(str(name)) from None
    elif isinstance(value, int | float) and not abs(value) <= _MOST:
        raise Damaged(f"{shown(value)} is no number that it can be")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_tree(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value

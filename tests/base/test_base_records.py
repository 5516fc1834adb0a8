"""The reader of JSON: bounds, types, the field's name; and every field of every record, edited."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from scshards.base.errors import ScshardsError
from scshards.base.records import (
    DEEPEST,
    At,
    Count,
    Damaged,
    Form,
    Share,
    from_tree,
    read_json,
    to_tree,
)
from scshards.base.storage import Storage
from scshards.cells.vocab import Vocab
from scshards.census.index import FORMAT, IndexMark, read_mark
from scshards.census.queries import releases
from scshards.shards.manifest import Manifest
from scshards.sources.ids import find_ids
from scshards.sources.tables import table_of
from tests.census.test_census_queries import directory, release
from tests.shards.test_shards_manifest import sample


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON: Expecting value"),
        (b"\xff", "byte 0 is no text"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
        (b'{"a": ' + b"7" * 5000 + b"}", "thousands of digits"),
    ],
)
def test_what_is_no_json(data: bytes, said: str) -> None:
    with pytest.raises(Damaged, match=said):
        read_json(data)


def test_what_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scshards.base.records.LONGEST", 9)
    assert read_json(b"[1, 2, 3]") == [1, 2, 3] == read_json(memoryview(b"[1, 2, 3]"))
    with pytest.raises(Damaged, match="10 bytes"):
        read_json(b"[1, 2, 34]")


@dataclass(frozen=True, kw_only=True)
class Inner:
    n: Count = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    """One field of each kind, none of them needed."""

    n: Count = 0
    whole: int = 0
    real: float = 0.5
    share: Share = 0.5
    flag: bool = False
    text: str = ""
    kind: Literal["x", 1] = "x"
    maybe: str | int | None = None
    texts: tuple[str, ...] = ()
    pair: tuple[str, int] = ("", 0)
    numbers: list[int] = field(default_factory=list)
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    table: Mapping[str, Inner] = field(default_factory=dict)
    by_number: dict[int, Count] = field(default_factory=dict)
    plain: Any = None
    deep: Annotated[Count, At("place.of.deep")] = 0
    upper: Annotated[str, Form(str.upper, str.lower)] = ""


WHOLE = Outer(
    n=1, whole=-2, real=2.5, share=1.0, flag=True, text="\udcff", kind=1, maybe=5, texts=("a", "b"),
    pair=("p", 1), numbers=[1, 2], inner=Inner(n=4), inners=(Inner(), Inner(n=5)),
    table={"a b": Inner(n=6)}, by_number={7: 8}, plain={"deep": [{"x": 1.5}]}, deep=9, upper="UP",
)  # fmt: skip


def test_a_record_to_a_tree_and_back() -> None:
    tree = json.loads(json.dumps(to_tree(WHOLE)))
    assert tree["place"] == {"of": {"deep": 9}} and tree["upper"] == "up"
    assert tree["by_number"] == {"7": 8} and tree["inners"] == [{"n": 3}, {"n": 5}]
    assert from_tree(Outer, tree) == WHOLE
    assert from_tree(Outer, {}) == Outer()
    assert from_tree(Outer, {"share": 1, "x": 5}, others=True).share == 1.0


def test_keys_that_are_no_fields() -> None:
    with pytest.raises(Damaged, match="inner: unknown key 'm'") as caught:
        from_tree(Outer, {"inner": {"m": 1}})
    assert caught.value.advice == "known names: n"
    assert from_tree(Outer, {"inner": {"m": 1}}, others=True) == Outer()


def _nested(depth: int) -> Any:
    return [_nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([], "^a table is needed, not a list of 0$"),
        ({"n": True}, "^n: a whole number from 0 is needed, not true$"),
        ({"n": 1 << 63}, "not a number of 19 digits"),
        ({"n": 1.0}, "not 1.0"),
        ({"whole": 10**400}, "whole: a whole number is needed, not a number of 401 digits"),
        ({"real": "1"}, "real: a number is needed, not '1'"),
        ({"real": True}, "real: a number is needed, not true"),
        ({"share": 1.5}, "share: a number from 0 to 1 is needed, not 1.5"),
        ({"share": float("nan")}, "share: a number from 0 to 1 is needed, not NaN"),
        ({"flag": 1}, "flag: true or false is needed, not 1"),
        ({"text": ["x"]}, "text: a text is needed, not a list of 1"),
        ({"text": None}, "text: a text is needed, not null"),
        ({"kind": "y" * 500}, "kind: 'y{50,60} is not one of 'x', 1"),
        ({"kind": True}, "kind: true is not one of"),
        ({"maybe": []}, "maybe: a whole number is needed, not a list of 0"),
        ({"texts": ["x", 1]}, r"texts\[1\]: a text is needed, not 1"),
        ({"texts": "x"}, "texts: a list is needed, not 'x'"),
        ({"pair": ["x"]}, "pair: a list of 2 is needed, not a list of 1"),
        ({"pair": ["x", "y"]}, r"pair\[1\]: a whole number is needed"),
        ({"numbers": [1, 2.5]}, r"numbers\[1\]: a whole number is needed, not 2.5"),
        ({"inners": [{}, 5]}, r"inners\[1\]: a table is needed, not 5"),
        ({"table": {"a b": {"n": -1}}}, "table.a b.n: a whole number from 0 is needed, not -1"),
        ({"by_number": {"x": 1}}, "by_number.x: a whole number from 0 is needed, not 'x'"),
        ({"plain": {"a": [float("inf")]}}, r"plain.a\[0\]: Infinity is no number"),
        ({"plain": {"a": {"b": float("nan")}}}, "plain.a.b: NaN is no number"),
        ({"plain": {"a": _nested(DEEPEST + 1)}}, "plain.a.*nested too deep"),
        ({"place": {"of": 3}}, "place.of: a table is needed, not 3"),
        ({"place": {"of": {"deep": -1}}}, "place.of.deep: a whole number from 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_field(tree: Any, said: str) -> None:
    with pytest.raises(Damaged, match=said) as caught:
        from_tree(Outer, tree)
    assert len(str(caught.value)) < 250


# --- every field of every record, edited in ten ways ---------------------------------------------

EDITS: dict[str, Callable[[Any], Any]] = {
    "null": lambda v: None,
    "true": lambda v: True,
    "below 0": lambda v: -1,
    "huge": lambda v: 10**4000,
    "past 64 bits": lambda v: 1 << 63,
    "a fraction": lambda v: 0.5,
    "not a number": lambda v: float("nan"),
    "a text": lambda v: "../../x",
    "a list": lambda v: [v],
    "a deep table": lambda v: {"x": _nested(500)},
}


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(node, dict | list):
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))[:2]
        for key, value in items:
            yield from _places(value, (*path, key))


def _edited(tree: Any) -> Iterator[tuple[str, bytes]]:
    for path in _places(tree):
        for how, edit in EDITS.items():
            changed = copy.deepcopy(tree)
            node = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = edit(node[path[-1]])
            yield f"{path}: {how}", json.dumps(changed).encode()
        if isinstance(path[-1], str):
            changed = copy.deepcopy(tree)
            node = changed
            for key in path[:-1]:
                node = node[key]
            node[".."] = node.pop(path[-1])
            yield f"{path}: renamed", json.dumps(changed).encode()


def _manifest(data: bytes, folder: Path) -> None:
    made = Manifest.from_json(data)
    assert ".." not in made.splits and not any(
        ".." in path.split("/")
        for shards in made.splits.values()
        for shard in shards
        for path in (shard.path, shard.index_path)
    )
    made.to_json()


def _index_mark(data: bytes, folder: Path) -> None:
    Storage(folder).write("heart.json", data)
    read_mark(Storage(folder), "heart")


def _scbank(data: bytes, folder: Path) -> None:
    storage = Storage(folder)
    storage.write("X.datatable.parquet", b"")
    storage.write("manifest.json", data)
    table_of(storage, "x.scb")


def _releases(data: bytes, folder: Path) -> None:
    queries = directory(folder, {})
    (folder / "release.json").write_bytes(data)
    releases(queries)


def _ids(data: bytes, folder: Path) -> None:
    Storage(folder).write("v.json", data)
    find_ids([Storage(folder)], str(folder / "v.json"), where="x")


def _of(cls: type) -> Any:
    """A tree of a dataclass: numbers and texts."""
    first = {"int": 1, "float": 0.5, "bool": True}
    return {f.name: first.get(str(f.type).split()[0], "heart") for f in dataclasses.fields(cls)}


RECORDS: dict[str, tuple[Any, Callable[[bytes, Path], object]]] = {
    "manifest": (json.loads(sample().to_json()), _manifest),
    "vocab": ({"<pad>": 0, "A": 1, "B": 2}, lambda data, folder: Vocab.from_json(data)),
    "ids": ({"<pad>": 0, "A": 1, "B": 2}, _ids),
    "scbank": ({"main_data": "X", "on_disk_format": "parquet"}, _scbank),
    "releases": (
        {"1": release(flags={"lts": True}, retraction={"reason": "x"}), "stable": "1"},
        _releases,
    ),
    "index": (_of(IndexMark) | {"query": "heart", "format": FORMAT}, _index_mark),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_edited_in_ten_ways(name: str, tmp_path: Path) -> None:
    """Whatever a field is: it is read, or refused in words with the field's name; nothing else."""
    tree, read = RECORDS[name]
    read(json.dumps(tree).encode(), tmp_path)
    refused = 0
    for what, data in _edited(tree):
        try:
            read(data, tmp_path)
        except (ScshardsError, Damaged) as e:
            refused += 1
            assert len(str(e)) < 600, what
    assert refused >= LEAST.get(name, 5) * sum(1 for _ in _places(tree))


LEAST = {"releases": 1, "scbank": 3}
"""Edits that are refused of each field, where most are not read: else 5."""

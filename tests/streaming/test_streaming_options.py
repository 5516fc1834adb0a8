"""The options of a loader: their classes, what they refuse, and where an option is that is no keyword."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardsets import Known, make_set

import scshards
from scshards import CellDataset, CellLoader, ChoiceOptions, CollateOptions, ReadOptions
from scshards.base.access import Access
from scshards.base.errors import ConfigError, StateError
from scshards.base.where import parse
from scshards.cli.options import field_texts
from scshards.streaming import wds
from scshards.streaming.options import FIELDS, PARTS, by_part
from scshards.streaming.sets.options import SetOptions

CLASSES = (ChoiceOptions, CollateOptions, ReadOptions)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), [60, 40], longest=9)


def test_they_load_nothing_heavy() -> None:
    code = (
        "import sys, scshards; scshards.ChoiceOptions(where='a > 1'); scshards.CollateOptions();"
        "scshards.ReadOptions(); print([m for m in ('torch', 'numba', 'pandas', 'anndata') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_each_option_is_a_field_of_one_class_and_has_a_text() -> None:
    names = [f.name for cls in PARTS.values() for f in dataclasses.fields(cls)]
    assert sorted(names) == sorted(FIELDS) and len(set(names)) == len(names)
    for cls in PARTS.values():
        assert {f.name for f in dataclasses.fields(cls)} == set(field_texts(cls))


@pytest.mark.parametrize("cls", [*CLASSES, SetOptions])
def test_they_are_frozen_and_cross_processes(cls: Any) -> None:
    made = cls() if cls is not SetOptions else cls(by=["line", "drug"], control="DMSO")
    assert pickle.loads(pickle.dumps(made)) == made == dataclasses.replace(made)  # noqa: S301
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.where = made.max_length = made.lanes = made.size = 3


@pytest.mark.parametrize("make", [CellLoader, CellDataset, wds.Collate])
def test_what_was_a_keyword_says_where_it_is_now(known: Known, make: Any) -> None:
    with pytest.raises(ConfigError) as e:
        make(known.root, max_length=600)
    assert e.value.what == "max_length is a field of CollateOptions"
    assert e.value.advice == "write collate=CollateOptions(max_length=600)"


def test_several_keywords_and_secrets(known: Known) -> None:
    with pytest.raises(ConfigError) as e:
        CellLoader(
            known.root, n_bins=5, where="age > 3", lanes=2, storage_options={"key": "s3cret"}
        )  # type: ignore[arg-type]
    assert "n_bins is a field of CollateOptions" in e.value.what
    assert "lanes, storage_options are fields of ReadOptions" in e.value.what
    assert "choose=ChoiceOptions(where='age > 3')" in str(e.value.advice)
    assert "read=ReadOptions(lanes=2, storage_options=...)" in str(e.value.advice)
    assert "s3cret" not in str(e.value)


@pytest.mark.parametrize(
    ("flat", "near"), [({"max_lenght": 3}, "max_length"), ({"batchsize": 3}, "batch_size")]
)
def test_a_typo_is_told_the_nearest_name(known: Known, flat: dict[str, Any], near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        CellLoader(known.root, **flat)
    with pytest.raises(ConfigError, match=f"CollateOptions has no {next(iter(flat))!r}"):
        CollateOptions(**flat)


def test_a_class_in_the_wrong_place_or_none(known: Known) -> None:
    with pytest.raises(ConfigError, match="read is a ReadOptions, not CollateOptions"):
        CellLoader(known.root, read=CollateOptions())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="collate is a CollateOptions, not dict"):
        CellDataset(known.root, collate={"max_length": 600})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"where": "a == 1"}, {"where": "a==1"}),
        ({"where": "a == 'x' & (b > 2)"}, {"where": 'a=="x" and b>2'}),
        ({"where": "`a` > 1"}, {"where": "a > 1"}),
        ({"where": "`the donor` > 1"}, {"where": "(`the donor`>1)"}),
        ({"weights": {"d": {"a": 1, "b": 2}}}, {"weights": {"d": {"b": np.float32(2), "a": np.int64(1)}}}),
        ({"take": 3}, {"take": np.int32(3)}),
        ({"mask_ratio": [0.5, 0.25]}, {"mask_ratio": (np.float64(0.5), 0.25)}),
        ({"pad_value": -2}, {"pad_value": np.float32(-2)}),
        ({"conditions": ["a"]}, {"conditions": ("a",)}),
        ({"exact_mask": np.True_}, {"exact_mask": True}),
        ({"cache_dir": Path("/x"), "cache_size": "2 GB"}, {"cache_dir": "/x", "cache_size": 2 * 10**9}),
    ],
)  # fmt: skip
def test_equal_options_written_differently(a: dict[str, Any], b: dict[str, Any]) -> None:
    (part,) = {FIELDS[name][0] for name in a}
    one, other = PARTS[part](**a), PARTS[part](**b)
    assert one == other and repr(one) == repr(other)


NAMES = st.sampled_from(["a", "class", "the donor", "n_genes", "é", "x-y", "a.b"])
VALUES = st.integers(0, 9) | st.floats(0, 9) | st.text(max_size=4)


@given(
    terms=st.lists(st.tuples(NAMES, st.sampled_from(["==", "!=", ">", "in"]), VALUES), min_size=1, max_size=4),
    joins=st.lists(st.sampled_from([" and ", " | ", "&", " or not "]), min_size=4, max_size=4),
    brackets=st.booleans(),
)  # fmt: skip
def test_the_canonical_form_parses_to_itself(
    terms: list[Any], joins: list[str], brackets: bool
) -> None:
    def said(name: str, sign: str, value: Any) -> str:
        right = f"[{value!r}]" if sign == "in" else repr(value)
        return f"(`{name}` {sign}  {right})" if brackets else f"`{name}`{sign} {right}"

    text = said(*terms[0])
    for join, term in zip(joins, terms[1:], strict=False):
        text += join + said(*term)
    one = parse(text)
    again = parse(one.canonical)
    assert again.canonical == one.canonical
    assert (again.columns, set(again.compared)) == (one.columns, set(one.compared))


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"lanes": 0}, "whole number from 1"),
        ({"threads": 1.5}, "whole number"),
        ({"shuffle_buffer": -1}, "whole number from 1"),
        ({"prefetch": 0}, "from 1 on"),
        ({"prefetch": "much"}, "no size"),
        ({"cache_size": "1 GB"}, "together"),
        ({"retries": -1}, "whole number from 0"),
        ({"timeout": 0}, "above 0"),
        ({"on_bad_shard": "skip"}, "'raise', 'quarantine'"),
        ({"objective": "maks"}, "'mask', 'generate', 'none'"),
        ({"max_length": "600"}, "whole number"),
        ({"n_bins": 1}, "at least 2"),
        ({"tokens_per_batch": 50, "device_collate": True}, "leave device_collate out"),
        ({"weights": {"a": {"x": True}}}, "no weight"),
        ({"weights": {"a": {"x": np.float32("nan")}}}, "no weight"),
        ({"epoch_cells": True}, "whole number"),
    ],
)
def test_what_they_refuse(flat: dict[str, Any], says: str) -> None:
    (part,) = {FIELDS[name][0] for name in flat}
    with pytest.raises(ConfigError, match=says):
        PARTS[part](**flat)


def test_credentials_are_in_no_repr_state_or_print(known: Known) -> None:
    secret = {"key": "s3cret", "client_kwargs": {"token": "s3cret"}}
    for options in (secret, Access(options=secret)):
        read = ReadOptions(storage_options=options)
        assert "s3cret" not in repr(read) + str(read.changes()) + repr(read.access)
        loader = CellLoader(known.root, batch_size=4, read=read)
        assert "s3cret" not in repr(loader) + json.dumps(loader.state_dict())


def test_a_loader_says_what_it_is(known: Known) -> None:
    plain = str(CellLoader(known.root, batch_size=8))
    assert "split 'train'" in plain and "100 cells an epoch, 12 batches of 8 cells" in plain
    assert "on each of 1 rank; this is rank 0" in plain and "=" not in plain
    assert (
        "\n  left out of each epoch: 4 cells that fill no batch on all ranks (drop_last)" in plain
    )
    for whole in ({"batch_size": 8, "drop_last": False}, {"batch_size": 10}):
        made = CellLoader(known.root, **whole)
        assert "left out" not in str(made) and made.dropped_cells == 0
    halfway = CellLoader(known.root, batch_size=8)
    next(iter(halfway))
    assert str(halfway) == plain
    loader = CellLoader(
        known.root,
        batch_size=8,
        choose=ChoiceOptions(where="age>30"),
        collate=CollateOptions(mask_ratio=0.3),
        seed=3,
        rank=1,
        world_size=2,
    )
    said = str(loader).split("\n  ")
    assert said[-3:] == ["seed=3", "choose: where='age > 30'", "collate: mask_ratio=0.3"]
    assert "2 ranks; this is rank 1" in said[1]
    assert loader.vocab is not None and loader.options["collate"] == CollateOptions(mask_ratio=0.3)


def state_of(known: Known, **flat: Any) -> dict[str, Any]:
    tables, _ = by_part(flat)
    parts: dict[str, Any] = {p: PARTS[p](**t) for p, t in tables.items()}
    state: dict[str, Any] = CellLoader(known.root, batch_size=4, **parts).state_after(3)
    return state


def test_equal_choices_written_differently_resume(known: Known) -> None:
    one = CellLoader(
        known.root,
        batch_size=4,
        choose=ChoiceOptions(
            where="age>30 & n_genes > 1", weights={"donor": {"b": np.int64(2), "a": 1}}
        ),
    )
    state = state_of(known, where="age > 30 and n_genes>1", weights={"donor": {"a": 1.0, "b": 2.0}})
    # As an older version wrote them down.
    written = {"where": "age  > 30 and (n_genes>1)", "weights": {"donor": {"b": 2, "a": 1}}}
    for saved in (state, state | written):
        one.load_state_dict(json.loads(json.dumps(saved)))
        assert one.state_dict() == state
    with pytest.raises(StateError, match="another where: 'age > 31' instead of"):
        one.load_state_dict(state | {"where": "age>31"})
    with pytest.raises(StateError, match=r"another where: 'age >' instead of"):
        one.load_state_dict(state | {"where": "age >"})


def test_keys_that_a_state_has_more_or_less_of(known: Known) -> None:
    loader = CellLoader(known.root, batch_size=4)
    state = state_of(known)
    less = {k: v for k, v in state.items() if k != "domain_by"}
    less["collate"] = {k: v for k, v in state["collate"].items() if k != "cls_value"}
    loader.load_state_dict(less)  # as by default
    assert loader.state_dict() == state
    other = CellLoader(known.root, batch_size=4, collate=CollateOptions(cls_value=0.0))
    with pytest.raises(StateError, match=r"another collate.cls_value: None instead of 0.0"):
        other.load_state_dict(less)
    with pytest.raises(StateError, match="does not know: newer"):
        loader.load_state_dict(state | {"newer": None})
    with pytest.raises(StateError, match=r"does not know: collate.newer"):
        loader.load_state_dict(state | {"collate": state["collate"] | {"newer": None}})
    with pytest.raises(StateError, match="not the state of a CellLoader"):
        loader.load_state_dict({k: v for k, v in state.items() if k != "epoch"})


def test_numbers_of_numpy_are_numbers(known: Known) -> None:
    options: Any = {
        "seed": np.int64(3), "batch_size": np.int32(4), "epoch": np.uint8(1), "shuffle": np.True_,
        "rank": np.int64(0), "world_size": np.int64(2), "read": ReadOptions(lanes=np.int16(8)),
    }  # fmt: skip
    numpy = CellLoader(known.root, **options)
    python = CellLoader(
        known.root, seed=3, batch_size=4, epoch=1, rank=0, world_size=2, read=ReadOptions(lanes=8)
    )
    assert json.loads(json.dumps(numpy.state_dict())) == python.state_dict()
    assert repr(numpy) == repr(python)
    for name, wrong in (
        ("seed", 1.5),
        ("batch_size", 0),
        ("epoch", -1),
        ("shuffle", 1),
        ("rank", -1),
    ):
        with pytest.raises(ConfigError, match=name):
            CellLoader(known.root, **{**options, name: wrong})


def test_all_public_names_are_there() -> None:
    for name in scshards.__all__:
        assert getattr(scshards, name) is not None

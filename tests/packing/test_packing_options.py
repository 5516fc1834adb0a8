"""What `pack` may be asked for, and what it refuses before it looks at any input."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

from scshards import PackOptions
from scshards.base.errors import ConfigError


@pytest.mark.parametrize(
    "options,says",
    [
        ({"valid_fraction": 1.0}, "not in [0, 1)"),
        ({"valid_fraction": -0.1}, "not in [0, 1)"),
        ({"valid_fraction": True}, "a number is needed"),
        ({"test_fraction": 1}, "not in [0, 1)"),
        ({"test_fraction": float("nan")}, "not in [0, 1)"),
        ({"test_fraction": "0.1"}, "a number is needed"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "nothing for the split 'train'"),
        ({"valid_fraction": 0.7, "test_fraction": 0.6}, "nothing for the split 'train'"),
        ({"split_by": "donor"}, "nothing to split"),
        ({"split_by": "", "valid_fraction": 0.1}, "not the name of a column"),
        ({"unique": ""}, "not the name of a column"),
        ({"unique": 3}, "a text is needed, not 3"),
        ({"max_genes": 0}, "at least 1"),
        ({"max_genes": 10.0}, "a whole number is needed, not 10.0"),
        ({"min_genes": 11, "max_genes": 10}, "at least 11 genes and at most 10"),
        ({"min_counts": 0}, "not above 0"),
        ({"min_counts": -1.0}, "not above 0"),
        ({"min_counts": float("inf")}, "not above 0"),
        ({"min_counts": float("nan")}, "not above 0"),
        ({"min_counts": "1"}, "a number is needed"),
        ({"min_match": float("nan")}, "not in [0, 1]"),
        ({"list_columns": "ab"}, "not the names of two columns"),
        ({"list_columns": ("genes",)}, "not the names of two columns"),
        ({"list_columns": ("genes", "")}, "not the names of two columns"),
        ({"list_columns": ("genes", "genes")}, "are not the names of two columns"),
        ({"held_out": {"valid": ["a"]}}, "of no column"),
        ({"split_by": "d", "held_out": {}}, "no values are listed"),
        ({"split_by": "d", "held_out": ["a"]}, "a table is needed"),
        ({"split_by": "d", "held_out": {"valid": []}}, "[] is no list of texts"),
        ({"split_by": "d", "held_out": {"valid": "abc"}}, "is no list of texts"),
        ({"split_by": "d", "held_out": {"valid": 3}}, "is no list of texts"),
        ({"split_by": "d", "held_out": {"valdi": ["a"]}}, "did you mean 'valid'?"),
        ({"split_by": "d", "held_out": {"train": ["a"]}}, "no split that values"),
        ({"split_by": "d", "held_out": {"valid": [["a"]]}}, "is no list of texts, numbers and booleans"),
        ({"split_by": "d", "held_out": {"valid": [None]}}, "is no list of texts, numbers and booleans"),
        ({"split_by": "d", "held_out": {"valid": [float("nan")]}}, "NaN is no number"),
        ({"split_by": "d", "held_out": {"valid": ["a", "1"], "test": [1.0]}}, "both valid and test: '1'"),
        ({"split_by": "d", "held_out": {"valid": ["a"]}, "test_fraction": 0.1}, "or fractions"),
    ],
)  # fmt: skip
def test_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as e:
        PackOptions(**options)
    assert says in str(e.value)


@pytest.mark.parametrize(
    "options,splits",
    [
        ({}, ("train",)),
        ({"valid_fraction": 0.1}, ("train", "valid")),
        ({"test_fraction": 0.1}, ("train", "test")),
        ({"test_fraction": 0.1, "valid_fraction": 0.1}, ("train", "valid", "test")),
        ({"split_by": "d", "held_out": {"test": ["a"], "valid": ["b"]}}, ("train", "valid", "test")),
        ({"split_by": "d", "held_out": {"test": ["a"]}}, ("train", "test")),
    ],
)  # fmt: skip
def test_splits_are_those_used(options: dict[str, Any], splits: tuple[str, ...]) -> None:
    assert PackOptions(**options).splits == splits


def test_held_out_values_are_texts_in_order() -> None:
    given = {"test": [True, 3, 3.0, 0.5], "valid": ["b", "a", "b", np.int64(7)]}
    options = PackOptions(split_by="d", held_out=given)
    assert options.held_out == {"valid": ("7", "a", "b"), "test": ("0.5", "3", "True")}
    assert list(options.held_out) == ["valid", "test"]
    assert options.labels == ("d",)


def test_what_is_recorded_is_json_and_does_not_depend_on_how_it_was_spelled() -> None:
    one = PackOptions(
        split_by="d",
        held_out={"test": ("x",), "valid": {"b", "a"}},
        obs=["q"],
        min_counts=500,
        max_genes=9,
        unique="barcode",
        workers=3,
        storage_options={"key": "secret"},
    )
    two = PackOptions(
        split_by="d",
        held_out={"valid": ["a", "b", "a"], "test": ["x"]},
        obs=("q",),
        min_counts=500.0,
        max_genes=9,
        unique="barcode",
    )
    text = json.dumps(one.recorded())
    assert text == json.dumps(two.recorded()) and "secret" not in text
    recorded = json.loads(text)
    assert recorded == one.recorded()
    assert recorded["held_out"] == {"valid": ["a", "b"], "test": ["x"]}
    assert recorded["min_counts"] == 500.0 and "workers" not in recorded
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301


def test_each_option_is_recorded_or_known_not_to_matter() -> None:
    import dataclasses

    names = {f.name for f in dataclasses.fields(PackOptions)}
    not_recorded = {"workers", "scratch", "storage_options", "trust_pickle"}
    not_recorded |= {"allow_mixed", "allow_repeats", "max_categories", "on_bad_input"}
    # Those of arrays only where there are any: sets without them are the same bytes as ever.
    with_arrays = PackOptions(obsm=("X_pca",), feature_arrays=("Antibody Capture",))
    assert names - set(with_arrays.recorded()) == not_recorded
    assert set(with_arrays.recorded()) - set(PackOptions().recorded()) == {"obsm", "feature_arrays"}


def test_an_address_is_recorded_without_credentials() -> None:
    recorded = PackOptions(ids_vocab="https://me:secret@host/vocab.json").recorded()
    assert "secret" not in json.dumps(recorded) and "host/vocab.json" in recorded["ids_vocab"]

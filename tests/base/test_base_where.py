"""--where: pandas query syntax over obs, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base.errors import ConfigError
from scshards.base.where import parse

OBS = pd.DataFrame(
    {
        "tissue": pd.Categorical(["lung", None, "skin", "lung", "gut"]),
        "n": [1, 2, 3, 4, 5],
        "score": [0.5, np.nan, -1.0, 2.0, 0.0],
        "ok": [True, False, True, True, False],
        "maybe": pd.array([True, None, False, True, True], dtype="boolean"),
        "cell type": ["T", "B", None, "it's", "T"],
        "a-b.c/d": [1, 0, 1, 0, 1],
        "@x": [5, 4, 3, 2, 1],
    }
)


def mask(text: str) -> list[bool]:
    where = parse(text)
    return where.mask({c: OBS[c].array for c in where.columns}, len(OBS)).tolist()


@pytest.mark.parametrize(
    "text,want",
    [
        ("tissue == 'lung'", "10010"),
        ("tissue in ['lung', 'gut'] and n > 1", "00011"),
        ("tissue not in ('lung',) & n < 5", "01100"),
        ("n == 1 | n == 5", "10001"),
        ("not ok", "01001"),
        ("~ok", "01001"),
        ("maybe", "10011"),
        ("1 < n <= 3", "01100"),
        ("n % 2 == 1 and -n < -1", "00101"),
        ("(n + score) * 2 > 3", "00111"),
        ("score != score", "01000"),
        ("score == score", "10111"),
        ("`cell type` == 'T'", "10001"),
        ('`cell type` == "it\'s"', "00010"),
        ("`a-b.c/d` == 1 and `@x` >= 3", "10100"),
        ("`cell type` == 'a|b & `c` @d'", "00000"),
    ],
)
def test_masks(text: str, want: str) -> None:
    assert mask(text) == [c == "1" for c in want]


MISSING = {
    "category": pd.Categorical(["a", None, "b"]),
    "objects": np.array(["a", None, "b"], object),
    "objects with NaN": np.array(["a", np.nan, "b"], object),
    "string": pd.array(["a", None, "b"], dtype="string"),
    "float64": np.array([1, np.nan, 2]),
    "Float64": pd.array([1, None, 2], dtype="Float64"),
    "Int64": pd.array([1, None, 2], dtype="Int64"),
    "series": pd.Series([1, None, 2], dtype="Int32"),
    "boolean": pd.array([True, None, False], dtype="boolean"),
}
RULE = {
    "x == A": "100", "x != A": "011", "not x == A": "011", "not x != A": "100",
    "x in [A]": "100", "x not in [A]": "011", "not x in [A]": "011", "not x not in [A]": "100",
    "x == x": "101", "x != x": "010", "A == x": "100", "x != A and n == 2": "010",
    "x == A or n == 2": "110", "x in [A, B]": "101", "x not in [A, B]": "010",
}  # fmt: skip
ORDER = {
    "x < 2": "100",
    "x >= 2": "001",
    "not x < 2": "011",
    "0 < x < 2": "100",
    "x + 1 > 2": "001",
}


@pytest.mark.parametrize("column", MISSING)
def test_a_missing_value_equals_nothing(column: str) -> None:
    """One rule for all types of columns."""
    values = MISSING[column]
    is_number = not isinstance(values, pd.Categorical) and values.dtype.kind in "fi"
    a, b = ("True", "False") if column == "boolean" else ("1", "2") if is_number else ("'a'", "'b'")
    for rule, want in (RULE | (ORDER if is_number else {})).items():
        where = parse(rule.replace("A", a).replace("B", b))
        found = where.mask({"x": values, "n": np.array([1, 2, 3])}, 3)
        assert found.tolist() == [c == "1" for c in want], rule


def test_a_missing_truth_is_false() -> None:
    column = {"x": MISSING["boolean"], "n": np.ones(3)}
    rules = {"x": "100", "not x": "011", "x and n == 1": "100", "x or n == 1": "111"}
    for rule, want in rules.items():
        assert parse(rule).mask(column, 3).tolist() == [c == "1" for c in want], rule


@given(st.integers(-1, 6), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.booleans())
def test_masks_are_those_of_pandas(bound: int, sign: str, both: bool) -> None:
    text = f"n {sign} {bound}" + (" and ok or score > 0" if both else "")
    assert mask(text) == (OBS.eval(text)).tolist()


def test_columns_are_those_named_in_order() -> None:
    assert parse("b > 1 and `a x` == 'b' or b < c").columns == ("b", "a x", "c")


@pytest.mark.parametrize(
    "text,says",
    [
        ("n = 1", "can't be parsed"),
        ("n >", "can't be parsed"),
        ("", "can't be parsed"),
        ("`n > 1", "not allowed"),
        ("n > @limit", "'@' is not allowed"),
        ("n.max() > 3", "Call is not allowed"),
        ("abs(n) > 3", "Call is not allowed"),
        ("tissue.str == 'x'", "Attribute is not"),
        ("n.__class__ == 1", "Attribute is not"),
        ("n[0] > 1", "Subscript"),
        ("n ** 9 > 1", "Pow"),
        ("n is None", "Is"),
        ("[x for x in n]", "not allowed"),
        ("lambda: n", "not allowed"),
        ("n if ok else n", "not allowed"),
        ("(m := n) > 1", "not allowed"),
        ("f'{n}' == 'x'", "not allowed"),
        ("n == b'x'", "no text or number"),
        ("n == None", "no text or number"),
        ("1 == 1", "names no column"),
        ("n; import os", "can't be parsed"),
    ],
)
def test_what_is_no_expression_over_columns(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--where") as e:
        parse(text)
    assert says in str(e.value)


@pytest.mark.parametrize(
    "text", ["n", "score + 1", "tissue > 'lung'", "tissue < 3", "n + 'a' == 1"]
)
def test_expressions_that_do_not_fit_their_columns(text: str) -> None:
    with pytest.raises(ConfigError, match="--where") as e:
        mask(text)
    assert "_column_" not in str(e.value), "messages name the columns"


def test_what_columns_are_compared_with() -> None:
    where = parse("`cell type` == 'T' and n in [1, 2] or 'x' != tissue and score > 3 and ok == ok")
    assert sorted(where.compared, key=str) == [
        ("cell type", "T"), ("n", 1), ("n", 2), ("tissue", "x")
    ]  # fmt: skip


def test_the_option_is_named() -> None:
    with pytest.raises(ConfigError) as e:
        parse("n >", option="where")
    assert e.value.where == "where"


def test_no_rows() -> None:
    where = parse("tissue == 'lung' and n > 1")
    empty: dict[str, Any] = {"tissue": pd.Categorical([]), "n": np.zeros(0)}
    assert where.mask(empty, 0).tolist() == []

"""obs columns as labels: one set of categories over all inputs, numbers as numbers, missing as missing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_support import counts, key, quiet_pack, read_back, tree_sums, vocab_of, write

from scshards.base.errors import ConfigError, SourceError
from scshards.packing.labels import Label, read_label, unite

TEXTS = st.text(max_size=4) | st.sampled_from(["3", "a/b", "日本", "True", "nan", " "])
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, width=32)


def as_column(values: list[Any], form: str) -> Any:
    """Values (None is missing) as one of the arrays that anndata reads."""
    if form == "category":
        return pd.Categorical(values)
    if form == "string":
        return pd.array(values, dtype="string")
    if form == "object":
        return np.array([np.nan if v is None else v for v in values] + [None], object)[:-1]
    if form == "boolean":
        return pd.array(values, dtype="boolean")
    if form == "Int64":
        return pd.array(values, dtype="Int64")
    return np.array([np.nan if v is None else v for v in values], float)


@st.composite
def text_sources(draw: st.DrawFn) -> list[tuple[list[Any], str]]:
    """Some sources of one column that is text: categories, strings, objects, booleans."""
    out = []
    for _ in range(draw(st.integers(1, 4))):
        form = draw(st.sampled_from(["category", "string", "object", "boolean"]))
        values = st.booleans() if form == "boolean" else TEXTS
        out.append((draw(st.lists(st.none() | values, max_size=12)), form))
    return out


def labels_of(sources: list[tuple[list[Any], str]]) -> list[Label]:
    return [read_label(as_column(values, form)) for values, form in sources]


@settings(deadline=None)
@given(text_sources())
def test_categories_over_all_sources_are_those_of_pandas(
    sources: list[tuple[list[Any], str]],
) -> None:
    labels = labels_of(sources)
    info, maps = unite("c", [x.survey() for x in labels], [f"s{i}" for i in range(len(labels))])
    # pandas: put all columns end to end as text, and let it sort and number them.
    texts = pd.concat(
        [pd.Series([None if v is None else str(v) for v in s], dtype=object) for s, _ in sources]
    )
    want = pd.Categorical(texts)
    if len(want.categories):
        assert info.kind == "category" and list(info.categories) == sorted(want.categories)
    found = [
        np.append(m, -1)[x.values]
        for m, x in zip(maps, labels, strict=True)
        if x.kind == "category"
    ]
    names = [*info.categories, None]
    assert [names[code] for code in np.concatenate(found, dtype=int)] == [
        None if v is None else str(v)
        for (s, _), x in zip(sources, labels, strict=True) if x.kind == "category" for v in s
    ]  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.none() | NUMBERS, max_size=12), st.just("float"))
        | st.tuples(
            st.lists(st.none() | st.integers(-(2**53), 2**53), max_size=12), st.just("Int64")
        ),
        min_size=1,
        max_size=4,
    )
)
def test_numbers_stay_numbers(sources: list[tuple[list[Any], str]]) -> None:
    labels = labels_of(sources)
    info, _ = unite("n", [x.survey() for x in labels], ["s"] * len(labels))
    assert info.kind == "number" and info.categories == ()
    for label, (values, _) in zip(labels, sources, strict=True):
        want = pd.to_numeric(pd.Series(values, dtype=object)).astype(float)
        assert label.kind == "number"
        np.testing.assert_array_equal(label.values, want.to_numpy())
        np.testing.assert_array_equal(label.missing, want.isna())


@settings(deadline=None)
@given(text_sources(), st.data())
def test_only_the_chosen_rows_count(
    sources: list[tuple[list[Any], str]], data: st.DataObject
) -> None:
    for label, (values, _) in zip(labels_of(sources), sources, strict=True):
        rows = np.array(
            data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))), bool
        )
        only = label.only(rows)
        chosen = [str(v) for v, r in zip(values, rows, strict=True) if r and v is not None]
        assert list(only.categories) == sorted(set(chosen))
        names = [*only.categories, None]
        assert [names[c] for c in only.values.tolist()] == [
            str(v) if r and v is not None else None for v, r in zip(values, rows, strict=True)
        ]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "column",
    [pd.Categorical(["a", "b"]), pd.Categorical([1, 2]), np.array([True, False]), np.array(["1", "2"], object)],
    ids=["category", "category of numbers", "bool", "text of numbers"],
)  # fmt: skip
def test_text_in_one_source_and_numbers_in_another(column: Any, order: tuple[int, int]) -> None:
    labels = [read_label(column), read_label(np.array([1.0, 2.0]))]
    with pytest.raises(SourceError, match="holds numbers in s1 and text in s0"):
        unite("c", [labels[i].survey() for i in order], [f"s{i}" for i in order])


def test_a_column_without_any_value_fits_both_kinds() -> None:
    nothing = read_label(np.full(3, np.nan)).survey()
    for other in (read_label(np.array([1.5])), read_label(pd.Categorical(["a"]))):
        for both in ([nothing, other.survey()], [other.survey(), nothing]):
            info, maps = unite("c", both, ["s0", "s1"])
            assert info.kind == other.kind and info.categories == other.categories
            assert [len(m) for m in maps] == [len(s.categories) for s in both]


@pytest.mark.parametrize(
    "column",
    [
        np.array(["2020-01-01"], "M8[ns]"),
        np.array([3], "m8[s]"),
        np.array([1j]),
        np.array([{"a": 1}], object),
        pd.period_range("2020-01", periods=1, freq="M").array,
    ],
    ids=lambda c: str(getattr(c, "dtype", "")),
)
def test_what_is_no_label(column: Any) -> None:
    with pytest.raises(SourceError, match="text, booleans and numbers"):
        read_label(column, where="file: obs")


@pytest.mark.parametrize("worst", [2**53 + 1, -(2**53) - 1, 2**63 + 5])
def test_whole_numbers_that_a_float_can_not_hold(worst: int) -> None:
    dtype = np.uint64 if worst > 2**63 else np.int64
    assert read_label(np.array([2**53], dtype)).values[0] == 2**53
    with pytest.raises(SourceError, match=r"beyond 2\^53"):
        read_label(np.array([1, worst], dtype))


def test_a_hundred_thousand_categories_are_fast() -> None:
    n, sources = 100_000, 10
    names = np.array([f"cell type/{i:06d} é" for i in range(n)], object)
    orders = [np.random.default_rng(i).permutation(n) for i in range(sources // 2)]
    start = time.process_time()
    labels = [
        read_label(pd.Categorical.from_codes(orders[i // 2], names)).only(np.arange(n) % 2 == i % 2)
        for i in range(sources)
    ]
    info, maps = unite("c", [x.survey() for x in labels], [""] * sources)
    seconds = time.process_time() - start
    assert info.categories == tuple(names) and all(len(m) == n // 2 for m in maps)
    assert seconds < 60, "about 1 s of processor time; many hours if each looked for each"


def test_labels_of_a_pack_do_not_depend_on_workers(tmp_path: Path) -> None:
    """Unicode and slashes in names and values, kinds of all sorts, a column empty in one file."""
    columns: list[dict[str, Any]] = [
        {
            "type": pd.Categorical(["T/αβ", None, "B", "日本"]),
            "age": pd.array([3, None, 5, 2**53], dtype="Int64"),
            "ok": pd.array([True, None, False, True], dtype="boolean"),
            "note é": ["x", "", "x", "a b"],
            "size": np.full(4, np.nan),
        },
        {
            "type": pd.Categorical(["B", "A", None, "T/αβ"]),
            "age": np.array([0.5, 1, np.nan, 2], np.float32),
            "ok": [True, True, False, False],
            "note é": pd.Categorical(["y", "x", "", "y"]),
            "size": pd.Categorical(["big", "small", None, "big"]),
        },
    ]
    inputs = [
        write(tmp_path / f"{i}.h5ad", counts(4, 5, seed=i), obs=c) for i, c in enumerate(columns)
    ]
    options: dict[str, Any] = {"obs": tuple(columns[0])}
    manifest = quiet_pack(inputs, tmp_path / "one", vocab_of(5), **options)
    quiet_pack(inputs, tmp_path / "two", vocab_of(5), workers=2, **options)
    assert tree_sums(tmp_path / "one") == tree_sums(tmp_path / "two")
    found = read_back(tmp_path / "one")
    for name in columns[0]:
        info = manifest.labels[name]
        both = pd.concat([pd.Series(c[name], dtype=object) for c in columns])
        got = [found[key(s, r)].labels[name] for s in range(2) for r in range(4)]
        if info.kind == "number":
            np.testing.assert_array_equal(
                got, pd.to_numeric(both.where(both.notna())).astype(float)
            )
            continue
        want = both.map(str, na_action="ignore")
        assert list(info.categories) == sorted(want.dropna().unique())
        assert [info.categories[c] if c >= 0 else None for c in got] == want.where(
            want.notna(), None
        ).tolist()
    assert [c.kind for c in manifest.labels.values()] == [
        "category",
        "number",
        "category",
        "category",
        "category",
    ]


def test_a_column_with_a_value_in_each_cell_is_no_label(tmp_path: Path) -> None:
    barcodes = [f"b{i}" for i in range(30)]
    paths = [
        write(
            tmp_path / f"{n}.h5ad",
            counts(15, 6, seed=n),
            obs={"barcode": barcodes[15 * n : 15 * n + 15]},
        )
        for n in range(2)
    ]
    for inputs, most, found in ((paths, 14, 15), (paths, 29, 30)):
        with pytest.raises(ConfigError, match=f"{found} different values") as refused:
            quiet_pack(inputs, tmp_path / "out", vocab_of(6), obs=("barcode",), max_categories=most)
        assert "--max-categories" in str(refused.value) and not (tmp_path / "out").exists()
    manifest = quiet_pack(paths, tmp_path / "out", vocab_of(6), obs=("barcode",), max_categories=30)
    assert len(manifest.labels["barcode"].categories) == 30
    assert "max_categories" not in manifest.options

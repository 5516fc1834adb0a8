"""Rows to tokens against a dense formula; every fault of a value is an error that names its place."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base.errors import SourceError, ValueKindError
from scshards.cells.tokenizer import GeneMatch, TokenRows, dense_to_csr, match_genes
from scshards.cells.vocab import Vocab
from scshards.shards.members import decode_rows, pack_block

VOCAB = Vocab([f"G{i}" for i in range(130)] + ["<pad>", "<cls>", "<eoc>"])
KINDS: list[Literal["counts", "float"]] = ["counts", "float"]

Csr = tuple[np.ndarray, np.ndarray, np.ndarray]


def tokenize_rows(
    indptr: Any, indices: Any, data: Any, match: GeneMatch, kind: Any, **more: Any
) -> TokenRows:
    """What the members of the rows hold."""
    indptr = np.asarray(indptr, np.int64)
    members, ends = pack_block(indptr, indices, data, match, kind, **more)
    sizes = np.diff(ends, prepend=0)
    rows, _, status = decode_rows(members, ends - sizes, sizes, match.n_tokens, kind)
    assert not status.any()
    return rows


def csr(rows: list[list[tuple[int, Any]]], dtype: Any = np.float32) -> Csr:
    """indptr, indices, data of rows that are lists of (column, value)."""
    indptr = np.cumsum([0] + [len(r) for r in rows])
    flat = [entry for row in rows for entry in row]
    return indptr, np.array([c for c, _ in flat], np.int32), np.array([v for _, v in flat], dtype)


def dense_tokens(rows: list[list[tuple[int, float]]], tokens: np.ndarray, n: int) -> np.ndarray:
    """[cells, tokens]: the sum over the columns of each token."""
    out = np.zeros((len(rows), n))
    for i, row in enumerate(rows):
        for column, value in row:
            if tokens[column] >= 0:
                out[i, tokens[column]] += value
    return out


def check(rows: TokenRows, dense: np.ndarray) -> None:
    assert len(rows.indptr) - 1 == len(dense) and rows.indptr[0] == 0
    assert len(rows.genes) == len(rows.values) == rows.indptr[-1]
    for i, expected in enumerate(dense):
        part = slice(rows.indptr[i], rows.indptr[i + 1])
        assert rows.genes[part].tolist() == np.flatnonzero(expected).tolist()
        assert rows.values[part].tolist() == expected[np.flatnonzero(expected)].tolist()


@st.composite
def matrices(draw: st.DrawFn, *, merged: bool) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Gene columns, some unknown, some sharing a token if `merged`; rows unsorted, with zeros."""
    n = draw(st.integers(1, 40))
    gene = st.one_of(st.integers(0, 129).map("G{}".format), st.just("unknown"), st.just("<cls>"))
    names = draw(st.lists(gene, min_size=n, max_size=n))
    if not merged:
        names = [name if names.index(name) == i else f"u{i}" for i, name in enumerate(names)]
    value = st.one_of(st.integers(0, 3), st.integers(0, 2**20))
    entry = st.tuples(st.integers(0, n - 1), value)
    unique = None if merged else (lambda e: e[0])
    rows = draw(st.lists(st.lists(entry, max_size=30, unique_by=unique), max_size=8))
    return names, rows


@given(matrices(merged=True), st.sampled_from([np.float64, np.float32, np.int64, np.uint32]))
def test_counts_add_up_over_shared_tokens(matrix: Any, dtype: Any) -> None:
    names, rows = matrix
    match = match_genes(names, VOCAB)
    out = tokenize_rows(*csr(rows, dtype), match, "counts")
    assert out.values.dtype == np.uint64 and out.genes.dtype == np.int32
    check(out, dense_tokens(rows, match.tokens, len(VOCAB)))


@given(matrices(merged=False), st.integers(1, 64))
def test_float_values_stay(matrix: Any, divisor: int) -> None:
    names, rows = matrix
    rows = [[(c, float(np.float32(v / divisor))) for c, v in row] for row in rows]
    match = match_genes(names, VOCAB)
    out = tokenize_rows(*csr(rows, np.float64), match, "float")
    assert out.values.dtype == np.float32
    check(out, dense_tokens(rows, match.tokens, len(VOCAB)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype",
    ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">f4", ">i4", ">i8"],
)
def test_dtypes(dtype: str, kind: Literal["counts", "float"]) -> None:
    rows = [[(2, 1), (0, 1)], [], [(1, 1)]]
    match = match_genes(["G5", "G1", "G129"], VOCAB)
    out = tokenize_rows(*csr(rows, np.dtype(dtype)), match, kind)
    check(out, dense_tokens(rows, match.tokens, len(VOCAB)))


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64, np.uint32])
def test_a_slice_of_a_matrix(index_dtype: Any) -> None:
    """indptr may begin anywhere: the rows of a block of a file, as h5py reads them."""
    rows = [[(0, 1)], [(1, 2), (0, 3)], [(1, 4)]]
    indptr, indices, data = csr(rows)
    match = match_genes(["G1", "G0"], VOCAB)
    out = tokenize_rows(
        indptr[1:].astype(index_dtype), indices[1:].astype(index_dtype), data[1:], match, "counts"
    )
    check(out, dense_tokens(rows[1:], match.tokens, len(VOCAB)))


def test_strided_input_is_read_right() -> None:
    indptr, indices, data = csr([[(0, 1), (1, 2)]])
    match = match_genes(["G0", "G1"], VOCAB)
    doubled = np.repeat(data, 2)[::2]
    assert not doubled.flags.c_contiguous
    out = tokenize_rows(indptr, np.repeat(indices, 2)[::2], doubled, match, "counts")
    assert out.values.tolist() == [1, 2]


def test_large_counts_are_exact() -> None:
    match = match_genes(["G0", "G1"], VOCAB)
    big = 2**62 + 1
    out = tokenize_rows(*csr([[(0, big), (1, 2**53 + 1)]], np.int64), match, "counts")
    assert out.values.tolist() == [big, 2**53 + 1]


def test_no_rows_and_empty_rows() -> None:
    match = match_genes(["G0"], VOCAB)
    for n in (0, 1, 3):
        out = tokenize_rows(*csr([[]] * n), match, "counts")
        assert out.indptr.tolist() == [0] * (n + 1) and out.genes.shape == (0,)


def test_match_genes() -> None:
    names = ["G3", "unknown", "G1", "G3", "<pad>", "G3"]
    match = match_genes(names, VOCAB)
    assert match.tokens.tolist() == [3, -1, 1, 3, -1, 3] and match.tokens.dtype == np.int32
    assert (match.matched, match.unmatched, match.merged) == (4, 2, 2)
    assert match.n_tokens == len(VOCAB)


@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), max_size=6),
    st.sampled_from([np.int32, np.float64]),
)
def test_dense_to_csr(block: list[list[int]], dtype: Any) -> None:
    array = np.array(block, dtype).reshape(-1, 4)
    indptr, indices, data = dense_to_csr(array)
    rebuilt = np.zeros_like(array)
    for i in range(len(array)):
        for j in range(indptr[i], indptr[i + 1]):
            rebuilt[i, indices[j]] = data[j]
    assert (rebuilt == array).all() and (data != 0).all() and data.dtype == array.dtype
    assert indptr.dtype == np.int64 and indices.dtype == np.int32


def test_dense_to_csr_keeps_nan() -> None:
    _, columns, data = dense_to_csr(np.array([[0.0, np.nan]]))
    assert columns.tolist() == [1] and np.isnan(data).all()


# --- faults ----------------------------------------------------------------------------------

FAULTS = [
    ("counts", -1.0, "is negative", "--layer"),
    ("float", -0.5, "is negative", "--layer"),
    ("counts", np.nan, "not a number", "--layer"),
    ("float", np.nan, "not a number", "--layer"),
    ("counts", np.inf, "is infinite", "--layer"),
    ("float", np.inf, "is infinite", "--layer"),
    ("counts", -np.inf, "is negative", "--layer"),
    ("counts", 1.5, "not a whole number", "--values float"),
    ("counts", 1e-300, "not a whole number", "--values float"),
    ("counts", 1e19, "too large for a count", "--layer"),
    ("counts", 2.0**63, "too large for a count", "--layer"),
    ("float", 1e39, "too large or too small for a float32", "--layer"),
    ("float", 1e-46, "too large or too small for a float32", "--layer"),
]


@pytest.mark.parametrize(("kind", "value", "what", "advice"), FAULTS)
@pytest.mark.parametrize("column", [0, 2], ids=["matched", "unmatched"])
def test_bad_values(
    kind: Literal["counts", "float"], value: float, what: str, advice: str, column: int
) -> None:
    match = match_genes(["G0", "G1", "unknown"], VOCAB)
    rows = csr([[(1, 1)], [(1, 2), (column, value)], [(0, -3)]], np.float64)
    with pytest.raises(ValueKindError) as caught:
        tokenize_rows(*rows, match, kind, first_row=100, where="a.h5ad")
    assert what in caught.value.what and str(value) in caught.value.what
    assert caught.value.where == f"a.h5ad: row 101, column {column}"
    assert advice in str(caught.value.advice)


def test_a_huge_unsigned_count() -> None:
    match = match_genes(["G0"], VOCAB)
    with pytest.raises(ValueKindError, match="too large for a count"):
        tokenize_rows(*csr([[(0, 2**63)]], np.uint64), match, "counts", where="a.h5ad")


def test_float_values_can_not_be_added_up() -> None:
    match = match_genes(["G0", "G1", "G0"], VOCAB)
    fine = tokenize_rows(*csr([[(0, 1.5)], [(2, 2.5)]]), match, "float")
    assert fine.values.tolist() == [1.5, 2.5]
    with pytest.raises(ValueKindError, match="share a token") as caught:
        tokenize_rows(*csr([[(0, 1.5)], [(0, 1.5), (2, 2.5)]]), match, "float", where="a.h5ad")
    assert caught.value.where == "a.h5ad: row 1"


@pytest.mark.parametrize("dtype", [np.complex128, object, "U4", "M8[s]"])
def test_values_that_are_no_numbers(dtype: Any) -> None:
    match = match_genes(["G0"], VOCAB)
    data = np.zeros(1, dtype)
    with pytest.raises(ValueKindError, match="are not numbers"):
        tokenize_rows(np.array([0, 1]), np.array([0]), data, match, "counts")


@pytest.mark.parametrize("column", [2, -1, 2**31 - 1])
def test_columns_that_there_are_not(column: int) -> None:
    indptr, indices, data = csr([[(0, 1), (1, 2)], [(1, 3)]])
    indices[1] = column
    with pytest.raises(SourceError) as caught:
        tokenize_rows(
            indptr, indices, data, match_genes(["G0", "G1"], VOCAB), "counts", where="a.h5ad"
        )
    assert not isinstance(caught.value, ValueKindError)
    assert "damaged" in str(caught.value.advice) and "a.h5ad" in str(caught.value.where)

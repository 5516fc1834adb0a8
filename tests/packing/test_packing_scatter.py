"""Pass 1: the one kernel against plain numpy; who is left out, and why."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_support import adata, counts, quiet_pack, read_back, vocab_of
from plain_tokens import tokenized

from scshards.base.errors import ValueKindError
from scshards.cells.tokenizer import (
    LARGEST,
    GeneMatch,
    Workspace,
    kernel_values,
)
from scshards.kernels import rows as kernels
from scshards.shards.members import encode_labels, encode_rows

N_TOKENS = 150
LIMITLESS = (0, 1 << 62, 0.0)


def match_of(tokens: list[int]) -> GeneMatch:
    return GeneMatch(tokens=np.array(tokens, np.int32), n_tokens=N_TOKENS)


@st.composite
def blocks(draw: st.DrawFn, *, as_counts: bool) -> tuple[GeneMatch, Any, list[int]]:
    """A match, the CSR arrays of some rows, and which of the rows are packed."""
    n = draw(st.integers(1, 60))
    token = st.integers(-1, N_TOKENS - 1)
    tokens = draw(st.lists(token, min_size=n, max_size=n, unique=not as_counts and n < 100))
    if as_counts:
        dtype = np.dtype(
            draw(st.sampled_from(["f4", "f8", "i4", "i8", "u1", "u2", "u4", "u8", "?"]))
        )
        top = {"f": 2**24, "i": 2**31 - 1, "u": 2**8 - 1, "b": 1}[dtype.kind]
        top = 2**62 if dtype.itemsize == 8 and dtype.kind != "f" else top
        value = st.one_of(st.integers(0, min(3, top)), st.integers(0, top))
    else:
        dtype = np.dtype(draw(st.sampled_from(["f4", "f8"])))
        value = st.one_of(st.just(0), st.floats(2.0**-100, 2.0**100, width=32))
    entry = st.tuples(st.integers(0, n - 1), value)
    unique = None if as_counts else (lambda e: e[0])
    rows = draw(st.lists(st.lists(entry, max_size=40, unique_by=unique), min_size=1, max_size=8))
    indptr = np.cumsum([draw(st.integers(0, 5))] + [len(r) for r in rows])
    indices = np.array([c for r in rows for c, _ in r], np.int32)
    data = np.array([v for r in rows for _, v in r], dtype)
    chosen = draw(st.sets(st.integers(0, len(rows) - 1)))
    return match_of(tokens), (indptr, indices, data), sorted(chosen)


def taken(csr: Any, rows: list[int]) -> Any:
    """CSR arrays of some rows, in plain Python."""
    indptr, indices, data = csr
    parts = [slice(indptr[r] - indptr[0], indptr[r + 1] - indptr[0]) for r in rows]
    lengths = [p.stop - p.start for p in parts]
    return (
        np.cumsum([0, *lengths]),
        np.concatenate([indices[:0], *(indices[p] for p in parts)]),
        np.concatenate([data[:0], *(data[p] for p in parts)]),
    )


def run(match: GeneMatch, csr: Any, rows: list[int], kind: Any, labels: Any, size: int) -> Any:
    """All members, and what the kernel says of each cell; the buffer is emptied when it is full."""
    indptr, indices, given = csr
    data = kernel_values(given)
    work = Workspace(match, kind)
    values = np.empty(len(work.tokens), work.scratch.dtype)
    label_bytes, label_ends = encode_labels(labels, len(rows))
    sizes, n_genes = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    totals, fates = np.zeros(len(rows)), np.zeros(len(rows), np.int8)
    out, members, unmatched, first = np.empty(size, np.uint8), [], 0, 0
    while True:
        status, stop, at, end, lost = kernels.pack_rows(
            indptr.astype(np.int64), indices, data, LARGEST[data.dtype.kind],
            np.array(rows, np.int64), first, work.slots, kind == "counts", run.limits, label_bytes,
            label_ends, work.scratch, work.bits, work.tokens, values, out, 0, sizes, n_genes,
            totals, fates,
        )  # fmt: skip
        members.append(out[:end].tobytes())
        unmatched += lost
        assert status <= 0 and at == 0
        if status == 0:
            return b"".join(members), sizes, n_genes, totals, fates, unmatched
        if stop == first:
            out = np.empty(2 * len(out), np.uint8)
        first = stop


run.limits = LIMITLESS  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["counts", "float"])
@settings(deadline=None)
@given(drawn=st.data(), with_labels=st.booleans(), size=st.sampled_from([70, 1000, 100_000]))
def test_one_kernel_is_plain_numpy_and_encode_rows(
    drawn: st.DataObject, kind: Any, with_labels: bool, size: int
) -> None:
    match, csr, rows = drawn.draw(blocks(as_counts=kind == "counts"))
    labels = {}
    if with_labels:
        labels = {"donor": np.array(rows, np.int64) - 1, "age": np.array(rows) / 3}
    tokens, lost = tokenized(*taken(csr, rows), match, kind)
    expected, ends = encode_rows(tokens, labels)
    members, sizes, n_genes, totals, fates, unmatched = run(match, csr, rows, kind, labels, size)
    assert members == expected.tobytes()
    assert sizes.tolist() == np.diff(ends, prepend=0).tolist()
    assert n_genes.tolist() == np.diff(tokens.indptr).tolist()
    for i, (a, b) in enumerate(itertools.pairwise(tokens.indptr)):
        # Added up one by one, in the order of the genes, as floats: the same on any machine.
        # Python's own `sum` makes up for rounding since 3.12.
        total = 0.0
        for value in tokens.values[a:b].tolist():
            total += value
        assert totals[i] == total
    assert not fates.any() and unmatched == lost


@settings(deadline=None)
@given(
    drawn=st.data(), least=st.integers(0, 6), most=st.integers(0, 9), least_sum=st.integers(0, 99)
)
def test_the_first_reason_that_applies(
    drawn: st.DataObject, least: int, most: int, least_sum: int
) -> None:
    match, csr, rows = drawn.draw(blocks(as_counts=True))
    run.limits = (least, most, float(least_sum))  # type: ignore[attr-defined]
    try:
        members, sizes, n_genes, totals, fates, _ = run(match, csr, rows, "counts", {}, 1000)
    finally:
        run.limits = LIMITLESS  # type: ignore[attr-defined]
    for n, total, fate in zip(n_genes, totals, fates, strict=True):
        assert fate == (1 if n < least else 2 if n > most else 3 if total < least_sum else 0)
    kept = [r for r, fate in zip(rows, fates, strict=True) if not fate]
    expected, _ = encode_rows(tokenized(*taken(csr, kept), match, "counts")[0])
    assert members == expected.tobytes() and sizes[fates == 0].sum() == len(members)


def test_counts_above_2_to_the_32_and_cells_with_any_number_of_genes(tmp_path: Path) -> None:
    """Every width of a head and of a varint: 70,000 genes, counts from 1 to 2^62."""
    sizes = [0, 1, 120, 127, 128, 200, 255, 256, 300, 32_000, 40_000, 65_535, 65_536, 70_000]
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.choice(70_000, n, replace=False)) for n in sizes]
    values = [2 ** rng.integers(0, 63, n) for n in sizes]
    indptr = np.cumsum([0, *sizes])
    match = GeneMatch(tokens=rng.permutation(70_000).astype(np.int32), n_tokens=70_000)
    csr = indptr, np.concatenate(rows).astype(np.int32), np.concatenate(values)
    expected, _ = encode_rows(tokenized(*csr, match, "counts")[0])
    members, *_ = run(match, csr, list(range(len(sizes))), "counts", {}, 100)
    assert members == expected.tobytes()


# --- through pack -----------------------------------------------------------------------------


def test_cells_are_left_out_for_one_reason_each(tmp_path: Path) -> None:
    x = np.zeros((6, 8), np.float32)
    for row, (genes, value) in enumerate([(0, 0), (1, 9), (2, 1), (3, 1), (3, 2), (5, 9)]):
        x[row, :genes] = value
    adata(sp.csr_matrix(x)).write_h5ad(tmp_path / "a.h5ad")
    manifest = quiet_pack(
        tmp_path / "a.h5ad",
        tmp_path / "out",
        vocab_of(8),
        min_genes=2,
        max_genes=4,
        min_counts=2.5,
    )
    source = manifest.sources[0]
    assert source.dropped == {
        "fewer than 2 genes": 2,
        "more than 4 genes": 1,
        "fewer than 2.5 counts": 1,
    }
    assert source.kept == 2 and sorted(read_back(tmp_path / "out")) == [
        "000000-0000000003",
        "000000-0000000004",
    ]


def test_limits_of_whole_numbers_have_no_point(tmp_path: Path) -> None:
    adata(sp.csr_matrix(counts(20, 8))).write_h5ad(tmp_path / "a.h5ad")
    manifest = quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(8), min_counts=100.0)
    assert list(manifest.sources[0].dropped) == ["fewer than 100 counts"]


def test_a_cell_larger_than_the_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adata(sp.csr_matrix(counts(40, 30))).write_h5ad(tmp_path / "a.h5ad")
    quiet_pack(tmp_path / "a.h5ad", tmp_path / "whole", vocab_of(30), cells_per_shard=7)
    monkeypatch.setattr("scshards.shards.spill.RUN_BYTES", 10)
    monkeypatch.setattr("scshards.shards.spill.PIECE_BYTES", 10)
    quiet_pack(tmp_path / "a.h5ad", tmp_path / "cut", vocab_of(30), cells_per_shard=7)
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (
            path.read_bytes()
            == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()
        )


def test_the_row_of_a_bad_value_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were left out before it, and blocks, shift no number."""
    x = counts(50, 10)
    x[7], x[33, 4] = -1, 1.5
    adata(sp.csr_matrix(x), obs={"n": np.arange(50)}).write_h5ad(tmp_path / "a.h5ad")
    # As if the survey's sample had missed it.
    monkeypatch.setattr("scshards.packing.survey.check_values", lambda *a: (None, None, False))
    monkeypatch.setattr("scshards.packing.scatter.BLOCK_VALUES", 40)
    with pytest.raises(ValueKindError) as caught:
        quiet_pack(
            tmp_path / "a.h5ad", tmp_path / "out", vocab_of(10), where="n != 7 and n % 2 == 1"
        )
    assert caught.value.what == "the value 1.5 is not a whole number"
    assert str(caught.value.where).endswith("a.h5ad: X: row 33, column 4")

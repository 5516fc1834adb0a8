"""scGPT's bins against its own digits, its worked example, and a definition by counting."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_bins import bin_edges, bin_values

from scshards.base import seeds

GOLDEN = Path(__file__).parents[1] / "golden" / "binning.npz"
COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def counted(values: list[int], n_bins: int) -> list[tuple[int, int]]:
    """(edges below, edges up to) each value, with exact fractions: bins are in (below, up to]."""
    ranked = sorted(values)
    edges = []
    for i in range(n_bins - 1):
        at = Fraction(i, n_bins - 2) * (len(ranked) - 1) if n_bins > 2 else Fraction(0)
        low = ranked[math.floor(at)]
        high = ranked[math.ceil(at)]
        edges.append(low + (high - low) * (at - math.floor(at)))
    return [(sum(e < v for e in edges), sum(e <= v for e in edges)) for v in values]


def test_reference_digits() -> None:
    golden = np.load(GOLDEN)
    indptr, values, bins = golden["indptr"], golden["values"], golden["bins"]
    assert len(indptr) > 50
    for a, b in itertools.pairwise(indptr):
        assert bin_values(values[a:b], 51).tolist() == bins[a:b].tolist()


def test_worked_example_ties_high() -> None:
    values = np.array([1, 1, 1, 1, 1, 2, 2, 3, 7])
    assert bin_values(values, 51).tolist() == [25, 25, 25, 25, 25, 37, 37, 43, 50]
    assert bin_values(np.array([4, 4, 4]), 51).tolist() == [50, 50, 50]


def test_worked_example_ties_at_random() -> None:
    values = np.array([1, 1, 1, 1, 1, 2, 2, 3, 7])
    seen: list[set[int]] = [set() for _ in values]
    for trial in range(2000):
        u = 1 - seeds.uniforms(seeds.key(0, "ties", trial), np.arange(len(values)))
        for found, digit in zip(seen, bin_values(values, 51, u).tolist(), strict=True):
            found.add(digit)
    for j in range(5):
        assert seen[j] == set(range(1, 26))
    for j in (5, 6):
        assert seen[j] == set(range(32, 38))
    assert seen[7] == {43} and seen[8] == {50}


@given(COUNTS, st.integers(2, 60))
def test_ties_high_by_counting(values: list[int], n_bins: int) -> None:
    # Fractions are exact where numpy's quantiles are rounded: compare where no edge is that close.
    exact = counted(values, n_bins)
    edges = bin_edges(np.array(values), n_bins)
    for v, digit, (_, up_to) in zip(
        values, bin_values(np.array(values), n_bins).tolist(), exact, strict=True
    ):
        close = np.abs(edges - v)
        if not ((close > 0) & (close < 1e-9)).any():
            assert digit == up_to
        assert 1 <= digit <= n_bins - 1


@given(COUNTS, st.integers(2, 60), st.integers(0, 2**64 - 1))
def test_random_ties_lie_between(values: list[int], n_bins: int, key: int) -> None:
    array = np.array(values)
    edges = bin_edges(array, n_bins)
    u = 1 - seeds.uniforms(key, np.arange(len(values)))
    for v, digit in zip(values, bin_values(array, n_bins, u).tolist(), strict=True):
        below, up_to = int((edges < v).sum()), int((edges <= v).sum())
        assert below <= digit <= up_to
        assert digit > below or below == up_to
    # The two ends of the draw: the highest bin of the run at 1, the lowest just above 0.
    assert (
        bin_values(array, n_bins, np.ones(len(values))).tolist()
        == bin_values(array, n_bins).tolist()
    )


def test_random_ties_are_even() -> None:
    n = 100_000
    u = 1 - seeds.uniforms(seeds.key(0, "even"), np.arange(n))
    digits = bin_values(np.full(n, 3), 51, u)
    counts = np.bincount(digits, minlength=51)
    assert counts[0] == 0 and len(counts) == 51
    chi2 = ((counts[1:] - n / 50) ** 2 / (n / 50)).sum()
    assert chi2 < 85.4  # the 0.1% point of chi-squared with 49 degrees of freedom


@pytest.mark.parametrize("dtype", [np.uint64, np.int32, np.float32, np.float64])
def test_dtypes(dtype: type) -> None:
    values = np.array([5, 1, 9, 1], dtype)
    digits = bin_values(values, 11)
    assert (
        digits.dtype == np.int64
        and digits.tolist() == bin_values(np.array([5, 1, 9, 1]), 11).tolist()
    )


def test_no_values() -> None:
    assert bin_values(np.zeros(0, np.uint64), 51).shape == (0,)


def test_order_is_kept_and_equal_values_get_equal_bins() -> None:
    values = np.random.default_rng(0).integers(1, 20, 500)
    digits = bin_values(values, 51)
    for v in np.unique(values):
        assert len(set(digits[values == v].tolist())) == 1
    order = np.argsort(values, kind="stable")
    assert (np.diff(digits[order]) >= 0).all()

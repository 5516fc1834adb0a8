"""report.entropy: the formula of a random batch's entropy against drawing such batches."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.report.entropy import entropy, expected_entropy

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def plainly(labels) -> float:
    """The entropy of a list of labels, by its definition."""
    n = len(labels)
    return -sum(labels.count(c) / n * math.log2(labels.count(c) / n) for c in sorted(set(labels)))


@given(COUNTS)
def test_entropy_is_its_definition(counts):
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    assert entropy(np.array(counts)) == pytest.approx(plainly(labels), abs=1e-12)


def test_entropy_of_rows_and_of_nothing():
    found = entropy(np.array([[1, 1, 0], [2, 0, 0], [0, 0, 0], [5, 5, 5]]))
    assert found.tolist() == pytest.approx([1, 0, 0, math.log2(3)])
    assert not np.signbit(found).any()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any), st.data())
def test_the_expectation_is_the_mean_over_all_draws(counts, data):
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    n = data.draw(st.integers(1, min(len(labels), 4)))
    draws = [
        plainly([labels[i] for i in places])
        for places in product(range(len(labels)), repeat=n)
        if len(set(places)) == n
    ]
    assert expected_entropy(np.array(counts), n) == pytest.approx(sum(draws) / len(draws))


@given(COUNTS)
def test_one_cell_and_all_cells(counts):
    counts = np.array(counts)
    assert expected_entropy(counts, 1) == pytest.approx(0, abs=1e-12)
    assert expected_entropy(counts, int(counts.sum())) == pytest.approx(entropy(counts), abs=1e-9)


@pytest.mark.parametrize(
    ("counts", "n"),
    [
        ([5000, 300, 20, 1], 64),
        ([60_000, 60_000], 2048),
        (np.random.default_rng(0).integers(1, 500, 300), 64),
        ([10**8, 1], 16),
        ([64, 1], 64),
    ],
)
def test_the_expectation_is_what_a_simulation_finds(counts, n):
    rng = np.random.default_rng(1)
    drawn = rng.multivariate_hypergeometric(counts, n, size=4000, method="marginals")
    simulated = entropy(drawn)
    error = simulated.std() / math.sqrt(len(simulated))
    assert expected_entropy(np.array(counts), n) == pytest.approx(
        simulated.mean(), abs=5 * error + 1e-6
    )

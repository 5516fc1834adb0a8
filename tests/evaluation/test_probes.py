"""Probes of embeddings against scikit-learn's own, and against votes counted one by one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from scshards.evaluation.probes import RIDGE, K, linear, nearest


def vectors(n: int, kinds: int, *, seed: int, noise: float, d: int = 12):
    """Unit vectors around one centre for each code."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(kinds, d))
    codes = rng.integers(0, kinds, n)
    x = centres[codes] + rng.normal(0, noise, (n, d))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return x, codes


@pytest.mark.parametrize("kinds", [2, 5])
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_neighbours_and_the_linear_map_are_scikit_learns(kinds, noise):
    train, codes = vectors(300, kinds, seed=1, noise=noise)
    cells, truth = vectors(1100, kinds, seed=2, noise=noise)  # more than are looked at together
    knn = KNeighborsClassifier(K, metric="cosine", algorithm="brute").fit(train, codes)
    assert nearest(train, codes, cells).tolist() == knn.predict(cells).tolist()
    scaled = StandardScaler().fit(train.astype(np.float64))
    ridge = RidgeClassifier(RIDGE * len(train), solver="cholesky")
    ridge.fit(scaled.transform(train), codes)
    expected = ridge.predict(scaled.transform(cells))
    assert np.mean(linear(train, codes, cells) == expected) == 1.0
    for found in (nearest, linear):
        right = np.mean(found(train, codes, cells) == truth)
        assert right > (0.95 if noise < 1 else 1.2 / kinds)


def test_neighbours_vote_one_by_one():
    train, codes = vectors(60, 3, seed=3, noise=1.5)
    cells, _ = vectors(20, 3, seed=4, noise=1.5)
    codes[codes == 2] = 7  # codes need not be without gaps
    expected = []
    for cell in cells.astype(float):
        far = sorted((-float(cell @ t), i) for i, t in enumerate(train.astype(float)))
        votes = Counter(int(codes[i]) for _, i in far[:K])
        expected.append(min(votes, key=lambda c: (-votes[c], c)))
    assert nearest(train, codes, cells).tolist() == expected
    assert set(linear(train, codes, cells).tolist()) <= {0, 1, 7}


def test_few_cells_and_dimensions_without_variance():
    train = np.array([[1, 0, 0], [0, 1, 0], [0.8, 0.6, 0]], np.float32)
    codes = np.array([4, 1, 4])
    assert nearest(train, codes, train).tolist() == [4, 4, 4], "all three vote"
    assert linear(train, codes, train).tolist() == codes.tolist()

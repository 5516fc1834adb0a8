"""Integration scores against formulas written out, on embeddings whose answers are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from scshards.base.errors import ConfigError
from scshards.evaluation.integration import (
    ks,
    leading_components,
    most_variable,
    need_sklearn,
    scores,
)


def _blobs(n: int = 60, spread: float = 0.1, seed: int = 0):
    """Three classes far apart, two domains that have no part in where a cell lies."""
    rng = np.random.default_rng(seed)
    classes = np.arange(n) % 3
    domains = rng.integers(0, 2, n)
    centres = np.array([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]])
    return centres[classes] + rng.normal(0, spread, (n, 3)), classes, domains


def _silhouettes(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(b - a) / max(a, b) of each cell: a to its own group's others, b to the nearest other group."""
    out = []
    for i in range(len(x)):
        far = np.sqrt(((x - x[i]) ** 2).sum(axis=1))
        own = codes == codes[i]
        own[i] = False
        a = far[own].mean()
        b = min(far[codes == c].mean() for c in set(codes.tolist()) - {codes[i]})
        out.append((b - a) / max(a, b))
    return np.array(out)


def test_classes_far_apart_are_found_whole():
    x, classes, domains = _blobs()
    found = scores(x, classes, domains)
    assert found["nmi"] == pytest.approx(1) and found["ari"] == pytest.approx(1)
    assert found["asw"] == pytest.approx((_silhouettes(x, classes).mean() + 1) / 2)
    assert found["avg_bio"] == pytest.approx((2 + found["asw"]) / 3)
    each = [
        1 - np.abs(_silhouettes(x[classes == c], domains[classes == c])).mean() for c in range(3)
    ]
    assert found["asw_domain"] == pytest.approx(np.mean(each))
    assert found["asw_domain"] > 0.85


def test_noise_has_no_classes_and_domains_apart_are_not_mixed():
    rng = np.random.default_rng(1)
    classes, domains = np.arange(80) % 4, np.arange(80) // 40
    noise = rng.normal(size=(80, 5))
    found = scores(noise, classes, domains)
    assert found["nmi"] < 0.35 and abs(found["ari"]) < 0.15 and 0.4 < found["asw"] < 0.55
    apart = noise + 50 * domains[:, None]
    assert scores(apart, None, domains)["asw_domain"] < 0.1
    assert set(scores(apart, None, domains)) == {"asw_domain"}


def test_what_has_one_category_only_is_left_out():
    x, classes, domains = _blobs()
    assert set(scores(x, classes, np.zeros(60, int))) == {"avg_bio", "nmi", "ari", "asw"}
    assert scores(x, None, None) == {}
    assert set(scores(x, np.zeros(60, int), domains)) == {"asw_domain"}


def test_the_numbers_of_clusters_lie_around_that_of_the_classes():
    assert ks(3, 100) == (2, 3, 4, 5, 6) or set(ks(3, 100)) <= set(range(2, 7))
    assert 5 in ks(5, 1000) and ks(20, 1000)[0] == 10 and ks(20, 1000)[-1] == 40
    assert max(ks(20, 12)) == 11


def test_the_genes_of_highest_variance_as_a_matrix():
    rng = np.random.default_rng(3)
    whole = rng.poisson(0.3, (50, 2500)).astype(float) * rng.uniform(0, 5, 2500)
    cells, genes = np.nonzero(whole)
    found = most_variable(cells, genes + 7, whole[cells, genes], 50)
    best = np.sort(np.argsort(-whole.var(axis=0), kind="stable")[:2000])
    assert found.shape == (50, 2000)
    np.testing.assert_allclose(found, whole[:, best])


def test_principal_components_are_those_of_the_singular_values():
    x = np.random.default_rng(4).normal(size=(30, 8)) * np.arange(1, 9)
    found = leading_components(x)
    centred = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u * s), atol=1e-9)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="scikit-learn") as e:
        need_sklearn()
    assert "scshards[finetune]" in str(e.value)

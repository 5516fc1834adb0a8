"""Entropy of categories: of a set of cells, and what a batch drawn from it at random has on average.

Called by report.mixing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1 << 20


def entropy(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Bits, float64 [...], of cells counted by category, [..., C]; 0 where there are none."""
    counts = np.asarray(counts, np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    p = counts / np.where(total > 0, total, 1)
    bits = -p * np.log2(np.where(p > 0, p, 1))
    # All cells in one category sum up to -0.0.
    return np.asarray(bits.sum(axis=-1)) + 0.0


def expected_entropy(counts: NDArray[np.integer], n: int) -> float:
    """The mean entropy, in bits, of n cells drawn at random without replacement.

    How many cells of a category a draw has is hypergeometric, and a draw's entropy is a sum over
    categories, so its mean is a sum of means: no simulation, and exact for any sizes.

    Parameters
    ----------
    counts
        Cells of each category, [C], at least n in all.
    n
        At least 1.
    """
    total = int(np.sum(counts))
    assert 1 <= n <= total
    sizes, how_many = np.unique(
        np.asarray(counts, np.int64)[np.asarray(counts) > 0], return_counts=True
    )
    x = np.arange(n + 1, dtype=np.float64)
    share = x / n
    bits = -share * np.log2(np.where(share > 0, share, 1))
    out = 0.0
    rows = max(1, _AT_ONCE // (n + 1))
    for i in range(0, len(sizes), rows):
        weights = _hypergeometric(sizes[i : i + rows], total, n)
        out += float(how_many[i : i + rows] @ (weights @ bits))
    return out


def _hypergeometric(sizes: NDArray[np.int64], total: int, n: int) -> NDArray[np.float64]:
    """P(x of n drawn are of a category of that size), [C, n + 1], by the ratios of neighbours."""
    size = sizes[:, None].astype(np.float64)
    x = np.arange(n + 1, dtype=np.float64)[None, :]
    possible = (x <= size) & (n - x <= total - size)
    # P(x + 1) / P(x), where both can be.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log((size - x) * (n - x)) - np.log((x + 1) * (total - size - n + x + 1))
    steps = np.where(possible[:, :-1] & possible[:, 1:], ratio[:, :-1], 0.0)
    logs = np.concatenate([np.zeros((len(sizes), 1)), np.cumsum(steps, axis=1)], axis=1)
    logs = np.where(possible, logs, -np.inf)
    weights: NDArray[np.float64] = np.exp(logs - logs.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)

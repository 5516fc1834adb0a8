"""A cell's values -> scGPT's bins, compiled: equal to its `binning`, value for value.

Bin 0 means unexpressed; expressed values get 1 .. n_bins - 1 by the quantiles of the cell's own
expressed values. Two ways to break ties exist in scGPT's history: its pretraining code gives the highest
bin of a run of equal edges ("high"), its releases since 0.1.6 draw one of them ("random").

Counts below 65,536 are binned through a table of their histogram, other values by sorting them.
Called by kernels.cells.
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.cache import inlined, inner
from scshards.kernels.members import draw
from scshards.kernels.tokens import count_ones, trailing_zeros
from scshards.kernels.vectors import COUNTS, above, equal

TABLE = 1 << 16
"""Counts below this are binned through a table; a cell with a larger one is sorted."""

_U64 = np.uint64


@inner
def bin_table(n, quantiles, small, tables, edges):
    """tables[0, c] = edges at or below the count c, tables[1, c] = edges below it, where c occurs.

    Edges come from walking the histogram, equal to numpy.quantile's linear method value for value.
    """
    left, right = tables[0], tables[1]
    # In the type of the counts, and without max(): so it is compiled to vector instructions.
    highest = small.dtype.type(0)
    for j in range(n):
        highest = small[j] if small[j] > highest else highest
    top = np.int64(highest)
    left[: top + 1] = 0
    _count(n, small, left)
    x = 0
    seen = left[0]
    for k in range(len(quantiles)):
        position = (n - 1) * quantiles[k]
        at = np.int64(position)
        while seen <= at:
            x += 1
            seen += left[x]
        after = x
        if at + 1 < n and seen <= at + 1:
            after += 1
            while left[after] == 0:
                after += 1
        edges[k] = _between(np.float64(x), np.float64(after), position - at)
    below = 0
    for x in range(top + 1):
        if left[x] > 0:
            while below < len(edges) and edges[below] < x:
                below += 1
            at_or_below = below
            while at_or_below < len(edges) and edges[at_or_below] <= x:
                at_or_below += 1
            right[x] = below
            left[x] = at_or_below


@inner
def _count(n, small, counts):
    """Add to counts[c] how often c is among small[:n].

    Most counts are 1, 2 or 3, and additions to one place wait for each other: those up to 6 are counted
    by comparing whole vectors.
    """
    ones = twos = threes = fours = fives = sixes = np.int64(0)
    whole = n - n % COUNTS
    for j in range(0, whole, COUNTS):
        ones += count_ones(_U64(equal(small, j, 1)))
        twos += count_ones(_U64(equal(small, j, 2)))
        threes += count_ones(_U64(equal(small, j, 3)))
        fours += count_ones(_U64(equal(small, j, 4)))
        fives += count_ones(_U64(equal(small, j, 5)))
        sixes += count_ones(_U64(equal(small, j, 6)))
        others = _U64(above(small, j, 6) | equal(small, j, 0))
        while others:
            counts[small[j + trailing_zeros(others)]] += 1
            others &= others - _U64(1)
    for j in range(whole, n):
        counts[small[j]] += 1
    for c, times in ((1, ones), (2, twos), (3, threes), (4, fours), (5, fives), (6, sixes)):
        if times > 0:
            counts[c] += times


@inner
def bin_sorted(n, as_counts, quantiles, ties, base, ids, counts, floats, edges):
    """Replace floats[:n] by their bins: values of any size, by sorting them."""
    whole = np.empty(n, np.float64)
    for j in range(n):
        whole[j] = counts[j] if as_counts else floats[j]
    ordered = np.sort(whole)
    for k in range(len(quantiles)):
        position = (n - 1) * quantiles[k]
        at = np.int64(position)
        after = min(at + 1, n - 1)
        edges[k] = _between(ordered[at], ordered[after], position - at)
    at_or_below = np.searchsorted(edges, whole, side="right")
    below = np.searchsorted(edges, whole, side="left")
    for j in range(n):
        floats[j] = tied_bin(at_or_below[j], below[j], ties, base, ids[j])


@inlined
def tied_bin(at_or_below, below, ties, base, gene):
    """The bin of a value: the highest edge it reaches, or a draw among the edges equal to it."""
    if not ties or at_or_below == below:
        return np.float32(at_or_below)
    # In (0, 1], so that a value equal to the lowest edge never gets bin 0, "unexpressed".
    u = ((draw(base, gene) >> _U64(11)) + _U64(1)) * (1.0 / 9007199254740992.0)
    return np.float32(np.ceil(u * (at_or_below - below) + below))


@inlined
def _between(a, b, t):
    """numpy's linear interpolation, rounding included."""
    if t >= 0.5:
        return b - (b - a) * (1 - t)
    return a + (b - a) * t

"""scGPT's value bins, as pure numpy: what `kernels.cells` is compared with.

Source: `binning` and `_digitize` of scGPT's preprocess.py. Bin 0 means unexpressed; expressed values
get 1 .. n_bins - 1 by the quantiles of the cell's own expressed values. Two ways to break ties exist
in scGPT's history: its pretraining code gives the highest bin of a run of equal edges ("high"), its
releases since 0.1.6 draw one of them ("random").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bin_edges(
    values: NDArray[np.integer] | NDArray[np.floating], n_bins: int
) -> NDArray[np.float64]:
    """The n_bins - 1 quantiles of a cell's expressed values, float64, linear interpolation."""
    return np.quantile(values.astype(np.float64), np.linspace(0, 1, n_bins - 1))


def bin_values(
    values: NDArray[np.integer] | NDArray[np.floating],
    n_bins: int,
    uniforms: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """The bin of each expressed value of one cell.

    Parameters
    ----------
    values
        All expressed (non-zero) values of one cell, [n].
    n_bins
        Bins in all, 51 in scGPT; at least 2.
    uniforms
        One draw in (0, 1] for each value breaks ties at random; None breaks them to the highest.

    Returns
    -------
    int64 [n] in 1 .. n_bins - 1.
    """
    if len(values) == 0:
        return np.zeros(0, np.int64)
    edges = bin_edges(values, n_bins)
    left = np.digitize(values, edges)
    if uniforms is None:
        return left.astype(np.int64)
    right = np.digitize(values, edges, right=True)
    return np.ceil(uniforms * (left - right) + right).astype(np.int64)

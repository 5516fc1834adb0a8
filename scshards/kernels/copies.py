"""The compiled loop that says how often each cell of a shard appears in an epoch.

It releases the GIL. Called by streaming.order.copies.
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.cache import kernel


@kernel
def count_copies(weights, positions, total, remainder, out):
    """Systematic resampling: of each cell, how many whole `total`s its weight * positions completes.

    Nothing overflows: weight * positions and total are at most 2^61, and remainder is below total.
    """
    rest = np.int64(remainder)
    for i in range(len(weights)):
        rest += weights[i] * positions
        out[i] = rest // total
        rest -= out[i] * total

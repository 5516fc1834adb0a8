"""Counter-based random numbers: a draw is a pure function of named integers.

Nothing here has state. A `key` folds a seed and names ("order", epoch, lane, ...) into 64 bits; draw
`i` of a key is `mix64(key + (i + 1) * GOLDEN)`, which is the SplitMix64 generator (Steele, Lea and
Flood, OOPSLA 2014) entered at any position. `kernels.bits.draw` is the compiled twin of `draws`;
a test keeps them equal.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def mix64(x: int) -> int:
    """The SplitMix64 finalizer of a 64-bit integer: 64 bits, each depending on all of the input."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(seed: int, *parts: str | int) -> int:
    """Fold a seed and any names or numbers into a 64-bit key, in order.

    Parameters
    ----------
    seed
        Any integer; its low 64 bits are used.
    parts
        What the randomness is for, such as ``"mask", epoch``.
    """
    h = mix64(seed)
    for part in parts:
        if isinstance(part, str):
            digest = hashlib.blake2b(part.encode(), digest_size=8).digest()
            part = int.from_bytes(digest, "little")
        h = mix64((h + GOLDEN) ^ mix64(part))
    return h


def draws(key: int, counters: NDArray[np.integer]) -> NDArray[np.uint64]:
    """64 random bits for each counter, shape and order as `counters`."""
    c = np.atleast_1d(counters).astype(np.uint64)  # numpy warns when a lone number wraps around
    x = (c + np.uint64(1)) * np.uint64(GOLDEN) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).reshape(np.shape(counters))


def uniforms(key: int, counters: NDArray[np.integer]) -> NDArray[np.float64]:
    """A float64 in [0, 1) for each counter, from the top 53 bits of its draw."""
    return (draws(key, counters) >> np.uint64(11)).astype(np.float64) / (1 << 53)


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """A permutation of range(n), int64: the order of n draws, ties by index."""
    return np.argsort(draws(key, np.arange(n)), kind="stable").astype(np.int64)


def golden(n: int) -> NDArray[np.uint64]:
    """n multiples of the golden ratio, modulo 1 = 2^64: any of them in a row are spread evenly."""
    with np.errstate(over="ignore"):
        return np.arange(n, dtype=np.uint64) * np.uint64(GOLDEN)

"""XXH64, the checksum of a chunk, as a compiled loop that releases the GIL.

By Yann Collet's specification (https://github.com/Cyan4973/xxHash), seed 0, for little-endian
machines. Called by shards.tar.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

_U64 = np.uint64
_P1, _P2, _P3 = _U64(0x9E3779B185EBCA87), _U64(0xC2B2AE3D27D4EB4F), _U64(0x165667B19E3779F9)
_P4, _P5 = _U64(0x85EBCA77C2B2AE63), _U64(0x27D4EB2F165667C5)


@nb.njit(nogil=True, cache=True)
def xxh64(data: NDArray[np.uint8]) -> np.uint64:
    """The 64-bit checksum of contiguous bytes."""
    n = len(data)
    words = data[: n - n % 8].view(np.uint64)
    w = 0
    if n >= 32:
        v1, v2, v3, v4 = _P1 + _P2, _P2, _U64(0), _U64(0) - _P1
        while w + 4 <= len(words):
            v1 = _round(v1, words[w])
            v2 = _round(v2, words[w + 1])
            v3 = _round(v3, words[w + 2])
            v4 = _round(v4, words[w + 3])
            w += 4
        h = _rotate(v1, 1) + _rotate(v2, 7) + _rotate(v3, 12) + _rotate(v4, 18)
        for v in (v1, v2, v3, v4):
            h = (h ^ _round(_U64(0), v)) * _P1 + _P4
    else:
        h = _P5
    h += _U64(n)
    while w < len(words):
        h = _rotate(h ^ _round(_U64(0), words[w]), 27) * _P1 + _P4
        w += 1
    p = 8 * len(words)
    if p + 4 <= n:
        four = np.uint64(0)
        for k in range(4):
            four |= _U64(data[p + k]) << _U64(8 * k)
        h = _rotate(h ^ (four * _P1), 23) * _P2 + _P3
        p += 4
    while p < n:
        h = _rotate(h ^ (_U64(data[p]) * _P5), 11) * _P1
        p += 1
    h = (h ^ (h >> _U64(33))) * _P2
    h = (h ^ (h >> _U64(29))) * _P3
    return h ^ (h >> _U64(32))


@nb.njit(nogil=True, inline="always")
def _rotate(x: np.uint64, r: int) -> np.uint64:
    return (x << _U64(r)) | (x >> _U64(64 - r))


@nb.njit(nogil=True, inline="always")
def _round(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotate(acc + lane * _P2, 31) * _P1

"""copy_bytes: any length, any place, and forward within one array."""

from __future__ import annotations

import numba as nb
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scshards.kernels.vectors import copy_bytes


@nb.njit
def _copy(src: np.ndarray, start: int, size: int, out: np.ndarray, at: int) -> None:
    copy_bytes(src, start, size, out, at)


@given(size=st.integers(0, 70), start=st.integers(0, 20), at=st.integers(0, 20))
def test_another_array_gets_those_bytes_and_no_more(size: int, start: int, at: int) -> None:
    src = np.arange(100, dtype=np.uint8)
    out = np.full(100, 255, np.uint8)
    _copy(src, start, size, out, at)
    expected = np.full(100, 255, np.uint8)
    expected[at : at + size] = src[start : start + size]
    assert np.array_equal(out, expected)


@given(size=st.integers(0, 70), at=st.integers(0, 20), gap=st.integers(0, 20))
def test_moved_towards_the_front_within_one_array(size: int, at: int, gap: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 120).astype(np.uint8)
    expected = data.copy()
    expected[at : at + size] = data[at + gap : at + gap + size]
    _copy(data, at + gap, size, data, at)
    assert np.array_equal(data, expected)

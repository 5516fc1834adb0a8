"""The decoders of genes and counts against plain Python, byte for byte; sampling against counting."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_collator import chances

from scshards.base import seeds
from scshards.kernels import bits as draws
from scshards.kernels import members

SMALL = st.integers(1, 127)


def leb128(values: list[int]) -> bytes:
    out = bytearray()
    for value in values:
        while value >= 128:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def varint(data: bytes, p: int, most: int) -> tuple[int, int] | None:
    """The number at data[p] and where it ends; None when it is cut short, overlong or too long."""
    value = shift = 0
    for at in range(p, len(data)):
        value |= (data[at] & 127) << shift
        if data[at] < 128:
            overlong = data[at] == 0 and at > p
            return None if overlong or value >> 64 else (value, at + 1)
        shift += 7
        if shift > most:
            return None
    return None


def read(data: bytes, n: int, most: int, fault: Any) -> tuple[int, list[int]]:
    """n numbers one after another, and no more; fault(numbers) is asked about each."""
    found: list[int] = []
    p = 0
    for _ in range(n):
        one = varint(data, p, most)
        if one is None:
            return members.BAD_VARINT, []
        found.append(one[0])
        p = one[1]
        if fault(found) != members.OK:
            return fault(found), []
    return (members.OK, found) if p == len(data) else (members.BAD_COUNT, [])


def check_genes(data: bytes, n: int, limit: int) -> None:
    def fault(gaps: list[int]) -> int:
        if gaps[-1] == 0 and len(gaps) > 1:
            return members.BAD_ORDER
        return members.ID_TOO_LARGE if sum(gaps) >= limit else members.OK

    status, gaps = read(data, n, 28, fault)
    # Not at the array's begin, nor up to its end.
    src = np.frombuffer(b"\xff" * 3 + data + b"\x01" * 9, np.uint8).copy()
    for behind in (0, 20):  # the vectors fit behind it, or not
        out = np.zeros(n + behind, np.int32)
        assert members.decode_genes(src, 3, 3 + len(data), n, limit, out) == status
        assert status != members.OK or out[:n].tolist() == list(itertools.accumulate(gaps))


@given(
    st.lists(SMALL | st.integers(0, 1 << 33), max_size=60),
    st.integers(0, 1 << 20) | st.integers((1 << 31) - 4000, 1 << 31),
)
def test_genes_and_their_faults(deltas: list[int], limit: int) -> None:
    for n in {len(deltas), max(len(deltas) - 1, 0), len(deltas) + 1}:
        check_genes(leb128(deltas), n, limit)


@given(st.lists(SMALL, max_size=60), st.integers(0, 5000))
def test_ids_up_to_the_largest(deltas: list[int], below: int) -> None:
    check_genes(leb128([(1 << 31) - below, *deltas]), len(deltas) + 1, 1 << 31)


@given(st.binary(max_size=80), st.integers(0, 80), st.integers(1, 1 << 20))
def test_any_bytes_are_genes_or_a_fault(data: bytes, n: int, limit: int) -> None:
    check_genes(data, n, limit)


def check_counts(data: bytes, n: int) -> None:
    src = np.frombuffer(b"\x00" * 5 + data + b"\x80" * 9, np.uint8).copy()
    for dtype in (np.uint16, np.uint64):

        def fault(counts: list[int], dtype: Any = dtype) -> int:
            if counts[-1] == 0:
                return members.BAD_VALUE
            return members.LARGE if counts[-1] > np.iinfo(dtype).max else members.OK

        status, counts = read(data, n, 63, fault)
        out = np.zeros(n, dtype)
        assert members.decode_counts(src, 5, 5 + len(data), n, out) == status
        assert status != members.OK or out.tolist() == counts


@given(st.lists(SMALL | st.integers(1, 1 << 18) | st.integers(1, 1 << 65), max_size=200))
def test_counts_and_their_faults(values: list[int]) -> None:
    for n in {len(values), max(len(values) - 1, 0), len(values) + 1}:
        check_counts(leb128(values), n)


@given(
    st.binary(max_size=80) | st.binary(max_size=9).map(lambda b: b"\x01" * 70 + b),
    st.integers(0, 80),
)
def test_any_bytes_are_counts_or_a_fault(data: bytes, n: int) -> None:
    check_counts(data, n)


def chosen(n: int, k: int, key: int) -> list[int]:
    bits = np.zeros((n + 63) // 64, np.uint64)
    draws.choose(n, k, np.uint64(key), bits)
    out = np.empty(n, np.int32)
    assert draws.take(bits, n, out, 0) == k
    return out[:k].tolist()


@given(st.integers(1, 300), st.data(), st.integers(0, (1 << 64) - 1))
def test_a_sample_is_k_of_n_in_order(n: int, data: st.DataObject, key: int) -> None:
    k = data.draw(st.integers(0, n - 1))
    found = chosen(n, k, key)
    assert len(found) == k and all(0 <= j < n for j in found)
    assert found == sorted(set(found)) == chosen(n, k, key)


@pytest.mark.parametrize("n,k", [(6, 1), (6, 3), (7, 5), (65, 1)])
def test_each_set_of_k_is_as_likely(n: int, k: int) -> None:
    sets = list(itertools.combinations(range(n), k))
    draws = 400 * len(sets)
    found = dict.fromkeys(sets, 0)
    for key in seeds.draws(7, np.arange(draws)).tolist():
        found[tuple(chosen(n, k, key))] += 1
    chi = sum((v - 400) ** 2 / 400 for v in found.values())
    # The chi-square statistic has this mean and spread; five spreads are one in a million or so.
    free = len(sets) - 1
    assert abs(chi - free) < 5 * math.sqrt(2 * free)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 16) - 1), st.integers(1, 300))
def test_chances_are_those_of_numpy(key: int, share: int, n: int) -> None:
    bits = np.full((n + 63) // 64, -1, np.int64).view(np.uint64)  # what was there does not matter
    draws.chances(np.uint64(key), share, n, bits)
    found = np.unpackbits(bits.view(np.uint8), bitorder="little").astype(bool)
    assert np.array_equal(found[:n], chances(key, share, n))
    assert not found[n:].any()


@pytest.mark.parametrize("share", [0, 1, 1 << 15, 26214, 65535])
def test_a_chance_is_its_share_of_65536(share: int) -> None:
    n = 1 << 20
    found = chances(seeds.key(1, "x"), share, n)
    p = share / 65536
    assert abs(found.sum() - n * p) <= 5 * math.sqrt(n * p * (1 - p))
    # Positions are independent of their neighbours and of those of the next word.
    q = found.mean()
    for apart in (1, 64):
        both = (found[apart:] & found[:-apart]).sum()
        assert abs(both - (n - apart) * q * q) <= 6 * math.sqrt(n) * q * (1 - q) + 2

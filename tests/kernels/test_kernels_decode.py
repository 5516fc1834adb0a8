"""The wide decoders against the plain ones, byte for byte; sampling against counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_collator import chances

from scshards.base import seeds
from scshards.kernels import bits as draws
from scshards.kernels import cells as wide
from scshards.kernels import members as plain

SMALL = st.integers(1, 127)


def leb128(values: list[int]) -> bytes:
    out = bytearray()
    for value in values:
        while value >= 128:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def genes(decoder: object, data: bytes, n: int, limit: int) -> tuple[int, list[int]]:
    out = np.zeros(n + 20 * (len(data) % 3), np.int32)  # the vectors fit behind it, or not
    # Not at the array's begin, nor up to its end.
    src = np.frombuffer(b"\xff" * 3 + data + b"\x01" * 9, np.uint8).copy()
    status = decoder(src, 3, 3 + len(data), n, limit, out)  # type: ignore[operator]
    return status, out[:n].tolist() if status == plain.OK else []


@given(st.lists(SMALL | st.integers(0, 1 << 33), max_size=60), st.integers(0, 1 << 20))
def test_genes_as_the_plain_decoder_reads_them(deltas: list[int], limit: int) -> None:
    data = leb128(deltas)
    for n in {len(deltas), max(len(deltas) - 1, 0), len(deltas) + 1}:
        assert genes(wide.read_genes, data, n, limit) == genes(plain.decode_genes, data, n, limit)


@given(st.binary(max_size=80), st.integers(0, 80), st.integers(1, 1 << 20))
def test_any_bytes_give_the_same_genes_or_fault(data: bytes, n: int, limit: int) -> None:
    assert genes(wide.read_genes, data, n, limit) == genes(plain.decode_genes, data, n, limit)


def counts(data: bytes, n: int) -> tuple[int, list[int]]:
    out = np.zeros(n + 20 * (len(data) % 3), np.uint16)
    src = np.frombuffer(b"\x00" * 5 + data + b"\x80" * 9, np.uint8).copy()
    status = wide.read_counts(src, 5, 5 + len(data), n, out)
    return status, out[:n].tolist() if status == plain.OK else []


def plain_counts(data: bytes, n: int) -> tuple[int, list[int]]:
    out = np.zeros(n + 8, np.uint64)
    status = plain.decode_counts(np.frombuffer(data, np.uint8).copy(), 0, len(data), n, out)
    return status, out[:n].tolist() if status == plain.OK else []


@given(st.lists(SMALL | st.integers(1, 1 << 18), max_size=60))
def test_counts_or_a_word_that_they_are_large(values: list[int]) -> None:
    data = leb128(values)
    for n in {len(values), max(len(values) - 1, 0), len(values) + 1}:
        found = counts(data, n)
        if any(v > 65535 for v in values[:n]):
            assert found[0] == wide.LARGE
        else:
            assert found == plain_counts(data, n)


@given(st.binary(max_size=80), st.integers(0, 80))
def test_any_bytes_give_the_same_counts_or_fault(data: bytes, n: int) -> None:
    found = counts(data, n)
    if found[0] == wide.LARGE:
        # The plain decoder takes over, and sees a count that is large, or a fault.
        status, values = plain_counts(data, n)
        assert status != plain.OK or max(values) > 65535
    else:
        assert found == plain_counts(data, n)


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

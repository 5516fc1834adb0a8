"""Counter-based draws against SplitMix64 written from its paper, and their compiled twins."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base import seeds
from scshards.kernels import bits as kernels

U64 = st.integers(0, 2**64 - 1)

# The first outputs of SplitMix64 seeded with 1234567, as published with its reference code.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


class SplitMix64:
    """The generator as its authors wrote it: a state that steps by the golden gamma."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)


def test_published_numbers() -> None:
    assert seeds.draws(1234567, np.arange(5)).tolist() == PUBLISHED


@given(U64)
def test_draws_are_splitmix64_entered_anywhere(key: int) -> None:
    generator = SplitMix64(key)
    expected = [generator.next() for _ in range(50)]
    assert seeds.draws(key, np.arange(50)).tolist() == expected
    assert seeds.draws(key, np.array([17, 3, 17])).tolist() == [expected[i] for i in (17, 3, 17)]


@given(U64, st.integers(0, 2**63 - 1))
def test_the_compiled_twin(key: int, counter: int) -> None:
    assert int(kernels.draw(np.uint64(key), counter)) == int(
        seeds.draws(key, np.array([counter]))[0]
    )


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3)])
def test_draws_keep_the_shape(shape: tuple[int, ...]) -> None:
    counters = np.arange(int(np.prod(shape))).reshape(shape)
    drawn = seeds.draws(9, counters)
    assert drawn.shape == shape and drawn.dtype == np.uint64
    assert drawn.ravel().tolist() == seeds.draws(9, counters.ravel()).tolist()


@given(U64)
def test_uniforms_are_the_top_bits(key: int) -> None:
    u = seeds.uniforms(key, np.arange(100))
    assert u.dtype == np.float64
    assert ((u >= 0) & (u < 1)).all()
    bits = seeds.draws(key, np.arange(100)).tolist()
    assert u.tolist() == [(b >> 11) / 2**53 for b in bits]


def test_uniforms_are_even() -> None:
    n = 200_000
    counts = np.histogram(seeds.uniforms(seeds.key(0, "even"), np.arange(n)), 20, (0, 1))[0]
    chi2 = ((counts - n / 20) ** 2 / (n / 20)).sum()
    assert chi2 < 43.8  # the 0.1% point of chi-squared with 19 degrees of freedom


@given(U64, st.integers(0, 300))
def test_permutation(key: int, n: int) -> None:
    p = seeds.permutation(key, n)
    assert p.dtype == np.int64
    assert sorted(p.tolist()) == list(range(n))
    bits = seeds.draws(key, np.arange(n)).tolist()
    assert p.tolist() == sorted(range(n), key=lambda i: bits[i])


def test_permutations_are_even() -> None:
    """Each of the six orders of three things comes up as often as it should."""
    n = 6000
    orders = [tuple(seeds.permutation(seeds.key(0, "p", i), 3).tolist()) for i in range(n)]
    counts = np.array([orders.count(o) for o in sorted(set(orders))])
    assert len(counts) == 6
    assert ((counts - n / 6) ** 2 / (n / 6)).sum() < 20.5  # 0.1% point, 5 degrees of freedom


def test_keys_tell_every_part_apart() -> None:
    names = [
        seeds.key(0),
        seeds.key(1),
        seeds.key(0, "mask"),
        seeds.key(0, "sample"),
        seeds.key(0, "mask", 0),
        seeds.key(0, "mask", 1),
        seeds.key(0, "mask", "1"),
        seeds.key(0, 0, "mask"),
        seeds.key(0, "mask", 0, 0),
        seeds.key(0, "mas", "k"),
    ]
    assert len(set(names)) == len(names)
    assert all(0 <= k < 2**64 for k in names)
    assert seeds.key(-1) == seeds.key(2**64 - 1)


@given(st.integers(), st.lists(st.one_of(st.text(max_size=8), st.integers(0, 2**64 - 1))))
def test_key_by_its_definition(seed: int, parts: list[str | int]) -> None:
    def finalize(x: int) -> int:
        return SplitMix64((x - 0x9E3779B97F4A7C15) % 2**64).next()

    h = finalize(seed % 2**64)
    for part in parts:
        if isinstance(part, str):
            digest = hashlib.blake2b(part.encode(errors="strict"), digest_size=8).digest()
            part = int.from_bytes(digest, "little")
        h = finalize(((h + 0x9E3779B97F4A7C15) % 2**64) ^ finalize(part))
    assert seeds.key(seed, *parts) == h

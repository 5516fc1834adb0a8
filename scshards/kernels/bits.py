"""Bits and draws: what kernels do to words of 64 bits.

A bit that is set with the chance m / 2^16 is made of one random bit for each binary digit of m, from the
lowest: or-ed where the digit is 1, and-ed where it is 0. Done on words of 64 bits, a draw of 64 bits
serves 64 positions at once, and a few draws are enough for all genes of a cell.
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.cache import inlined, inner
from scshards.kernels.vectors import count_ones, trailing_zeros

DIGITS = 16
"""Binary digits of a chance: it is a whole number of 65,536ths."""

_COARSE = 8
"""Digits of the first chance in `choose`, whose outcome is corrected anyway."""

_U64 = np.uint64
_GOLDEN = _U64(0x9E3779B97F4A7C15)


@inlined
def draw(key, counter):
    """64 random bits; the twin of base.seeds.draws."""
    x = key + (_U64(counter) + _U64(1)) * _GOLDEN
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


@inlined
def draw_below(key, counter, n):
    """A number below n, uint64: the upper half of a draw, scaled to the range."""
    return ((draw(key, counter) >> _U64(32)) * _U64(n)) >> _U64(32)


@inner
def chances(key, share, n, bits):
    """Set each of n bits with the chance share / 2^16 and clear the others of their last word.

    Digit i of word w has the counter `w << 4 | i`. A share without low digits needs fewer draws.
    """
    words = (n + 63) >> 6
    for w in range(words):
        bits[w] = 0
    if share == 0:
        return
    for i in range(trailing_zeros(_U64(share)), DIGITS):
        if (share >> i) & 1:
            for w in range(words):
                bits[w] |= draw(key, (w << 4) | i)
        else:
            for w in range(words):
                bits[w] &= draw(key, (w << 4) | i)
    if n & 63:
        bits[words - 1] &= (_U64(1) << _U64(n & 63)) - _U64(1)


@inner
def choose(n, k, key, bits):
    """Set k of n bits, each set of k with the same chance; k <= n.

    Every bit is set by draws of its own with nearly the chance k/n; then positions drawn at random are
    given back, or taken, until there are k. Given how many the first draws took, each set of as many was
    as likely, and stays so.
    """
    words = (n + 63) >> 6
    if k == n:
        for w in range(words):
            bits[w] = ~_U64(0)
        return
    chances(key, ((k << _COARSE) // n) << (DIGITS - _COARSE), n, bits)
    count = np.int64(0)
    for w in range(words):
        count += count_ones(bits[w])
    gives_back = _U64(count > k)
    left = _U64(count - k if count > k else k - count)
    i = np.int64(words) << 4
    while left > _U64(0):
        # Without a branch, which would be guessed wrong.
        r = draw_below(key, i, n)
        i += 1
        word = bits[r >> _U64(6)]
        hit = _U64(1) ^ gives_back ^ ((word >> (r & _U64(63))) & _U64(1))
        bits[r >> _U64(6)] = word ^ (hit << (r & _U64(63)))
        left -= hit


@inner
def take(bits, n, out, at):
    """The set ones of n bits in order into `out` from `at` on; where they end."""
    for w in range((n + 63) >> 6):
        word = bits[w]
        while word:
            out[at] = (w << 6) + trailing_zeros(word)
            at += 1
            word &= word - _U64(1)
    return at

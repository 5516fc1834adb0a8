"""Every reader of bytes from outside, given changed ones: the right value comes out, or an error of ours.

What tools/fuzz does for hours by coverage, here for a second a target by changes of a fixed seed; and all
inputs that once went wrong, a line each in corpus/TARGET.txt. fuzz_targets.py says what has to hold.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, bounded, held, unnamed

CORPUS = Path(__file__).parent / "corpus"


def attack(name: str, folder: Path, runs: int, seed: int) -> tuple[int, int]:
    """Give a target what once was wrong, its seeds, and changed ones; how many were taken and refused."""
    target = TARGETS[name](folder)
    seeds = target.seeds()
    taken = [target.check(data) for data in seeds]  # what has to be compiled, is
    assert any(taken), "no seed is right"
    found = CORPUS / f"{name}.txt"
    lines = found.read_text().splitlines() if found.exists() else []
    rng = random.Random(f"{name} {seed}")
    with held():
        for line in lines:
            if not line.startswith("#"):
                with bounded():
                    target.check(unnamed(line))
        for _ in range(runs):
            data = rng.choice(seeds)
            for _ in range(rng.choice([1, 1, 2, 3])):
                data = target.change(data, rng)
            with bounded():
                taken.append(target.check(data))
    return sum(taken), len(taken) - sum(taken)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_bytes_end_in_an_error_or_in_what_they_say(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL):
        taken, refused = attack(name, tmp_path, TARGETS[name].runs, 0)
    assert taken and refused, "either all or none of it is taken: the changes are no good"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TARGETS)
def test_many_more_of_them(name: str, tmp_path: Path) -> None:
    attack(name, tmp_path, 40 * TARGETS[name].runs, 1)


def test_a_finding_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are bounds: memory and time beyond them are no silent success."""

    class Greedy(TARGETS["vocab"]):  # type: ignore[misc]
        def check(self, data: bytes) -> bool:
            return bool(data) and self.fails()

        def fails(self) -> bool:
            return True

    monkeypatch.setitem(TARGETS, "greedy", Greedy)
    monkeypatch.setattr("fuzz_targets.SECONDS", 0.2)
    calls = {"memory": lambda self: bytearray(1 << 30), "time": lambda self: hang()}
    for what, call in calls.items():
        first = iter([True, True])
        monkeypatch.setattr(
            Greedy, "fails", lambda self, call=call, first=first: next(first, None) or call(self)
        )
        error = MemoryError if what == "memory" else AssertionError
        with pytest.raises(error):
            attack("greedy", tmp_path, 5, 0)


def hang() -> None:
    while True:
        pass

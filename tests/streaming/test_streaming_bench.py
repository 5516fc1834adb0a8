"""report.bench: it counts what came, and finds the stall of a loader that is slow by a known amount."""

from __future__ import annotations

import dataclasses
import json

import pytest
from loaders import loader_of
from shardsets import make_set

from scshards.base.errors import ConfigError
from scshards.report.bench import WORK, Taken, bench
from scshards.streaming.loader import CellLoader
from scshards.streaming.stages import Stages


@pytest.fixture
def root(tmp_path):
    make_set(tmp_path / "set", [150, 90])
    return tmp_path / "set"


class Clock:
    """A time that passes only where somebody sleeps, or waits for a batch of `Slow`."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Slow(CellLoader):
    """Takes so long for every batch, beside whoever takes them."""

    def __init__(self, root, clock, delay_s):
        super().__init__(root, batch_size=16)
        self.clock, self.delay_s, self.made = clock, delay_s, clock.now

    def __iter__(self):
        for batch in super().__iter__():
            self.made += self.delay_s
            self.clock.now = max(self.clock.now, self.made)
            yield batch


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("scshards.report.bench.time", clock)
    return clock


def test_what_a_batch_holds_is_counted(root):
    taken = Taken()
    batches = list(loader_of(root, batch_size=100, drop_last=False))
    for batch in batches:
        taken.add(batch)
    # The last batch has 60 rows that hold no cell, only <cls>.
    assert (taken.cells, taken.batches) == (240, 3)
    assert taken.padded_tokens == sum(b.genes.numel() for b in batches)
    n_genes = sum(s.tokens for s in CellLoader(root).shardset.shards("train"))
    assert taken.tokens == n_genes + 300


def test_a_report_adds_up(root):
    CellLoader(root)  # nothing of what follows is its first
    report = bench(lambda: loader_of(root, batch_size=16), seconds=0.5, progress=False)
    assert report.seconds >= 0.5
    assert report.cells == 16 * report.batches > 0
    assert report.cells_per_s == report.cells / report.seconds
    assert report.tokens <= report.padded_tokens
    assert report.first_batch_s > 0 and report.memory_bytes > 0
    assert sum(report.shares.values()) == pytest.approx(1)
    assert set(report.shares) == set(WORK) < {f.name for f in dataclasses.fields(Stages)}
    assert report.headroom is None and report.stall is None
    assert json.loads(json.dumps(report.tables()))["cells_per_s"] == report.cells_per_s


def test_a_loader_that_is_fast_enough_does_not_stall(root, clock):
    # Batches of 16 cells come every 10 ms and are wanted every 80 ms.
    report = bench(lambda: Slow(root, clock, 0.01), seconds=0.8, demand=200, progress=False)
    assert report.headroom == pytest.approx(8)
    assert report.stall < 0.02, "the first batch alone is waited for"


def test_a_loader_that_is_too_slow_stalls_by_what_is_missing(root, clock):
    # Batches come every 100 ms and are wanted every 20 ms: a step waits for four fifths of its time.
    report = bench(lambda: Slow(root, clock, 0.1), seconds=1.5, demand=800, progress=False)
    assert report.headroom == pytest.approx(0.2)
    assert report.stall == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("options", [{"seconds": 0}, {"demand": -1}, {"demand": 0}])
def test_times_and_demands_are_above_zero(root, options):
    with pytest.raises(ConfigError, match="above 0"):
        bench(lambda: CellLoader(root), progress=False, **options)

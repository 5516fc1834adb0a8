"""stream.bench: it counts what came, and finds the stall of a loader that is slow by a known amount."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from shardsets import make_set

from scshards.base.errors import ConfigError
from scshards.stream.bench import WORK, Taken, bench
from scshards.stream.loader import CellLoader
from scshards.stream.stages import Stages


@pytest.fixture
def root(tmp_path):
    make_set(tmp_path / "set", [150, 90])
    return tmp_path / "set"


class Slow(CellLoader):
    """Takes so long for every batch, on one thread."""

    delay_s = 0.0

    def collate(self, block, wanted):
        for batch in super().collate(block, wanted):
            time.sleep(self.delay_s)
            yield batch


def slow(root, delay_s):
    loader = Slow(root, batch_size=16, threads=1)
    loader.delay_s = delay_s
    return loader


def test_what_a_batch_holds_is_counted(root):
    taken = Taken()
    batches = list(CellLoader(root, batch_size=100, drop_last=False))
    for batch in batches:
        taken.add(batch)
    # The last batch has 60 rows that hold no cell, only <cls>.
    assert (taken.cells, taken.batches) == (240, 3)
    assert taken.padded_tokens == sum(b.genes.numel() for b in batches)
    n_genes = sum(s.tokens for s in CellLoader(root).shardset.shards("train"))
    assert taken.tokens == n_genes + 300


def test_a_report_adds_up(root):
    CellLoader(root)  # nothing of what follows is its first
    report = bench(lambda: CellLoader(root, batch_size=16), seconds=0.5, progress=False)
    assert 0.5 <= report.seconds < 5
    assert report.cells == 16 * report.batches > 0
    assert report.cells_per_s == report.cells / report.seconds
    assert report.tokens <= report.padded_tokens
    assert report.first_batch_s > 0 and report.memory_bytes > 0
    assert sum(report.shares.values()) == pytest.approx(1)
    assert set(report.shares) == set(WORK) < {f.name for f in dataclasses.fields(Stages)}
    assert report.headroom is None and report.stall is None
    assert json.loads(json.dumps(report.tables()))["cells_per_s"] == report.cells_per_s


def test_a_loader_that_is_fast_enough_does_not_stall(root):
    # Batches of 16 cells come every 10 ms and are wanted every 80 ms.
    report = bench(lambda: slow(root, 0.01), seconds=0.8, demand=200, progress=False)
    assert report.headroom > 2
    assert report.stall < 0.35


def test_a_loader_that_is_too_slow_stalls_by_what_is_missing(root):
    # Batches come every 100 ms and are wanted every 20 ms: a step waits for four fifths of its time.
    report = bench(lambda: slow(root, 0.1), seconds=1.5, demand=800, progress=False)
    assert 0.05 < report.headroom < 0.22
    assert 0.7 < report.stall < 0.96


@pytest.mark.parametrize("options", [{"seconds": 0}, {"demand": -1}, {"demand": 0}])
def test_times_and_demands_are_above_zero(root, options):
    with pytest.raises(ConfigError, match="above 0"):
        bench(lambda: CellLoader(root), progress=False, **options)

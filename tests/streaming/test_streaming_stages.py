"""streaming.stages: where a loader says its time went is where it went."""

from __future__ import annotations

import threading

import pytest
from loaders import loader_of
from shardsets import make_set

from scshards.streaming.stages import Span, StageClock, Stages


class Time(threading.local):
    """A time of each thread that passes only where it sleeps."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr("scshards.streaming.stages.time", time)
    return time


def test_a_clock_adds_up_what_threads_spend(time):
    clock = StageClock()

    def work(stage, seconds):
        for _ in range(5):
            with clock.time(stage):
                time.sleep(seconds)
            clock.count(reads=1, bytes=10)

    threads = [threading.Thread(target=work, args=a) for a in (("fetch", 0.02), ("check", 0.04))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found = clock.total()
    assert (found.fetch, found.check) == pytest.approx((0.1, 0.2))
    assert (found.reads, found.bytes) == (10, 100)
    assert found.collate == found.wait == 0.0


def test_waits_for_input_are_no_dealing(time):
    clock = StageClock()
    with clock.time("deal"):
        time.sleep(0.02)
        with clock.time("input"):
            time.sleep(0.2)
    assert (clock.total().input, clock.total().deal) == pytest.approx((0.2, 0.02))


def test_a_difference_is_what_lay_between():
    clock = StageClock()
    clock.count(cells=3, batches=1)
    before = clock.total()
    clock.count(cells=4)
    assert clock.total() - before == Stages(cells=4)


def test_a_loader_counts_its_cells_batches_reads_and_bytes(tmp_path):
    make_set(tmp_path, [70, 31], n_genes=30)
    loader = loader_of(tmp_path, batch_size=10, lanes=1, shuffle_buffer=16, drop_last=False)
    (again,) = {s for s, _, _ in loader.plan().lines[0].runs(0, 1)}
    seen = sum(int(batch.weight.sum()) for batch in loader)
    found = loader.stages()
    assert (seen, found.cells, found.batches) == (101, 101, 11)
    shards = loader.shardset.shards("train")
    # With one lane, each chunk and each index is read once, but for the chunk at which it begins and ends.
    assert found.reads == sum(len(s.chunks.sums) + 1 for s in shards) + 1
    assert found.bytes == sum(s.bytes + s.index_bytes for s in shards) + shards[again].bytes
    times = [getattr(found, n) for n in ("fetch", "check", "index", "deal", "collate", "wait")]
    assert all(t > 0 for t in times)
    list(loader)
    assert (loader.stages() - found).cells == 101


def test_a_slow_stage_is_seen_in_its_own_place(tmp_path, time, monkeypatch):
    make_set(tmp_path, [64])
    loader = loader_of(tmp_path, batch_size=8)
    collate = loader._collator.collate
    calls = []

    def slow(*args):
        calls.append(args[-1])
        time.sleep(0.1)
        return collate(*args)

    monkeypatch.setattr(loader._collator, "collate", slow)
    assert len(list(loader)) == sum(calls) == 8
    assert loader.stages().collate == pytest.approx(len(calls) * 0.1)


def test_who_takes_batches_waits_for_them(tmp_path, monkeypatch):
    make_set(tmp_path, [64])
    loader = loader_of(tmp_path, batch_size=8)
    collate, enter, waiting = loader._collator.collate, Span.__enter__, threading.Event()
    before = loader.stages()

    def entered(span):
        enter(span)
        if span._stage == "wait":
            waiting.set()

    def slow(*args):
        waiting.wait()
        threading.Event().wait(0.1)
        return collate(*args)

    monkeypatch.setattr(Span, "__enter__", entered)
    monkeypatch.setattr(loader._collator, "collate", slow)
    assert len(list(loader)) == 8
    assert (loader.stages() - before).wait >= 0.1

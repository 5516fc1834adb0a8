"""Bad shards: errors, or a quarantine in which no other cell moves; spoiled transfers; the cache's use."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import FLIP, FaultProxy
from loaders import loader_of
from shardsets import Known, make_set

from scshards.base.errors import (
    ChecksumError,
    ConfigError,
    FormatError,
    MissingDataError,
    StateError,
)
from scshards.base.storage import Storage
from scshards.shards import tar
from scshards.streaming.loader import CellLoader
from scshards.streaming.read.cache import LEAST_BYTES

SIZES = [150, 1, 80, 120]
CELLS = sum(SIZES)


@pytest.fixture(scope="module", params=["none", "zstd"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    """A set with many chunks in its shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "CHUNK_BYTES", 16_384)
        return make_set(tmp_path_factory.mktemp("set"), SIZES, compression=request.param)


@pytest.fixture
def bad(good: Known, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    here, there = Storage(good.root), Storage(tmp_path / "bad")
    for name in here.list():
        there.write(name, here.read(name))
    return tmp_path / "bad"


def loader(root: Path | str, **options: object) -> CellLoader:
    usual = {"batch_size": 8, "shuffle_buffer": 48, "lanes": 6, "drop_last": False, "epoch": 3}
    return loader_of(root, **usual | options)


def keys(of: CellLoader) -> list[list[int]]:
    return [batch.key.tolist() for batch in of]


def shard_file(root: Path, shard: int) -> Path:
    return next(root.glob(f"train/{shard:06d}.tar*"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


def chunk_cells(of: CellLoader, shard: int, chunk: int) -> range:
    """The rows of a chunk's cells: keys are consecutive over the set's shards."""
    first = sum(SIZES[:shard])
    ends = np.cumsum([0, *of.shardset.shards("train")[shard].chunks.cells])
    return range(first + int(ends[chunk]), first + int(ends[chunk + 1]))


def damage_chunk(root: Path) -> tuple[set[int], list[tuple[int, int | None]]]:
    """Spoil chunk 2 of shard 0; the keys that are lost and the (shard, chunk) that are."""
    chunks = loader(root).shardset.shards("train")[0].chunks
    flip(shard_file(root, 0), int(chunks.stored[:2].sum()) + 100)
    return set(chunk_cells(loader(root), 0, 2)), [(0, 2)]


def damage_index(root: Path) -> tuple[set[int], list[tuple[int, int | None]]]:
    flip(root / "train/000002.parquet", 40)
    return set(range(151, 231)), [(2, None)]


def remove_shard(root: Path) -> tuple[set[int], list[tuple[int, int | None]]]:
    shard_file(root, 1).unlink()
    return {150}, [(1, 0)]


def cut_shard(root: Path) -> tuple[set[int], list[tuple[int, int | None]]]:
    of = loader(root)
    chunks = of.shardset.shards("train")[3].chunks
    path = shard_file(root, 3)
    path.write_bytes(path.read_bytes()[: int(chunks.stored[:2].sum()) + 10])
    gone = range(2, len(chunks))
    return {k for c in gone for k in chunk_cells(of, 3, c)}, [(3, c) for c in gone]


DAMAGES = [damage_chunk, damage_index, remove_shard, cut_shard]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_lost_cells_leave_gaps_and_no_other_cell_moves(
    good: Known, bad: Path, damage, world: int
) -> None:
    gone, places = damage(bad)
    lost: list = []
    for rank in range(world):
        options = {"rank": rank, "world_size": world}
        whole = keys(loader(good.root, **options))
        reading = loader(bad, on_bad_shard="quarantine", **options)
        assert len(reading) == len(whole)
        found = list(reading)
        assert [b.key.tolist() for b in found] == [
            [-1 if k in gone else k for k in batch] for batch in whole
        ]
        for batch in found:
            empty = batch.key.numpy() < 0
            assert (batch.weight.numpy() == ~empty).all()
            assert batch.is_pad[empty][:, 1:].all()
            assert (batch.labels["donor"][empty] == -1).all()
            assert batch.labels["age"][empty].isnan().all()
        lost += reading.lost
    shards = [s.path for s in loader(good.root).shardset.shards("train")]
    assert sum(x.cells for x in lost) == len(gone)
    met = {(next(i for i, s in enumerate(shards) if x.shard.endswith(s)), x.chunk) for x in lost}
    assert met == set(places) and {x.epoch for x in lost} == {3}
    assert all(x.reason for x in lost)


def test_each_loss_is_one_line_and_one_entry(good: Known, bad: Path, caplog) -> None:
    gone, _ = damage_chunk(bad)
    reading = loader(bad, on_bad_shard="quarantine")
    list(reading)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    line = caplog.records[0].getMessage()
    assert "000000.tar" in line and "chunk 2" in line and "epoch 3" in line
    (entry,) = reading.lost
    assert entry.cells == len(gone) and entry.chunk == 2
    list(reading)
    assert [x.epoch for x in reading.lost] == [3, 4]
    # What was mended is read again.
    shard_file(bad, 0).write_bytes(shard_file(good.root, 0).read_bytes())
    list(reading)
    assert len(reading.lost) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_raising_is_the_default(bad: Path, damage) -> None:
    damage(bad)
    with pytest.raises((ChecksumError, MissingDataError)) as caught:
        list(loader(bad))
    assert "train/00000" in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_too_many_are_an_error(bad: Path, damage) -> None:
    gone, _ = damage(bad)
    reading = loader(bad, on_bad_shard="quarantine", max_bad_cells=len(gone) - 1)
    with pytest.raises(FormatError, match=f"max_bad_cells={len(gone) - 1}") as caught:
        list(reading)
    assert f"scshards verify {bad} ends with the command" in str(caught.value.advice)
    assert reading.lost
    list(loader(bad, on_bad_shard="quarantine", max_bad_cells=len(gone)))


def test_a_state_does_not_tell_of_what_was_lost(good: Known, bad: Path) -> None:
    damage_chunk(bad)
    for taken in (1, 5, 17):
        whole, reading = loader(good.root), loader(bad, on_bad_shard="quarantine")
        for of in (whole, reading):
            batches = iter(of)
            for _ in range(taken):
                next(batches)
            batches.close()
        assert reading.state_dict() == whole.state_dict()
        resumed, mended = loader(bad, on_bad_shard="quarantine"), loader(good.root)
        for of in (resumed, mended):
            of.load_state_dict(json.loads(json.dumps(reading.state_dict())))
        for a, b in zip(resumed, mended, strict=True):
            assert ((a.key == b.key) | (a.key == -1)).all()


@pytest.mark.parametrize(
    "wrong", [{"on_bad_shard": "skip"}, {"max_bad_cells": -1}, {"cache_dir": "x"}, {"retries": -1}]
)
def test_options_are_checked(good: Known, wrong: dict) -> None:
    with pytest.raises(ConfigError):
        loader(good.root, **wrong)


NOT_COMPRESSED = pytest.mark.parametrize("good", ["none"], indirect=True, scope="module")
"""For tests of an index: it is the same file whatever its shard is."""

CHOICES = [
    {"where": "age > 30"},
    {"weights": {"donor": "balanced"}, "epoch_cells": 500},
    {"domain_by": "donor"},
    {"where": "n_genes > 2", "take": 100, "domain_by": "donor"},
]


@NOT_COMPRESSED
@pytest.mark.parametrize("choice", CHOICES)
def test_an_index_that_is_bad_when_cells_are_chosen(
    good: Known, bad: Path, choice: dict, caplog: pytest.LogCaptureFixture
) -> None:
    gone, _ = damage_index(bad)
    with pytest.raises(ChecksumError, match=r"000002\.parquet"):
        loader(bad, **choice)
    with pytest.raises(FormatError, match="max_bad_cells=79"):
        loader(bad, on_bad_shard="quarantine", max_bad_cells=79, **choice)
    caplog.clear()
    reading = loader(bad, on_bad_shard="quarantine", **choice)
    (entry,) = reading.lost
    assert (entry.chunk, entry.cells) == (None, 80) and "000002.tar" in entry.shard and entry.reason
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    found = [k for batch in keys(reading) for k in batch if k >= 0]
    assert found and not set(found) & gone
    if "weights" not in choice and "take" not in choice:
        # Nothing else is missing: without choosing by indexes, one can tell which cells would be there.
        whole = [k for batch in keys(loader(good.root, **choice)) for k in batch if k >= 0]
        assert sorted(found) == sorted(set(whole) - gone)
    assert len(keys(reading)) == len(reading) and len(reading.lost) == 1
    # Whoever goes on with the index restored would meet other cells: a state says so.
    with pytest.raises(StateError, match="were left out then"):
        loader(good.root, **choice).load_state_dict(reading.state_dict())
    with pytest.raises(StateError, match="some are left out here") as caught:
        reading.load_state_dict(loader(good.root, **choice).state_dict())
    assert caught.value.advice == f"scshards verify {bad} --repair makes an index from its tar"


@NOT_COMPRESSED
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("lanes", [1, 6])
def test_an_index_that_goes_bad_after_cells_were_chosen(
    good: Known, bad: Path, choice: dict, lanes: int
) -> None:
    for world, rank in [(1, 0), (2, 1)]:
        at = {"lanes": lanes if world == 1 else 6, "rank": rank, "world_size": world}
        whole = keys(loader(good.root, **at, **choice))
        shutil.copytree(good.root, bad, dirs_exist_ok=True)
        lenient = loader(bad, on_bad_shard="quarantine", **at, **choice)
        strict = loader(bad, **at, **choice)
        gone, _ = damage_index(bad)
        assert keys(lenient) == [[-1 if k in gone else k for k in batch] for batch in whole]
        (entry,) = lenient.lost
        assert entry.chunk is None and "000002.tar" in entry.shard
        with pytest.raises(ChecksumError, match=r"000002\.parquet"):
            list(strict)


# --- over a network --------------------------------------------------------------------------


@pytest.fixture
def remote(good: Known, s3) -> str:
    here, there = Storage(good.root), Storage(f"{s3.url}/set")
    for name in here.list():
        there.write(name, here.read(name))
    return f"{s3.url}/set"


def over(proxy: FaultProxy, s3, root: str, **options: object) -> CellLoader:
    return loader(root, storage_options=s3.options | {"endpoint_url": proxy.url}, **options)


def test_bits_that_flip_on_their_way_are_read_again(good: Known, remote: str, s3) -> None:
    with FaultProxy(s3.options["endpoint_url"], share=0.0, kinds=[FLIP]) as proxy:
        reading = over(proxy, s3, remote)
        proxy.share, proxy.seed = 0.15, 5
        assert keys(reading) == keys(loader(good.root))
        assert proxy.faults[FLIP] > 2 and reading.lost == []
        # What stays wrong is an error, or lost.
        proxy.share = lambda path: FLIP if path.endswith(("000002.tar", "000002.tar.zst")) else None
        with pytest.raises(ChecksumError, match="000002"):
            list(over(proxy, s3, remote))
        lost = over(proxy, s3, remote, on_bad_shard="quarantine")
        list(lost)
        # One bit of each answer is wrong, so of chunks that come together only one is.
        assert 0 < sum(x.cells for x in lost.lost) <= 80
        assert all("000002" in x.shard for x in lost.lost)


@NOT_COMPRESSED
@pytest.mark.parametrize("choice", [{}, *CHOICES])
@pytest.mark.parametrize("fault", ["404", FLIP])
def test_an_index_that_is_bad_while_chunks_are_read_ahead(
    good: Known, remote: str, s3, choice: dict, fault: str
) -> None:
    whole = keys(loader(good.root, **choice))
    with FaultProxy(s3.options["endpoint_url"], share=0.0) as proxy:
        reading = over(proxy, s3, remote, on_bad_shard="quarantine", **choice)
        if fault == FLIP:
            proxy.share = lambda path: FLIP if path.endswith("000002.parquet") else None
        else:
            Storage(f"{s3.url}/set").remove("train/000002.parquet")
        gone = set(range(151, 231))
        assert keys(reading) == [[-1 if k in gone else k for k in batch] for batch in whole]


@pytest.mark.parametrize("lanes", [1, 6, 300])
def test_chunks_that_follow_each_other_come_in_one_request(
    good: Known, remote: str, s3, lanes: int
) -> None:
    with FaultProxy(s3.options["endpoint_url"], share=0.0) as proxy:
        reading = over(proxy, s3, remote, lanes=lanes)
        chunks = sum(len(s.chunks) for s in reading.shardset.shards("train"))
        proxy.requests.clear()
        assert keys(reading) == keys(loader(good.root, lanes=lanes))
        tars = [r for r in proxy.requests if ".tar" in r.path]
        if lanes == 1:
            assert len(tars) <= -(-chunks // 4) + len(SIZES)
        elif lanes == 6:
            assert len(tars) < chunks


def test_a_rank_with_one_lane_has_many_requests_under_way(good: Known, remote: str, s3) -> None:
    with FaultProxy(s3.options["endpoint_url"], share=0.0, stall_s=10_000) as proxy:
        reading = over(proxy, s3, remote, lanes=1)
        proxy.requests.clear()
        proxy.share = lambda path: "stall" if ".tar" in path else None
        batches = iter(reading)
        taker = threading.Thread(target=lambda: next(batches, None), daemon=True)
        taker.start()
        while sum(".tar" in r.path for r in proxy.requests) < 5:
            time.sleep(0.02)
        asked = [r for r in proxy.requests if ".tar" in r.path]
        assert 5 <= len(asked) <= 16
        proxy.share = 0.0
        proxy.released.set()
        taker.join(timeout=600)
        assert not taker.is_alive()
        rest = list(batches)
        assert len(rest) == len(loader(good.root)) - 1


def test_who_stops_iterating_does_not_wait_for_a_store_that_hangs(remote: str, s3) -> None:
    with FaultProxy(s3.options["endpoint_url"], share=0.0, stall_s=10_000) as proxy:
        reading = over(proxy, s3, remote, retries=100, timeout=10_000)
        batches = iter(reading)
        next(batches)
        batches.close()
        proxy.requests.clear()
        proxy.share = lambda path: "stall"
        batches = iter(reading)
        asked, over_with = threading.Event(), threading.Event()

        def interrupt() -> None:
            """As Ctrl-C does: the exception comes in whoever waits for a batch.

            Python loses one that comes while it collects garbage: as a person would, it is asked again.
            """
            asked.wait()
            while not proxy.requests:
                time.sleep(0.02)
            while not over_with.wait(0.5):
                os.kill(os.getpid(), signal.SIGINT)
                over_with.wait(10)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            asked.set()
            try:
                next(batches)
            finally:
                over_with.set()
        assert reading.state_dict()["position"] == 8


def test_a_cache_is_read_instead_of_the_store(good: Known, remote: str, s3, tmp_path: Path) -> None:
    options = {"cache_dir": tmp_path / "cache", "cache_size": LEAST_BYTES}
    with FaultProxy(s3.options["endpoint_url"], share=0.0) as proxy:
        wanted = [keys(loader(good.root, rank=r, world_size=2)) for r in range(2)]
        ranks = [over(proxy, s3, remote, rank=r, world_size=2, **options) for r in range(2)]
        assert [keys(r) for r in ranks] == wanted
        proxy.requests.clear()
        # The next epoch deals other lanes to each rank; another process finds what these have read.
        second = [keys(r) for r in ranks]
        assert [keys(over(proxy, s3, remote, rank=r, world_size=2, epoch=4, **options)) for r in range(2)] == second  # fmt: skip
        assert {Path(r.path).name for r in proxy.requests} == {"manifest.json", "vocab.json"}
        third = over(proxy, s3, remote, **options)
        list(third)
        assert third.stages().cached == third.stages().reads > 20

        # What is damaged there is dropped and read from the store.
        proxy.requests.clear()
        kept = [p for p in (tmp_path / "cache").rglob("*-*")]
        for path in kept[::3]:
            flip(path, path.stat().st_size // 2)
        assert [keys(over(proxy, s3, remote, rank=r, world_size=2, **options)) for r in range(2)] == wanted  # fmt: skip
        read_again = {(r.path, r.start) for r in proxy.requests if ".tar" in r.path}
        assert 0 < len(read_again) <= len(kept[::3])
        proxy.requests.clear()
        keys(over(proxy, s3, remote, **options))
        assert not [r for r in proxy.requests if ".tar" in r.path or ".parquet" in r.path]


def test_a_bad_shard_is_not_kept(bad: Path, tmp_path: Path) -> None:
    gone, _ = damage_chunk(bad)
    options = {"cache_dir": tmp_path / "cache", "cache_size": LEAST_BYTES}
    reading = loader(bad, on_bad_shard="quarantine", **options)
    first, second = list(reading), list(reading)
    assert sum(x.cells for x in reading.lost) == 2 * len(gone)
    names = [p.name for p in (tmp_path / "cache").rglob("*-*")]
    assert names and not [n for n in names if n.endswith("-2") and n.startswith(_sha(bad, 0))]
    assert len(first) == len(second)


def _sha(root: Path, shard: int) -> str:
    return loader(root).shardset.shards("train")[shard].sha256

"""Spills give back what was put in, shard by shard; buffers are used again and never two at once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scshards.shards import spill
from scshards.shards.spill import SpillWriter, borrowed, read_members, read_records, record_dtype

CELLS = st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=40)), max_size=30)


@settings(deadline=None)
@given(
    tasks=st.lists(CELLS, min_size=1, max_size=3), run=st.integers(1, 200), piece=st.integers(1, 90)
)
def test_what_was_put_in_comes_back(
    tasks: list[list[tuple[int, bytes]]], run: int, piece: int
) -> None:
    dtype = record_dtype(("category",))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as m:
        m.setattr(spill, "RUN_BYTES", run)
        m.setattr(spill, "PIECE_BYTES", piece)
        folder = Path(name)
        for number, cells in enumerate(tasks):
            with SpillWriter(folder, number, 5) as writer:
                for row, (shard, member) in enumerate(cells):
                    if len(member) > len(writer.members) - writer.used:
                        writer.make_room(len(member))
                    end = writer.used + len(member)
                    writer.members[writer.used : end] = np.frombuffer(member, np.uint8)
                    record = np.zeros(1, dtype)
                    record["key"], record["size"] = 100 * number + row, len(member)
                    record["label-0"] = shard
                    writer.add(np.array([shard], np.int32), record, end)
        assert sorted(p.suffix for p in folder.iterdir()) == sorted([".bin", ".npy"] * len(tasks))
        directories = [np.load(folder / f"{n:06d}.npy") for n in range(len(tasks))]
        assert all((np.diff(d["shard"]) >= 0).all() for d in directories)
        for shard in range(5):
            segments = np.concatenate([d[d["shard"] == shard] for d in directories])
            records = read_records(folder, segments, dtype)
            got: list[bytes] = [b""] * len(records)
            for some, members in read_members(folder, segments, records["size"]):
                at = 0
                for i in range(some.start, some.stop):
                    got[i] = members[at : at + records["size"][i]].tobytes()
                    at += int(records["size"][i])
                assert at == len(members)
            expected: list[Any] = [
                (100 * number + row, member)
                for number, cells in enumerate(tasks)
                for row, (s, member) in enumerate(cells)
                if s == shard
            ]
            assert list(zip(records["key"].tolist(), got, strict=True)) == expected
            assert (records["label-0"] == shard).all()


def test_a_spill_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), SpillWriter(tmp_path, 0, 1):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_the_run_grows_with_the_shards() -> None:
    def run_bytes(n_shards: int) -> int:
        with tempfile.TemporaryDirectory() as name, SpillWriter(Path(name), 0, n_shards) as w:
            return len(w.members)

    assert run_bytes(1) == run_bytes(256) == spill.SMALL_RUN_BYTES
    assert run_bytes(1000) >= 1000 * spill.SEGMENT_BYTES
    assert run_bytes(10**6) >= spill.RUN_BYTES


def test_buffers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_free", [])
    with borrowed(100) as a, borrowed(50) as b:
        assert (len(a), len(b)) == (100, 50) and not np.shares_memory(a, b)
    with borrowed(60) as c:
        assert np.shares_memory(c, a)
        with borrowed(40) as d:
            assert np.shares_memory(d, b)
        with borrowed(70) as e:  # b is too small, and makes way
            assert len(e) == 70 and not np.shares_memory(e, c)
    assert sorted(map(len, spill._free)) == [70, 100]
    with pytest.raises(RuntimeError), borrowed(10):
        raise RuntimeError
    assert len(spill._free) == 2


@given(
    columns=st.lists(st.lists(st.integers(0, 300), max_size=200), min_size=1, max_size=6),
    most=st.integers(1, 100),
)
def test_stretches_hold_equal_values_together_and_are_bounded(
    columns: list[list[int]], most: int
) -> None:
    arrays = [np.sort(np.array(c, np.int64)) for c in columns]
    highest, found = -1, []
    for parts in spill.stretches(arrays, most):
        some = np.concatenate([a[p] for a, p in zip(arrays, parts, strict=True)])
        assert not len(some) or some.min() > highest
        highest = int(some.max(initial=highest))
        # But for equal values it is about as large as was asked for.
        assert len(np.unique(some)) <= most + most // 16 + len(columns)
        found += np.sort(some).tolist()
    assert found == sorted(v for c in columns for v in c)

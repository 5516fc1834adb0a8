"""Sets of cells beside controls, from a loader: against a plain sampler that reads manifest and indexes."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import dataset_of, loader_of
from pack_support import counts, quiet_pack, vocab_of, write
from s3_start import S3
from shardsets import make_set
from torch.utils.data import DataLoader

from scshards import CellLoader, SetBatch, SetOptions, ShardSet
from scshards.base import seeds
from scshards.base.errors import ChecksumError, ConfigError, StateError
from scshards.shards import tar
from scshards.streaming.order.plan import plan_epoch
from scshards.streaming.sets import groups, reader

GENES = 12
LINES, DRUGS, PLATES = ("A549", "K562", "RPE1"), ("DMSO", "d1", "d2", "d3", "d4"), ("p1", "p2")
SIZE = 8
SETS: dict[str, Any] = {"by": ["line", "drug"], "size": SIZE, "control": "DMSO"}
OPTIONS: dict[str, Any] = {
    **SETS, "objective": "counts", "batch_size": 3, "lanes": 6, "shuffle_buffer": 96, "seed": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 cells of some lines, drugs and plates in shards of several chunks; one drug is rare."""
    rng = np.random.default_rng(4)
    n = 700
    obs = {
        "line": rng.choice([*LINES, None], n, p=[0.4, 0.3, 0.28, 0.02]),
        "drug": rng.choice(DRUGS, n, p=[0.2, 0.4, 0.2, 0.19, 0.01]),
        "plate": rng.choice(PLATES, n),
    }
    folder = tmp_path_factory.mktemp("set")
    source = write(folder / "cells.h5ad", counts(n, GENES, seed=1), obs=obs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "CHUNK_BYTES", 16_384)
        quiet_pack(
            [source], folder / "set", vocab_of(GENES),
            cells_per_shard=130, obs=("line", "drug", "plate"),
        )  # fmt: skip
    return folder / "set"


# The plain sampler.

Cell = tuple[int, int]
"""Key, and how often it came before."""


def draw(key: int, i: int) -> int:
    return seeds.mix64(key + (i + 1) * seeds.GOLDEN)


class Plain:
    """The sets of a loader, from the indexes alone, with dictionaries and lists."""

    def __init__(self, root: Path, by: list[str], match: list[str], size: int, control: str,
                 small: str = "leave", seed: int = 2) -> None:  # fmt: skip
        self.size, self.small, self.seed = size, small, seed
        names = list(dict.fromkeys([*by, *match]))
        self.labels: dict[int, dict[str, int]] = {}
        kinds: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        shardset = ShardSet(root)
        for number, shard in enumerate(shardset.shards("train")):
            table = pq.read_table(root / shard.index_path).to_pydict()
            for i in range(shard.cells):
                codes = {name: table[f"obs.{name}"][i] for name in names}
                key = (table["source"][i] << 40) | table["row"][i]
                self.labels[key] = codes
                if min(codes.values()) >= 0:
                    kinds[tuple(codes.values())][number].append(key)
        control_code = shardset.manifest.labels[by[-1]].categories.index(control)
        self.controls: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
        groups: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
        for kind in sorted(kinds):
            codes = dict(zip(names, kind, strict=True))
            for shard in sorted(kinds[kind]):
                if codes[by[-1]] == control_code:
                    self.controls[tuple(codes[m] for m in match)].append(kinds[kind][shard])
                else:
                    groups[tuple(codes[b] for b in by)].append(kinds[kind][shard])
        self.match = match
        self.groups = {
            g: entries
            for g, entries in sorted(groups.items())
            if sum(map(len, entries)) >= size or small == "repeat"
        }

    def _rings(self, of: dict[tuple[int, ...], list[list[int]]], name: str, epoch: int) -> Any:
        at = 0
        for ring, (what, entries) in enumerate(sorted(of.items())):
            numbered = list(enumerate(entries, at))
            at += len(entries)
            numbered.sort(key=lambda x: draw(seeds.key(self.seed, name, "entries", epoch), x[0]))
            cells = [key for _, entry in numbered for key in entry]
            cut = (draw(seeds.key(self.seed, name, "open", epoch), ring) >> 32) * len(cells) >> 32
            yield what, cells[cut:] + cells[:cut]

    def sets(self, epoch: int) -> dict[tuple[tuple[int, ...], int], list[tuple[int, int]]]:
        """{(group, number): [(key of a cell, key of its control)]}."""
        rings = dict(self._rings(self.controls, "context", epoch))
        used: Counter[tuple[int, ...]] = Counter()
        out: dict[Any, list[tuple[int, int]]] = {}
        for group, line in self._rings(self.groups, "group", epoch):
            n = len(line) // self.size
            if not n:
                n, line = 1, line * self.size
            for i in range(n):
                out[group, i] = []
                for key in line[i * self.size : (i + 1) * self.size]:
                    context = tuple(self.labels[key][m] for m in self.match)
                    ring = rings[context]
                    out[group, i].append((key, ring[used[context] % len(ring)]))
                    used[context] += 1
        return out

    def in_order(self, epoch: int, lanes: int, buffer: int) -> list[Any]:
        """The (group, number) at each position of an epoch."""
        names = list(self.groups)
        n = [
            max(sum(map(len, e)) // self.size, int(self.small == "repeat"))
            for e in self.groups.values()
        ]
        plan = plan_epoch(
            [(np.arange(len(n)), np.array(n))], seed=self.seed, epoch=epoch, lanes=lanes,
            shuffle=True, shuffle_buffer=buffer // self.size,
        )  # fmt: skip
        _, groups, which = plan.cells_at(np.arange(sum(n)))
        return [(names[g], i) for g, i in zip(groups.tolist(), which.tolist(), strict=True)]


def pairs(batch: SetBatch) -> list[list[tuple[int, int]]]:
    """Of each set its cells' keys, each with its control's."""
    own, beside = batch.cells.key.tolist(), batch.controls.key.tolist()
    each = list(zip(own, beside, strict=True))
    return [each[i : i + batch.size] for i in range(0, len(each), batch.size)]


def epoch_of(ranks: list[CellLoader]) -> list[list[tuple[int, int]]]:
    """The sets of a pass of all ranks, in the order of positions."""
    of_rank = [[x for batch in rank for x in pairs(batch)] for rank in ranks]
    return [x for row in zip(*of_rank, strict=True) for x in row]


def ranks_of(root: Path, world: int, **options: Any) -> list[CellLoader]:
    return [loader_of(root, **OPTIONS | options, rank=r, world_size=world) for r in range(world)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, ["line"]),
        ({"match": ["line", "plate"]}, ["line", "plate"]),
        ({"match": []}, []),
        ({"by": ["plate", "drug"], "match": ["line"]}, ["line"]),
        ({"small": "repeat"}, ["line"]),
        ({"by": ["drug"]}, []),
    ],
)
@pytest.mark.parametrize("epoch", [0, 3])
def test_sets_are_those_of_a_plain_sampler(
    root: Path, options: dict[str, Any], match: list[str], epoch: int
) -> None:
    given = SETS | options
    plain = Plain(root, given["by"], match, SIZE, "DMSO", given.get("small", "leave"))
    expected = plain.sets(epoch)
    order = plain.in_order(epoch, 6, 96)
    found = [
        x for b in loader_of(root, **OPTIONS | options, epoch=epoch, drop_last=False) for x in pairs(b)
    ]  # fmt: skip
    assert found[: len(order)] == [expected[at] for at in order]
    assert all(key == (-1, -1) for x in found[len(order) :] for key in x)
    # What it is for, said once more: every set, cells once, controls that match and are used evenly.
    assert Counter(order) == Counter(expected.keys())
    cells = Counter(key for x in expected.values() for key, _ in x)
    used = Counter(key for x in expected.values() for _, key in x)
    assert given.get("small") == "repeat" or set(cells.values()) == {1}
    for entries in plain.controls.values():
        times = [used[key] for entry in entries for key in entry]
        assert max(times) - min(times) <= 1
    for x in expected.values():
        for key, control in x:
            assert all(plain.labels[key][m] == plain.labels[control][m] for m in match)


def test_a_batch_says_what_it_holds(root: Path) -> None:
    loader = loader_of(root, **OPTIONS)
    labels = loader.labels
    batch = next(iter(loader))
    assert isinstance(batch, SetBatch) and len(batch) == 3 and batch.size == SIZE
    for name in ("line", "drug"):
        per_set = batch.cells.labels[name].reshape(3, SIZE)
        assert (per_set == batch.groups[name][:, None]).all()
        assert batch.groups.text(name) == [labels[name].categories[c] for c in batch.groups[name]]
    assert (batch.controls.labels["line"].reshape(3, SIZE) == batch.groups["line"][:, None]).all()
    assert set(batch.controls.labels.text("drug")) == {"DMSO"}
    assert batch.weight.tolist() == [1, 1, 1] and batch.cells.dense().shape == (3 * SIZE, GENES)
    said = repr(batch)
    assert "SetBatch of 3 sets of 8 cells and as many controls" in said and "DMSO" in said
    moved = batch.to("meta")
    assert moved.cells.counts.device.type == moved.groups["line"].device.type == "meta"
    assert moved.groups.categories == batch.groups.categories
    assert "3 sets" in repr(loader) and "SetOptions" not in repr(loader)
    assert loader.cells == loader.sets.sets * SIZE and loader.genes[0] == "G000"


@pytest.mark.parametrize("objective", ["mask", "none", "generate", "counts"])
def test_any_objective_makes_the_two_batches(root: Path, objective: str) -> None:
    options = {"max_length": 10} if objective != "counts" else {}
    one = loader_of(root, **OPTIONS | {"objective": objective} | options)
    expected = [pairs(b) for b in loader_of(root, **OPTIONS)]
    batches = list(one)
    assert [pairs(b) for b in batches] == expected
    assert type(batches[0].cells) is type(batches[0].controls)
    if objective == "mask":
        # A control that comes again has other masks.
        seen = defaultdict(list)
        for b in batches:
            for row, key in enumerate(b.controls.key.tolist()):
                seen[key].append(b.controls.is_masked[row].tolist())
        assert any(len({tuple(m) for m in masks}) > 1 for masks in seen.values())


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_ranks_share_the_sets_in_equal_steps(root: Path, world: int) -> None:
    whole = epoch_of(ranks_of(root, 1, batch_size=12, lanes=12))
    ranks = ranks_of(root, world, batch_size=12 // world, lanes=12)
    assert len({len(rank) for rank in ranks}) == 1
    assert epoch_of(ranks) == whole
    every = [x for x in epoch_of(ranks_of(root, world, drop_last=False)) if x[0][0] >= 0]
    assert len(every) == ranks[0].sets.sets


@settings(max_examples=12)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(0, 8), st.integers(1, 4), st.integers(1, 5)
)
def test_it_resumes_anywhere_on_other_worlds_and_batch_sizes(
    root: Path, world: int, batch: int, at: int, other_world: int, other_batch: int
) -> None:
    one = ranks_of(root, world, batch_size=batch, drop_last=False)
    at = min(at, len(one[0]) - 1)
    iterators = [iter(rank) for rank in one]
    head = [[x for _ in range(at) for x in pairs(next(it))] for it in iterators]
    states = [json.loads(json.dumps(rank.state_dict())) for rank in one]
    assert all(state == states[0] for state in states)
    others = ranks_of(root, other_world, batch_size=other_batch, drop_last=False)
    for other in others:
        other.load_state_dict(states[0])
    tail = [x for x in epoch_of(others) if x[0][0] >= 0]
    whole = epoch_of(ranks_of(root, 1, batch_size=1, lanes=states[0]["lanes"], drop_last=False))
    assert [x for row in zip(*head, strict=True) for x in row] == whole[: at * batch * world]
    assert Counter(map(tuple, tail)) == Counter(map(tuple, whole[at * batch * world :]))


def test_every_number_of_threads_and_blocks_gives_the_same(root: Path) -> None:
    expected = [pairs(b) for b in loader_of(root, **OPTIONS)]
    for options in ({"threads": 1}, {"threads": 4}, {"prefetch": 1}):
        assert [pairs(b) for b in loader_of(root, **OPTIONS | options)] == expected
    with loader_of(root, **OPTIONS) as one:
        for _ in one:
            break
        one.set_epoch(5)
        again = [pairs(b) for b in one]
    assert again == [pairs(b) for b in loader_of(root, **OPTIONS, epoch=5)]


def test_workers_of_a_dataloader_give_the_same(root: Path) -> None:
    expected = [pairs(b) for b in loader_of(root, **OPTIONS)]
    dataset = dataset_of(root, **OPTIONS)
    found = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert [pairs(b) for b in found] == expected
    assert isinstance(found[0], SetBatch)
    plain = next(iter(loader_of(root, **OPTIONS)))
    assert torch.equal(found[0].cells.counts, plain.cells.counts)
    assert torch.equal(found[0].groups["drug"], plain.groups["drug"])
    with pytest.raises(ConfigError, match="sets are batches"):
        dataset_of(root, **OPTIONS, as_cells=True)


def test_a_worker_reads_what_it_makes_batches_of(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK_CELLS", 1)  # a batch of sets is mostly larger than a block
    options = OPTIONS | {"batch_size": 1, "shuffle_buffer": 8}
    whole = loader_of(root, **options)
    expected = [pairs(b) for b in whole]
    reads = []
    for step in (1, 3):
        found: list[Any] = [None] * len(expected)
        for first in range(step):
            loader = loader_of(root, **options)
            found[first::step] = [
                pairs(b) for b in loader.stream(loader.collate, first=first, step=step)
            ]
            reads.append(loader.stages().reads)
        assert found == expected
    assert max(reads[1:]) < 0.6 * reads[0], reads


def test_a_transform_is_of_set_batches(root: Path) -> None:
    loader = loader_of(root, **OPTIONS, transform=lambda batch: batch.groups["drug"].tolist())
    assert next(iter(loader)) == next(iter(loader_of(root, **OPTIONS))).groups["drug"].tolist()


def test_without_shuffle_groups_and_cells_keep_their_order(root: Path) -> None:
    loader = loader_of(root, **OPTIONS | {"lanes": 1}, shuffle=False, drop_last=False)
    batches = list(loader)
    codes = [
        (int(b.groups["line"][i]), int(b.groups["drug"][i]))
        for b in batches for i in range(len(b)) if b.weight[i]
    ]  # fmt: skip
    assert codes == sorted(codes)
    assert [pairs(b) for b in batches] == [
        pairs(b) for b in loader_of(root, **OPTIONS | {"lanes": 1}, shuffle=False, drop_last=False, epoch=4)
    ]  # fmt: skip


def test_where_and_take_choose_cells_of_sets(root: Path) -> None:
    loader = loader_of(root, **OPTIONS, where="line == 'A549'", match=["line", "plate"])
    batches = list(loader)
    assert {t for b in batches for t in b.groups.text("line")} == {"A549"}
    assert {t for b in batches for t in b.controls.labels.text("line")} == {"A549"}
    few = loader_of(root, **OPTIONS, take=300)
    assert few.sets.sets < loader_of(root, **OPTIONS).sets.sets
    for b in few:
        assert (b.cells.weight == 1).all()


def test_what_is_left_out_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ShardSet(root).manifest.labels
    with caplog.at_level(logging.INFO):
        loader = loader_of(root, **OPTIONS, epoch=0, split="train", match=["line"])
    found = loader.sets
    plain = Plain(root, ["line", "drug"], ["line"], SIZE, "DMSO", "repeat")
    sizes = {g: sum(map(len, e)) for g, e in plain.groups.items()}
    small = [n for n in sizes.values() if n < SIZE]
    assert (found.small_groups, found.small_cells) == (len(small), sum(small)) and small
    assert found.groups == len(sizes) - len(small)
    assert found.unlabelled == sum(min(x.values()) < 0 for x in plain.labels.values()) > 0
    assert found.contexts == 3 and found.unmatched == 0
    assert found.cells + found.controls + found.unlabelled + sum(small) == len(plain.labels)
    said = caplog.text
    assert f"{len(small)} groups with fewer than 8 cells are left out" in said
    assert "lack a label of line, drug and are in no set" in said
    assert f"{found.sets} sets of 8 cells from {found.groups} groups" in said
    assert labels["drug"].categories  # the set knows its categories


def test_cells_without_a_control_are_refused_or_left_out(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = "not (line == 'K562' and drug == 'DMSO')"
    with pytest.raises(ConfigError, match="have no control of the same line: K562") as e:
        loader_of(root, **OPTIONS, where=where)
    assert 'unmatched="leave"' in str(e.value)
    loader = loader_of(root, **OPTIONS, where=where, unmatched="leave")
    assert loader.sets.unmatched > 100 and "K562; they are left out" in caplog.text
    assert "K562" not in {t for b in loader for t in b.groups.text("line")}
    with pytest.raises(ConfigError, match="there is no control"):
        loader_of(root, **OPTIONS | {"match": []}, where="drug != 'DMSO'")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"by": ["line", "dose"]}, "no category 'dose'"),
        ({"control": "DMS0"}, "'drug' has no category 'DMS0'"),
        ({"match": ["batch"]}, "no category 'batch'"),
        ({"size": 1000}, "no group of line, drug has 1000 cells"),
        ({"weights": {"line": "balanced"}}, "weights is of single cells"),
        ({"domain_by": "line"}, "domain_by is of single cells"),
        ({"stratify": "line"}, "stratify is of single cells"),
        ({"epoch_cells": 100}, "epoch_cells is of single cells"),
        ({"batch_size": 500}, "sets, fewer than one global batch of 500"),
        (
            {"objective": "mask", "tokens_per_batch": 4000},
            "packed batches hold as many cells as fit",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(root: Path, options: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        loader_of(root, **OPTIONS | options)


def test_blends_and_other_kinds_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a blend gives each shard set a share"):
        CellLoader.blend({str(root): 1.0}, sets=SetOptions(**SETS))
    with pytest.raises(ConfigError, match="sets is a SetOptions, not dict"):
        CellLoader(root, sets=SETS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="by, size are fields of SetOptions"):
        CellLoader(root, by=["line"], size=3)
    known = make_set(tmp_path / "set", [30])
    with pytest.raises(ConfigError, match="no category 'age'"):
        loader_of(known.root, by=["age"], control="a")


def test_states_of_sets_and_of_cells_are_told_apart(root: Path) -> None:
    of_sets, of_cells = (
        loader_of(root, **OPTIONS),
        loader_of(root, objective="counts", seed=2, lanes=6, shuffle_buffer=96),
    )
    assert "sets" not in of_cells.state_dict()
    with pytest.raises(StateError, match="of sets of cells, and the loader of single cells"):
        of_cells.load_state_dict(of_sets.state_dict())
    with pytest.raises(StateError, match="of single cells, and the loader of sets of cells"):
        of_sets.load_state_dict(of_cells.state_dict())
    other = loader_of(root, **OPTIONS | {"size": 4})
    with pytest.raises(StateError, match=r"another sets\.size: 8 instead of 4"):
        other.load_state_dict(of_sets.state_dict())


def test_a_damaged_chunk_is_an_error_or_its_rows_weigh_nothing(root: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(root, bad)
    shard = ShardSet(bad).shards("train")[1]
    path, data = bad / shard.path, bytearray((bad / shard.path).read_bytes())
    data[int(shard.chunks.stored[:1].sum()) + 700] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ChecksumError, match="chunk 1"):
        list(loader_of(bad, **OPTIONS, drop_last=False))
    options = {"drop_last": False, "on_bad_shard": "quarantine"}
    loader = loader_of(bad, **OPTIONS, **options)
    batches = list(loader)
    ends = np.cumsum(shard.chunks.cells)
    table = pq.read_table(bad / shard.index_path).to_pydict()
    keys = [(s << 40) | r for s, r in zip(table["source"], table["row"], strict=True)]
    gone = set(keys[ends[0] : ends[1]])
    expected = [pairs(b) for b in loader_of(root, **OPTIONS, drop_last=False)]
    lost = lambda key: -1 if key in gone else key  # noqa: E731
    assert [pairs(b) for b in batches] == [
        [[(lost(a), lost(b)) for a, b in x] for x in batch] for batch in expected
    ]
    for b in batches:
        assert b.cells.weight.tolist() == [float(k >= 0) for k in b.cells.key.tolist()]
    assert sum(one.cells for one in loader.lost) > 0 and loader.lost[0].chunk == 1
    index = bad / ShardSet(bad).shards("train")[2].index_path
    whole = loader_of(bad, **OPTIONS, **options)
    index.write_bytes(b"x" + index.read_bytes()[1:])
    lost_rows = sum(int((b.cells.weight == 0).sum()) for b in whole)
    assert lost_rows > 0 and {one.chunk for one in whole.lost} == {1, None}


def test_a_shard_whose_index_is_bad_from_the_start_is_left_out(root: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(root, bad)
    index = bad / ShardSet(bad).shards("train")[2].index_path
    gone = pq.read_table(index).to_pydict()
    index.write_bytes(b"x" + index.read_bytes()[1:])
    with pytest.raises(ChecksumError, match="the index is not the one that was packed"):
        loader_of(bad, **OPTIONS | {"seed": 77})
    # Of another seed, no loader of the whole set may still be in use, whose counts would do.
    loader = loader_of(bad, **OPTIONS | {"seed": 78}, on_bad_shard="quarantine")
    assert 0 < loader.sets.sets < loader_of(root, **OPTIONS).sets.sets
    lost = {(s << 40) | r for s, r in zip(gone["source"], gone["row"], strict=True)}
    for b in loader:
        assert (b.cells.weight == 1).all() and (b.controls.weight == 1).all()
        assert not lost & {*b.cells.key.tolist(), *b.controls.key.tolist()}


def test_from_s3_it_is_the_same(root: Path, s3: S3) -> None:
    import s3fs

    fs = s3fs.S3FileSystem()
    fs.put(str(root), f"{s3.url}/set", recursive=True)
    expected = [pairs(b) for b in loader_of(root, **OPTIONS, drop_last=False)]
    with loader_of(f"{s3.url}/set", **OPTIONS, drop_last=False) as loader:
        assert [pairs(b) for b in loader] == expected
        assert len(list(loader)) == len(expected)


def test_who_drops_an_iterator_ends_its_threads(root: Path) -> None:
    """Nothing that a thread waits for holds the loader, its cells or what was announced."""
    loader = loader_of(root, **OPTIONS)
    batches = iter(loader)
    kept = next(batches)
    store = weakref.ref(loader._stores._stores[0])
    del batches, loader
    until = time.monotonic() + 60
    while store() is not None and time.monotonic() < until:
        time.sleep(0.02)
        gc.collect()  # of a wait that was given up, the error and its frames are a cycle
    assert store() is None
    assert len(pairs(kept)) == 3


def test_memory_is_bounded_and_said(root: Path) -> None:
    loader = loader_of(root, **OPTIONS)
    # Two buffers of 96 cells, as sets with their controls.
    assert loader.sets.held_cells == 2 * (96 // SIZE) * 2 * SIZE
    assert loader.sets.held_bytes == loader.sets.held_cells * loader._shards.cell_bytes
    list(loader)
    (store,) = loader._stores._stores
    # And the blocks that threads are at, or that are handed out.
    assert int(store._state[0]) <= loader.sets.held_cells + 8 * 3 * 2 * SIZE
    assert loader_of(root, **OPTIONS | {"batch_size": 20}).sets.held_cells == 2 * 20 * 2 * SIZE


def test_shards_in_which_groups_lie_far_apart_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "CHUNK_BYTES", 8_192)
    donors = np.tile(np.arange(10), 200)
    names = tuple("abcdefghij")
    options = {
        "by": ["donor"], "control": "a", "size": 20, "batch_size": 1, "shuffle_buffer": 40, "lanes": 1,
    }  # fmt: skip
    mixed = make_set(tmp_path / "mixed", [1000, 1000], categories=names, donors=donors)
    loader = loader_of(mixed.root, **options)
    assert loader.sets.reads > 4 * loader.sets.chunks
    list(loader)
    # Reads of indexes are counted, too.
    indexes = len(loader.shardset.shards("train"))
    assert 0.7 * loader.sets.reads < loader.stages().reads - indexes < 1.3 * loader.sets.reads
    assert "read each chunk about" in caplog.text and "--group-by donor" in caplog.text
    assert loader.sets.sums == 20 and "kinds of cells" not in caplog.text
    monkeypatch.setattr(groups, "_MANY_SUMS", 10)
    loader_of(mixed.root, **options)
    assert "20 kinds of cells in all shards together take 3.0 kB" in caplog.text
    caplog.clear()
    sorted_ = make_set(tmp_path / "s", [1000, 1000], categories=names, donors=np.sort(donors))
    loader = loader_of(sorted_.root, **options)
    assert loader.sets.reads < 1.5 * loader.sets.chunks and "read each chunk" not in caplog.text
    list(loader)
    assert loader.stages().reads < 3 * loader.sets.chunks

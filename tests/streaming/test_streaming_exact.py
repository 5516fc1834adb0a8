"""What is exact at any scale, over odd sizes: each cell once, on any ranks, resumed anywhere, in any epoch."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import loader_of
from shardsets import Known, make_set

from scshards.streaming.loader import CellLoader

SHAPES: dict[str, list[int]] = {
    "one cell": [1],
    "two shards of one": [1, 1],
    "few": [3, 1, 2],
    "one shard": [97],
    "unequal": [60, 1, 33, 90, 16],
    "many small": [5, 2, 7, 1, 3, 9, 4, 4, 8, 1, 6, 5, 2, 11, 3],
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Known]:
    folder = tmp_path_factory.mktemp("sets")
    return {
        name: make_set(folder / str(i), sizes, n_genes=60, longest=50, seed=i)
        for i, (name, sizes) in enumerate(SHAPES.items())
    }


def loader(known: Known, **options: Any) -> CellLoader:
    return loader_of(known.root, **{"threads": 1, "max_length": 20, **options})


def rank_loaders(known: Known, world: int, **options: Any) -> list[CellLoader]:
    return [loader(known, rank=r, world_size=world, **options) for r in range(world)]


def cells_of(one: CellLoader) -> list[int]:
    return [k for batch in one for k in batch.key.tolist() if k >= 0]


@settings(max_examples=60)
@given(
    shape=st.sampled_from(list(SHAPES)),
    world=st.integers(1, 16),
    batch=st.integers(1, 9),
    lanes=st.sampled_from([1, 2, 7, 16, 48, 64]),
    buffer=st.sampled_from([1, 10, 100, 5000]),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_each_cell_once_over_all_ranks(
    sets: dict[str, Known],
    shape: str,
    world: int,
    batch: int,
    lanes: int,
    buffer: int,
    shuffle: bool,
    drop_last: bool,
) -> None:
    n, whole = sum(SHAPES[shape]), world * batch
    drop_last = drop_last and n >= whole
    ranks = rank_loaders(
        sets[shape], world, batch_size=batch, lanes=lanes, shuffle_buffer=buffer,
        shuffle=shuffle, drop_last=drop_last,
    )  # fmt: skip
    steps = n // whole if drop_last else -(-n // whole)
    assert {len(r) for r in ranks} == {steps}
    assert {r.dropped_cells for r in ranks} == {n - steps * whole if drop_last else 0}
    seen: Counter[int] = Counter()
    for one in ranks:
        batches = list(one)
        assert len(batches) == steps and {len(b) for b in batches} <= {batch}
        if drop_last:
            assert all(b.weight.min() == 1 for b in batches)
        seen.update(k for b in batches for k in b.key.tolist() if k >= 0)
    assert set(seen.values()) <= {1} and set(seen) <= set(range(n))
    assert len(seen) == (steps * whole if drop_last else n)


@settings(max_examples=30)
@given(data=st.data())
def test_any_change_of_topology_at_any_step(sets: dict[str, Known], data: st.DataObject) -> None:
    """With cells dropped or not: none twice, and none missing but those of the last global batch."""
    shape = data.draw(st.sampled_from(list(SHAPES)), label="shape")
    n = sum(SHAPES[shape])
    epoch = data.draw(st.integers(0, 5), label="epoch")
    lanes = data.draw(st.sampled_from([3, 16, 64]), label="lanes")
    drop_last = data.draw(st.booleans(), label="drop_last") and n > 1
    seen: Counter[int] = Counter()
    state: dict[str, Any] | None = None
    parts = data.draw(st.integers(1, 4), label="parts")
    for part in range(parts):
        world = data.draw(st.integers(1, 16), label="world")
        batch = data.draw(st.integers(1, 6), label="batch")
        if drop_last and world * batch > n:
            world = batch = 1
        ranks = rank_loaders(
            sets[shape], world, batch_size=batch, lanes=lanes, epoch=epoch, shuffle_buffer=40,
            drop_last=drop_last,
        )  # fmt: skip
        if state is not None:
            for one in ranks:
                one.load_state_dict(json.loads(json.dumps(state)))
        if ranks[0].epoch > epoch:
            break  # what was left of it is less than one of these batches
        (steps,) = {r.batches_left for r in ranks}
        is_last = part == parts - 1
        stop = steps if is_last else data.draw(st.integers(0, steps), label="stop")
        states = []
        for one in ranks:
            iterator = iter(one)
            for _ in range(stop):
                seen.update(k for k in next(iterator).key.tolist() if k >= 0)
            states.append(one.state_dict())
            iterator.close()
        assert all(s == states[0] for s in states)
        state = states[0]
        if state["epoch"] > epoch:
            break  # all of it came already
    assert set(seen.values()) <= {1}
    missing = n - len(seen)
    assert 0 <= missing < world * batch if drop_last else missing == 0


@pytest.mark.parametrize("shape", ["unequal", "one shard", "many small"])
def test_no_two_epochs_have_an_order_in_common(sets: dict[str, Known], shape: str) -> None:
    one = loader(sets[shape], batch_size=1, shuffle_buffer=60)
    orders = [tuple(cells_of(one)) for _ in range(12)]
    assert len(set(orders)) == 12
    assert len({tuple(sorted(o)) for o in orders}) == 1
    n = len(orders[0])
    for a in range(12):
        for b in range(a):
            # A shuffled cell is in the same place by chance only.
            same = sum(x == y for x, y in zip(orders[a], orders[b], strict=True))
            assert same <= 0.15 * n
    seeds = {tuple(cells_of(loader(sets[shape], batch_size=1, seed=s))) for s in range(8)}
    assert len(seeds) == 8


def test_a_cells_sample_and_masks_do_not_depend_on_who_reads_it(sets: dict[str, Known]) -> None:
    def rows(ranks: list[CellLoader]) -> dict[int, tuple[Any, ...]]:
        found = {}
        for one in ranks:
            for batch in one:
                for i, key in enumerate(batch.key.tolist()):
                    n = int((~batch.is_pad[i]).sum())
                    found[key] = (
                        tuple(batch.genes[i, :n].tolist()),
                        tuple(batch.targets[i, :n].tolist()),
                        tuple(batch.is_masked[i, :n].tolist()),
                    )
        return found

    known = sets["unequal"]
    one = rows(rank_loaders(known, 1, batch_size=8, drop_last=False, epoch=3))
    assert sum(len(genes) == 20 for genes, _, _ in one.values()) > 80  # sampled
    for world, options in ((3, {"lanes": 5}), (16, {"threads": 4}), (2, {"shuffle": False})):
        other = rows(
            rank_loaders(known, world, batch_size=5, drop_last=False, epoch=3, **options)  # type: ignore[arg-type]
        )
        assert all(other[k] == row for k, row in one.items() if k >= 0)
    later = rows(rank_loaders(known, 1, batch_size=8, drop_last=False, epoch=4))
    assert sum(later[k][2] != row[2] for k, row in one.items() if k >= 0) > 150


def test_the_order_is_of_the_cells_not_of_their_address(
    sets: dict[str, Known], tmp_path: Path
) -> None:
    known = sets["unequal"]
    shutil.copytree(known.root, tmp_path / "elsewhere")
    here = loader(known, batch_size=4)
    there = loader_of(tmp_path / "elsewhere", threads=1, max_length=20, batch_size=4)
    there.load_state_dict(here.state_dict())
    assert cells_of(here) == cells_of(there)

"""Packed batches: the cells of the padded ones, in a fixed number of tokens, on every rank in step."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import loader_of
from shardsets import Known, encode_cell, make_set

from scshards.base.errors import ConfigError
from scshards.cells.batch import PackedBatch
from scshards.cells.vocab import Vocab
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.packing import cells_per_batch, fitting_room
from scshards.streaming.loader import CellLoader
from scshards.streaming.read.source import CellBytes

VOCAB = Vocab([f"g{i}" for i in range(400)]).with_specials()
FIELDS = ("genes", "values", "targets", "is_masked")


def pair(
    lengths: list[int | None], total: int, options: CollateOptions, padded: CollateOptions
) -> tuple[PackedBatch, Any]:
    rng = np.random.default_rng(0)
    members = [
        b"" if n is None else encode_cell(np.sort(rng.choice(400, n, replace=False)).tolist(), rng.integers(1, 9, n))
        for n in lengths
    ]  # fmt: skip
    sizes = np.array([len(m) for m in members], np.int64)
    data = np.frombuffer(b"".join(members) or b"\0", np.uint8)
    read = CellBytes(data, np.cumsum(sizes) - sizes, sizes, np.arange(len(sizes)), np.zeros((len(sizes), 0), np.int64))  # fmt: skip
    (packed,) = Collator(replace(options, tokens_per_batch=total), VOCAB, "counts", 3).collate(
        read, 1
    )
    assert isinstance(packed, PackedBatch)
    return packed, Collator(padded, VOCAB, "counts", 3).collate(read, 1)[0]


@settings(max_examples=100)
@given(
    lengths=st.lists(st.none() | st.integers(0, 300), min_size=1, max_size=12),
    extra=st.integers(0, 900),
    zeros=st.integers(0, 5),
    exact=st.booleans(),
)
def test_the_cells_of_the_padded_batch(
    lengths: list[int | None], extra: int, zeros: int, exact: bool
) -> None:
    total = len(lengths) * (2 + zeros) + extra
    own = {"include_zero_genes": zeros, "exact_mask": exact}
    n = np.array([x or 0 for x in lengths])
    others = sum(1 if x is None else 1 + zeros for x in lengths)
    # The plain rule: as long as the longest that lets all fit.
    room = max(r for r in range(200) if others + np.minimum(n, r).sum() <= total)
    packed, padded = pair(
        lengths, total,
        CollateOptions(max_length=200 + zeros, **own), CollateOptions(max_length=1 + zeros + room, **own),
    )  # fmt: skip
    assert packed.genes.shape == (total,) and packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 200 + zeros and len(packed) == len(lengths)
    ends = packed.cu_seqlens.tolist()
    assert ends[0] == 0 and len(ends) == len(lengths) + 1
    for b in range(len(lengths)):
        row = slice(ends[b], ends[b + 1])
        size = int((~padded.is_pad[b]).sum())
        assert ends[b + 1] - ends[b] == size <= packed.max_seqlen
        assert all(torch.equal(getattr(packed, f)[row], getattr(padded, f)[b, :size]) for f in FIELDS)  # fmt: skip
    rest = slice(ends[-1], None)
    assert packed.is_pad[rest].all() and not packed.is_pad[: ends[-1]].any()
    assert (packed.genes[rest] == VOCAB.pad_id).all() and not packed.is_masked[rest].any()
    assert (packed.values[rest] == -2).all() and (packed.targets[rest] == -2).all()
    assert packed.weight.tolist() == [float(x is not None) for x in lengths]
    assert packed.genes_cut == np.minimum(n, 199).sum() - np.minimum(n, room).sum()
    # No token is left free that a cell was cut for.
    if room < 199:
        assert total - ends[-1] < len(lengths)


@given(
    n=st.lists(st.integers(0, 50), min_size=1, max_size=9), room=st.integers(0, 40), t=st.integers(0, 400)
)  # fmt: skip
def test_the_room_is_the_largest_that_fits(n: list[int], room: int, t: int) -> None:
    fits = [r for r in range(room + 1) if sum(min(x, r) for x in n) <= t]
    assert fitting_room(np.array(n), room, t) == max(fits)


def test_as_many_cells_as_the_mean_says() -> None:
    options = CollateOptions()
    assert cells_per_batch(32768, options, 3500.0, None) == 27  # of 1200 tokens
    assert cells_per_batch(32768, options, 800.0, None) == 40
    assert cells_per_batch(32768, options, 800.0, 10) == 10
    assert cells_per_batch(1200, options, 3500.0, None) == 1
    assert cells_per_batch(100, CollateOptions(include_zero_genes=7), 0.5, None) == 11


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), [60, 33, 107], longest=30)


def loader(known: Known, **options: Any) -> CellLoader:
    given = {"tokens_per_batch": 100, "lanes": 12, "shuffle_buffer": 48, "max_length": 25}
    return loader_of(known.root, **given | options)


def same(a: PackedBatch, b: PackedBatch) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in (*FIELDS, "cu_seqlens", "key"))


def test_shapes_never_change_and_ranks_stay_in_step(known: Known) -> None:
    ranks = [list(loader(known, rank=r, world_size=3, drop_last=False)) for r in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    shapes = {(b.genes.shape, b.cu_seqlens.shape, b.key.shape) for own in ranks for b in own}
    assert len(shapes) == 1
    keys = [k for own in ranks for b in own for k in b.key.tolist() if k >= 0]
    assert sorted(keys) == list(range(200))
    real = sum(int((~b.is_pad).sum()) for own in ranks[:1] for b in own[:-1])
    assert real > 0.8 * 100 * (len(ranks[0]) - 1)


@pytest.mark.parametrize("threads", [2, 8])
def test_the_same_bits_for_any_threads_and_after_a_resume(known: Known, threads: int) -> None:
    whole = list(loader(known, threads=1))
    assert all(map(same, loader(known, threads=threads), whole))
    part = loader(known)
    iterator = iter(part)
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(part.state_dict()))
    iterator.close()
    rest = loader(known, threads=threads)
    rest.load_state_dict(state)
    assert rest.batches_left == len(whole) - 5 and all(map(same, rest, whole[5:]))


def test_a_packed_batch_moves_whole(known: Known) -> None:
    moved = next(iter(loader(known))).to("meta")
    assert moved.cu_seqlens.device.type == "meta" and moved.key.device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "generate"}, "generate"),
        ({"pad_to": "max"}, "pad_to"),
        ({"device_collate": True}, "device_collate"),
        ({"tokens_per_batch": 1}, "at least 2"),
        ({"batch_size": 51}, "one gene each"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cant_be_packed(known: Known, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loader(known, **options)

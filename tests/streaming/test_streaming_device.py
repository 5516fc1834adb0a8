"""Cells that become a batch on their device: the same bits as on the CPU, a fifth of the bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import loader_of
from plain_collator import chances
from shardsets import encode_cell, make_set

from scshards.base import seeds
from scshards.cells.batch import Batch, GenerateBatch
from scshards.cells.vocab import Vocab
from scshards.shards.manifest import LabelInfo
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.device import RaggedBatch, _chances, _draw
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.read.source import CellBytes

VOCAB = Vocab([f"g{i}" for i in range(500)]).with_specials()
LABELS = {"donor": LabelInfo(kind="category", categories=("a", "b"))}


def assert_same(a: Batch | GenerateBatch, b: Batch | GenerateBatch) -> None:
    assert type(a) is type(b)
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and x.shape == y.shape, field.name
            assert torch.equal(x, y.cpu()), field.name
        elif isinstance(x, dict):
            assert all(
                x[k].equal(y[k]) or x[k].allclose(y[k], 0, 0, equal_nan=True) for k in (*x, *y)
            )
        else:
            assert x == y


def both(
    lengths: list[int | None],
    options: CollateOptions,
    *,
    vocab: Vocab = VOCAB,
    kind: str = "counts",
    top: int = 30,
    seed: int = 0,
) -> tuple[Batch | GenerateBatch, RaggedBatch]:
    """The same cells, made into a batch here and for a device."""
    rng = np.random.default_rng(seed)
    members = []
    for n in lengths:
        if n is None:
            members.append(b"")
            continue
        genes = np.sort(rng.choice(len(vocab) - 3, n, replace=False)).tolist()
        values = rng.integers(1, top + 1, n)
        members.append(encode_cell(genes, values if kind == "counts" else values / 8, kind=kind))
    sizes = np.array([len(m) for m in members], np.int64)
    data = np.frombuffer(b"".join(members) or b"\0", np.uint8)
    labels = rng.integers(-1, 2, (len(members), 1))
    keys = rng.integers(0, 2**50, len(members))
    read = CellBytes(data, np.cumsum(sizes) - sizes, sizes, keys, labels)
    position = int(rng.integers(1000))
    ways = [dataclasses.replace(options, device_collate=d) for d in (False, True)]
    made = [Collator(w, vocab, kind, 9, LABELS).collate(read, 3, position)[0] for w in ways]
    assert not isinstance(made[0], RaggedBatch) and isinstance(made[1], RaggedBatch)
    return made[0], made[1]


@st.composite
def options(draw: st.DrawFn) -> CollateOptions:
    objective = draw(st.sampled_from(["mask", "generate", "none"]))
    ratio = st.sampled_from([0.01, 0.25, 0.4, 1 / 3, 0.75, 0.99])
    style = draw(st.sampled_from(["bins", "log1p", "counts"]))
    return CollateOptions(
        max_length=draw(st.integers(14, 200)),
        objective=objective,
        mask_ratio=None if objective == "none" else draw(ratio),
        exact_mask=objective == "mask" and draw(st.booleans()),
        values=style,
        n_bins=draw(st.sampled_from([2, 51, 256, 300])),
        include_zero_genes=draw(st.integers(0, 9)),
        conditions=draw(st.sampled_from([(), ("donor",)])),
        keep_first=draw(st.sampled_from([None, 2, 4])),
        pad_to=draw(st.sampled_from(["longest", "max", 16])),
    )


@settings(max_examples=120)
@given(
    options=options(),
    lengths=st.lists(st.none() | st.integers(0, 300), min_size=1, max_size=6),
    top=st.sampled_from([30, 70_000]),
    seed=st.integers(0, 1000),
)
def test_the_same_bits(
    options: CollateOptions, lengths: list[int | None], top: int, seed: int
) -> None:
    here, ragged = both(lengths, options, top=top, seed=seed)
    assert len(ragged) == len(here) and ragged.cell_keys == here.cell_keys
    assert_same(here, ragged.to("cpu"))


def test_fractions_and_large_vocabularies() -> None:
    for style in (51, 0):
        here, ragged = both([40, 300], CollateOptions(n_bins=style), kind="float")
        assert ragged.values.dtype == (torch.uint8 if style else torch.float32)
        assert_same(here, ragged.to("cpu"))
    large = Vocab([f"g{i}" for i in range(70_000)]).with_specials()
    here, ragged = both([400, 3], CollateOptions(max_length=100), vocab=large)
    assert ragged.genes.dtype == torch.int32
    assert_same(here, ragged.to("cpu"))


def test_types_are_as_small_as_values_allow() -> None:
    def kind(**chosen: Any) -> torch.dtype:
        top = chosen.pop("top", 30)
        return both([50], CollateOptions(**chosen), top=top)[1].values.dtype

    assert kind() == kind(n_bins=256) == torch.uint8
    assert kind(n_bins=257) == kind(values="counts") == torch.uint16
    assert kind(values="counts", top=10_000_000) == torch.float32
    assert kind(values="log1p") == kind(values="counts", target_sum=1e4) == torch.float32


@pytest.mark.parametrize("chosen", [{}, {"exact_mask": True}, {"objective": "generate"}])
def test_a_fifth_of_the_bytes(chosen: dict[str, Any]) -> None:
    here, ragged = both([400] * 8, CollateOptions(max_length=301, **chosen))

    def size(batch: object) -> int:
        fields = (getattr(batch, f.name) for f in dataclasses.fields(batch))
        return sum(x.nbytes for x in fields if isinstance(x, torch.Tensor))

    assert size(ragged) < size(here) * (0.24 if not chosen.get("objective") else 0.4)


@settings(max_examples=50)
@given(
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), share=st.integers(0, 65535)
)
def test_draws_are_those_of_the_cpu(keys: list[int], share: int) -> None:
    own = torch.from_numpy(np.array(keys, np.uint64).view(np.int64))
    drawn = _draw(own[:, None], torch.arange(100))
    bits = _chances(own, share, torch.arange(150))
    for i, key in enumerate(keys):
        assert np.array_equal(drawn[i].numpy().view(np.uint64), seeds.draws(key, np.arange(100)))
        assert np.array_equal(bits[i].numpy() != 0, chances(key, share, 150))


@pytest.mark.parametrize("chosen", [{}, {"objective": "generate", "conditions": ["donor"]}])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_loader_of_them(tmp_path: Any, chosen: dict[str, Any], threads: int) -> None:
    make_set(tmp_path, [60, 33, 90], longest=30)
    same = {"batch_size": 8, "lanes": 12, "shuffle_buffer": 48, "drop_last": False, **chosen}
    plain = loader_of(tmp_path, threads=threads, **same)
    ragged = loader_of(tmp_path, threads=threads, device_collate=True, **same)
    # Where a batch is finished does not change what it is: a state goes from one to the other.
    ragged.load_state_dict(plain.state_dict())
    for here, other in zip(plain, ragged, strict=True):
        assert_same(here, other.to("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", [{}, {"exact_mask": True}, {"objective": "generate"}])
def test_the_same_bits_on_a_gpu(chosen: dict[str, Any]) -> None:
    here, ragged = both([900, 30, None, 0], CollateOptions(max_length=300, **chosen), vocab=Vocab([f"g{i}" for i in range(60_000)]).with_specials())  # fmt: skip
    moved = ragged.to("cuda", non_blocking=True)
    assert moved.weight.device.type == "cuda" and moved.key.device.type == "cpu"
    assert_same(here, moved)

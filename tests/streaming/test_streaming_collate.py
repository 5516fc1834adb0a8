"""Members -> Batch: bins, samples, masks and padding against plain numpy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_bins import bin_values
from plain_collator import chances
from shardsets import encode_cell

from scshards.base import seeds
from scshards.base.errors import ConfigError, FormatError
from scshards.cells.batch import Batch
from scshards.cells.vocab import Vocab
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.read.source import CellBytes

GOLDEN = Path(__file__).parent.parent / "golden" / "binning.npz"
VOCAB = Vocab([f"g{i}" for i in range(20_000)]).with_specials()


def collate(
    cells: list[tuple[list[int], list[float]]],
    *,
    kind: str = "counts",
    seed: int = 0,
    epoch: int = 0,
    keys: list[int] | None = None,
    **options: object,
) -> Batch:
    members = [encode_cell(g, v, kind=kind) for g, v in cells]
    sizes = np.array([len(m) for m in members], np.int64)
    read = CellBytes(
        np.frombuffer(b"".join(members), np.uint8).copy(), np.cumsum(sizes) - sizes, sizes,
        np.array(keys if keys is not None else range(len(cells)), np.int64), np.zeros((len(cells), 0), np.int64),
    )  # fmt: skip
    return Collator(CollateOptions(**options), VOCAB, kind, seed).collate(read, epoch)[0]


def random_cell(rng: np.random.Generator, n: int, top: int = 50) -> tuple[list[int], list[float]]:
    genes = np.sort(rng.choice(5000, n, replace=False))
    return genes.tolist(), np.ceil(rng.lognormal(0, 1.2, n)).clip(1, top).astype(int).tolist()


def test_bins_are_the_reference_digits() -> None:
    golden = np.load(GOLDEN)
    indptr, values, bins = golden["indptr"], golden["values"], golden["bins"]
    for a, b in itertools.pairwise(indptr):
        row = values[a:b]
        for kind in ("counts", "float"):
            if kind == "counts" and (row != np.floor(row)).any():
                continue
            batch = collate(
                [(list(range(b - a)), row.tolist())], kind=kind, max_length=20_001, mask_ratio=0
            )
            assert np.array_equal(batch.targets[0, 1:].numpy(), bins[a:b].astype(np.float32))


@settings(max_examples=150)
@given(
    values=st.lists(st.integers(1, 70000) | st.integers(1, 9), min_size=1, max_size=300),
    n_bins=st.integers(2, 60),
)
def test_bins_equal_numpy(values: list[int], n_bins: int) -> None:
    row = np.array(values)
    batch = collate([(list(range(len(row))), values)], n_bins=n_bins, mask_ratio=0)
    assert np.array_equal(batch.targets[0, 1:].numpy(), bin_values(row, n_bins).astype(np.float32))
    assert np.array_equal(batch.values, batch.targets)


@settings(max_examples=50)
@given(values=st.lists(st.floats(0.0009765625, 1e6, width=32), min_size=1, max_size=200))
def test_bins_of_fractions_equal_numpy(values: list[float]) -> None:
    row = np.array(values, np.float32)
    batch = collate([(list(range(len(row))), values)], kind="float", mask_ratio=0)
    assert np.array_equal(batch.targets[0, 1:].numpy(), bin_values(row, 51).astype(np.float32))


@settings(max_examples=50)
@given(
    values=st.lists(st.integers(1, 6) | st.just(100_000), min_size=1, max_size=200),
    key=st.integers(0, 2**50),
)
def test_random_ties_are_the_keyed_draw(values: list[int], key: int) -> None:
    genes = np.arange(len(values)) * 3
    batch = collate(
        [(genes.tolist(), values)], tie_break="random", mask_ratio=0, keys=[key], seed=7, epoch=2
    )
    cell = int(seeds.draws(seeds.key(7, "tie", 2), np.array([key]))[0])
    u = ((seeds.draws(cell, genes) >> np.uint64(11)).astype(np.float64) + 1) / 2**53
    expected = bin_values(np.array(values), 51, u)
    assert np.array_equal(batch.targets[0, 1:].numpy(), expected.astype(np.float32))
    assert expected.min() >= 1


def test_random_ties_are_uniform() -> None:
    cells = [([1, 2, 3], [4, 4, 4])] * 4000
    targets = collate(cells, tie_break="random", mask_ratio=0).targets[:, 1:].numpy().ravel()
    counts = np.bincount(targets.astype(int), minlength=51)[1:]
    assert counts.min() > 0 and abs(counts - 240).max() < 6 * np.sqrt(240)


def test_long_cells_are_sampled_and_short_ones_padded() -> None:
    rng = np.random.default_rng(0)
    long, short = random_cell(rng, 900), random_cell(rng, 20)
    batch = collate([long, short], max_length=300, n_bins=0, mask_ratio=0.3)
    assert batch.genes.shape == (2, 300) and batch.genes.dtype == torch.int32
    assert batch.genes[:, 0].tolist() == [VOCAB.cls_id] * 2
    known = dict(zip(*long, strict=True))
    genes = batch.genes[0, 1:].tolist()
    assert len(set(genes)) == 299 and genes == sorted(genes)
    assert [known[g] for g in genes] == batch.targets[0, 1:].tolist()
    assert batch.genes[1, 1:21].tolist() == short[0] and batch.targets[1, 1:21].tolist() == short[1]
    assert (batch.genes[1, 21:] == VOCAB.pad_id).all() and (batch.values[1, 21:] == -2).all()
    assert batch.is_pad.sum(1).tolist() == [0, 279] and batch.is_pad[1, 21:].all()
    assert not batch.is_masked[:, 0].any() and not (batch.is_masked & batch.is_pad).any()
    assert (batch.values[batch.is_masked] == -1).all()
    assert torch.equal(batch.values[~batch.is_masked], batch.targets[~batch.is_masked])
    assert (batch.values[:, 0] == -2).all()


def test_the_batch_is_as_long_as_its_longest_cell() -> None:
    rng = np.random.default_rng(1)
    assert collate([random_cell(rng, 7), random_cell(rng, 31)]).genes.shape == (2, 32)
    assert collate([random_cell(rng, 31)], max_length=32).is_pad.sum() == 0


@pytest.mark.parametrize(("n", "length"), [(1000, 101), (1000, 901), (64, 33), (65, 65)])
def test_samples_are_uniform_over_genes(n: int, length: int) -> None:
    genes = list(range(n))
    batch = collate([(genes, [1] * n)] * 2000, max_length=length)
    counts = np.bincount(batch.genes[:, 1:].numpy().ravel(), minlength=n)[:n]
    p = (length - 1) / n
    assert counts.sum() == 2000 * (length - 1)
    assert abs(counts - 2000 * p).max() < 6 * np.sqrt(2000 * p * (1 - p) + 1)
    # Pairs too: neither neighbours nor ends of the cell come together more often than by chance.
    kept = np.zeros((2000, n), bool)
    np.put_along_axis(kept, batch.genes[:, 1:].numpy().astype(int), True, axis=1)
    both = (kept[:, 0] & kept[:, -1]).sum(), (kept[:, 10] & kept[:, 11]).sum()
    q = p * (length - 2) / (n - 1)
    assert all(abs(x - 2000 * q) < 6 * np.sqrt(2000 * q * (1 - q) + 1) for x in both)


def test_masks_are_the_keyed_draw_of_each_place() -> None:
    rng = np.random.default_rng(2)
    cell = random_cell(rng, 400)
    batch = collate([cell, cell], keys=[5, 6], seed=3, epoch=4, mask_ratio=0.25)
    for row, key in enumerate((5, 6)):
        base = int(seeds.draws(seeds.key(3, "mask", 4), np.array([key]))[0])
        expected = chances(base, 1 << 14, 1 + len(cell[0]))
        assert np.array_equal(batch.is_masked[row, 1:].numpy(), expected[1:])
    rate = collate([random_cell(rng, 1000)] * 50, mask_ratio=0.4).is_masked[:, 1:].float().mean()
    assert abs(rate - 0.4) < 0.02


def test_a_cell_is_the_same_in_any_company() -> None:
    rng = np.random.default_rng(3)
    cells = [random_cell(rng, n) for n in (500, 90, 700)]
    together = collate(cells, keys=[11, 12, 13], max_length=200)
    for i, cell in enumerate(cells):
        alone = collate([cell], keys=[11 + i], max_length=200)
        n = alone.genes.shape[1]
        for name in ("genes", "values", "targets", "is_masked", "is_pad"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i, :n])
    other = collate(cells, keys=[11, 12, 13], max_length=200, epoch=1)
    assert not torch.equal(other.genes, together.genes)


def test_values_as_they_are() -> None:
    assert collate([([1, 2], [3, 70000])], n_bins=0, mask_ratio=0).targets[0].tolist() == [
        -2,
        3,
        70000,
    ]
    batch = collate([([1, 2], [0.5, 2.25])], kind="float", n_bins=0, mask_ratio=0, cls_value=0.0)
    assert batch.targets[0].tolist() == [0, 0.5, 2.25]


def test_a_row_without_a_cell_is_cls_and_padding() -> None:
    member = np.frombuffer(encode_cell([1, 2], [3, 4]), np.uint8).copy()
    sizes, keys = np.array([len(member), 0]), np.array([0, -1])
    read = CellBytes(member, np.zeros(2, np.int64), sizes, keys, np.zeros((2, 0), np.int64))
    (batch,) = Collator(CollateOptions(), VOCAB, "counts", 0).collate(read, 0)
    assert batch.weight.tolist() == [1, 0] and batch.is_pad[1].tolist() == [False, True, True]
    assert batch.cell_keys == ["000000-0000000000"]


def test_an_empty_cell_is_cls_alone() -> None:
    batch = collate([([], [])])
    assert batch.genes.tolist() == [[VOCAB.cls_id]] and batch.weight.tolist() == [1]


def test_a_gene_outside_the_vocabulary_is_an_error_that_names_the_cell() -> None:
    with pytest.raises(FormatError, match="outside the vocabulary") as e:
        collate([([1], [1]), ([20_003], [1])], keys=[1, (2 << 40) | 17])
    assert "000002-0000000017" in str(e.value)


@pytest.mark.parametrize(
    "options", [{"max_length": 1}, {"mask_ratio": 1.0}, {"n_bins": 1}, {"tie_break": "low"}]
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CollateOptions(**options)

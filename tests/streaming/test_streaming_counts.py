"""objective="counts": rows of counts, beside what was packed and a plain dense matrix of it."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import cell_bytes, dataset_of, loader_of
from s3_start import S3
from shardsets import Known, encode_cell, make_set

from scshards.base.errors import ConfigError, FormatError, StateError
from scshards.cells.vocab import Vocab
from scshards.shards.manifest import LabelInfo
from scshards.streaming.collate.counts import CountsBatch, CountsCollator
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.read.source import CellBytes

GENES = 90
NAMES = [f"g{i}" for i in range(GENES)]
VOCABS = {
    "specials last": Vocab(NAMES).with_specials(),
    "specials first": Vocab(["<pad>", "<cls>", *NAMES]).with_specials(),
    "specials between": Vocab([*NAMES[:50], "<pad>", "<cls>", *NAMES[50:]]).with_specials(),
}
LABELS = {"donor": LabelInfo(kind="category", categories=("a", "b"))}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), [40, 7, 23, 31], n_genes=60, longest=50)


def collate(cells: list[dict[str, int]], vocab: Vocab, **options: Any) -> CountsBatch:
    """A batch of cells told as {gene: count}; an empty one fills up the batch."""
    made = CountsCollator(CollateOptions(objective="counts", **options), vocab, "counts", 0, LABELS)
    return made.collate(cell_bytes(cells, vocab), 0)[0]


def plain(cells: list[dict[str, int]], genes: list[str]) -> np.ndarray:
    return np.array([[cell.get(gene, 0) for gene in genes] for cell in cells], np.float32)


@settings(max_examples=150)
@given(data=st.data())
def test_rows_are_the_counts_that_were_packed(data: st.DataObject) -> None:
    vocab = VOCABS[data.draw(st.sampled_from(sorted(VOCABS)))]
    top = data.draw(st.sampled_from([1, 200, 65_535, 65_536, 1 << 40]))
    counts = st.integers(1, top)
    cells = data.draw(
        st.lists(
            st.dictionaries(st.sampled_from(NAMES), counts, max_size=80), min_size=1, max_size=6
        )
    )
    wanted = data.draw(
        st.none() | st.lists(st.sampled_from(NAMES), min_size=1, max_size=GENES, unique=True)
    )
    is_sorted = data.draw(st.booleans())
    if wanted is not None and is_sorted:
        wanted.sort(key=NAMES.index)
    batch = collate(cells, vocab, genes=wanted)
    genes = NAMES if wanted is None else wanted
    expected = plain(cells, genes)
    assert batch.n_genes == len(genes)
    np.testing.assert_array_equal(batch.dense().numpy(), expected)
    np.testing.assert_array_equal(batch.sparse().to_dense().numpy(), expected)
    assert batch.library.tolist() == [sum(cell.values()) for cell in cells]
    assert batch.weight.tolist() == [float(bool(cell)) for cell in cells]
    assert batch.indptr.tolist() == [0, *np.cumsum((expected > 0).sum(axis=1)).tolist()]
    has_large = any(count > 65_535 for cell in cells for count in cell.values())
    assert batch.counts.dtype == (torch.int64 if has_large else torch.uint16)
    for a, z in zip(batch.indptr[:-1].tolist(), batch.indptr[1:].tolist(), strict=True):
        assert (np.diff(batch.genes[a:z].numpy().astype(np.int64)) > 0).all()


def test_more_columns_than_16_bits_hold() -> None:
    vocab = Vocab([f"g{i}" for i in range(70_000)]).with_specials()
    cells = [{"g0": 1, "g65536": 2, "g69999": 300}, {"g65535": 70_000, "g69998": 1}]
    batch = collate(cells[:1], vocab)
    assert batch.genes.dtype == torch.int32
    assert batch.genes.tolist() == [0, 65_536, 69_999]
    assert collate(cells, vocab).genes.tolist() == [0, 65_536, 69_999, 65_535, 69_998]


def test_a_loader_gives_the_cells_of_its_order(known: Known) -> None:
    options: dict[str, Any] = {"batch_size": 8, "seed": 4, "shuffle_buffer": 20, "lanes": 8}
    masked = [b.key.tolist() for b in loader_of(known.root, max_length=20, **options)]
    with loader_of(known.root, objective="counts", **options) as loader:
        batches = list(loader)
    assert [b.key.tolist() for b in batches] == masked
    assert loader.genes == tuple(known.vocab.tokens[:60])
    for batch in batches:
        dense = batch.dense()
        for row, key in enumerate(batch.key.tolist()):
            assert np.flatnonzero(dense[row]).tolist() == known.genes[key].tolist()
            assert dense[row][known.genes[key]].tolist() == known.values[key].tolist()
            assert batch.labels["donor"][row] == known.donor[key]


@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_it_resumes_on_two_ranks_and_another_batch_size(known: Known, at: int) -> None:
    options: dict[str, Any] = {
        "objective": "counts", "genes": ["g3", "g1"], "seed": 1, "lanes": 8, "shuffle_buffer": 16,
    }  # fmt: skip
    whole = loader_of(known.root, batch_size=4, **options)
    batches = iter(whole)
    seen = [k for _ in range(at) for k in next(batches).key.tolist()]
    state = json.loads(json.dumps(whole.state_dict()))
    batches.close()
    ranks = [
        loader_of(known.root, batch_size=3, rank=rank, world_size=2, drop_last=False, **options)
        for rank in range(2)
    ]
    rest: list[int] = []
    for loader in ranks:
        loader.load_state_dict(state)
        got = list(loader)
        assert all(b.n_genes == 2 for b in got)
        rest += [k for b in got for k in b.key.tolist() if k >= 0]
    assert sorted(seen + rest) == sorted(known.genes)


def test_a_state_tells_lists_of_genes_apart(known: Known, tmp_path: Path) -> None:
    state = loader_of(known.root, objective="counts", genes=["g1", "g2"]).state_dict()
    assert len(json.dumps(state)) < 2_000
    file = tmp_path / "genes.txt"
    file.write_text("g1\n\ng2\n")
    loader_of(known.root, objective="counts", genes=str(file)).load_state_dict(state)
    other = loader_of(known.root, objective="counts", genes=["g2", "g1"])
    with pytest.raises(StateError, match=r"another collate\.genes"):
        other.load_state_dict(state)
    old = loader_of(known.root).state_dict()
    del old["collate"]["genes"]
    loader_of(known.root).load_state_dict(old)


def test_of_many_genes_a_repr_names_three_and_counts_them(known: Known, tmp_path: Path) -> None:
    names = [f"g{i}" for i in range(59, -1, -1)]
    (tmp_path / "genes.txt").write_text("\n".join(names))
    for genes in (names, tmp_path / "genes.txt"):
        loader = loader_of(known.root, objective="counts", genes=genes)
        assert "genes=('g59', 'g58', 'g57', ... 60 in all)" in repr(loader)
        assert "g56" not in repr(loader) and "g56" not in repr(loader.options)
        copied = pickle.loads(pickle.dumps(loader.options["collate"]))  # noqa: S301
        assert copied == loader.options["collate"] and loader.genes == tuple(names)
    assert "genes=('g2', 'g1')" in repr(
        loader_of(known.root, objective="counts", genes=["g2", "g1"])
    )


def test_what_makes_no_sense_is_refused(known: Known, tmp_path: Path) -> None:
    for options, what in (
        ({"max_length": 100}, "max_length is no option of objective='counts'"),
        ({"n_bins": 0}, "n_bins is no option"),
        ({"tokens_per_batch": 500}, "tokens_per_batch is no option"),
        ({"genes": []}, "the list of genes is empty"),
        ({"genes": ["g1", "g1"]}, "the gene g1 is in it twice"),
        ({"genes": 3}, "names of genes or a file"),
        ({"genes": "no/such/file"}, "the list of genes can't be read"),
    ):
        with pytest.raises(ConfigError, match=re.escape(what)):
            CollateOptions(objective="counts", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give objective='counts'"):
        CollateOptions(genes=("g1",))
    with pytest.raises(ConfigError, match=r"1 of 2 genes are not in the vocabulary.*'h1'"):
        loader_of(known.root, objective="counts", genes=["g1", "h1"])
    floats = make_set(tmp_path / "floats", [90], kind="float")
    with pytest.raises(ConfigError, match="holds fractions"):
        loader_of(floats.root, objective="counts")


@pytest.mark.parametrize("genes", [None, ["g1", "g5"], ["g5", "g1"]])
def test_a_bad_member_is_named(genes: list[str] | None) -> None:
    vocab = VOCABS["specials last"]
    good, bad = encode_cell([1, 5], [3, 4]), encode_cell([1, len(vocab)], [1, 1])
    sizes = np.array([len(good), len(bad)], np.int64)
    read = CellBytes(
        np.frombuffer(good + bad, np.uint8),
        np.cumsum(sizes) - sizes,
        sizes,
        np.array([0, 9], np.int64),
        np.zeros((2, 1), np.int64),
    )
    options = CollateOptions(objective="counts", genes=None if genes is None else tuple(genes))
    with pytest.raises(FormatError, match="000000-0000000009"):
        CountsCollator(options, vocab, "counts", 0, LABELS).collate(read, 0)


def test_workers_of_a_dataloader_give_the_same(known: Known) -> None:
    options: dict[str, Any] = {"objective": "counts", "batch_size": 8, "lanes": 8}
    expected = list(loader_of(known.root, **options))
    made = dataset_of(known.root, **options)
    found = list(torch.utils.data.DataLoader(made, batch_size=None, num_workers=2))
    for batch, other in zip(found, expected, strict=True):
        assert batch.key.tolist() == other.key.tolist()
        assert torch.equal(batch.dense(), other.dense())


def test_counts_come_from_s3(s3: S3, tmp_path: Path) -> None:
    url = f"{s3.url}/set"
    known = make_set(tmp_path, [30, 20], url=url)
    with loader_of(url, objective="counts", batch_size=10, drop_last=False) as loader:
        rows = {k: row for b in loader for k, row in zip(b.key.tolist(), b.dense(), strict=True)}
    assert rows.keys() == known.genes.keys()
    assert all(rows[k][known.genes[k]].tolist() == known.values[k].tolist() for k in rows)

"""objective="ranks": rows of genes by falling value, beside a plain formula of what was packed."""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import cell_bytes, dataset_of, loader_of
from s3_start import S3
from shardsets import Known, encode_cell, make_set

from scshards.base.errors import ConfigError, FormatError, StateError
from scshards.cells.batch import RankBatch
from scshards.cells.vocab import Vocab
from scshards.shards.manifest import LabelInfo
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.ranks import RankCollator
from scshards.streaming.read.source import CellBytes
from scshards.streaming.wds import Collate

GENES = 90
NAMES = [f"g{i}" for i in range(GENES)]
VOCABS = {
    "specials last": Vocab(NAMES).with_specials(),
    "specials first": Vocab(["<pad>", "<mask>", "<cls>", "<eos>", *NAMES]),
    "specials between": Vocab([*NAMES[:50], "<pad>", "<cls>", *NAMES[50:]]).with_specials(),
}
LABELS = {"donor": LabelInfo(kind="category", categories=("a", "b"))}
MEDIANS = {f"g{i}": 1 + (i * 7 % 11) / 3 for i in range(60)}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), [40, 7, 23, 31], n_genes=60, longest=50)


def collator(
    vocab: Vocab, medians: dict[str, float], seed: int = 0, **options: Any
) -> RankCollator:
    made = CollateOptions(objective="ranks", medians=medians, **options)
    return RankCollator(made, vocab, "counts", seed, LABELS)


def plain(cell: dict[str, int], medians: dict[str, float], vocab: Vocab, room: int) -> list[int]:
    """The formula: counts by medians, the highest first, ties by rising id, cut."""
    genes = sorted(vocab[g] for g in cell if g in medians)
    values = np.array([cell[vocab.tokens[g]] / np.float64(medians[vocab.tokens[g]]) for g in genes])
    order = np.lexsort((genes, -values)) if genes else []
    return [genes[i] for i in order][:room]


def of_total(cell: dict[str, int], medians: dict[str, float], vocab: Vocab) -> list[int]:
    """The published formula, as fractions: counts by the cell's sum, times 10,000, by medians."""
    total = sum(cell.values())
    value = {g: Fraction(c, total) * 10_000 / Fraction(medians[g]) for g, c in cell.items()}
    return [vocab[g] for g in sorted(cell, key=lambda g: (-value[g], vocab[g]))]


def tokens_of(batch: RankBatch, row: int) -> list[int]:
    """What is there, masks undone, padding aside."""
    genes, targets = batch.genes[row], batch.targets[row]
    return torch.where(targets >= 0, targets, genes)[~batch.is_pad[row]].tolist()


COUNTS = st.sampled_from([1, 1, 1, 2, 3, 4, 7, 200, 65_535, 65_536, 1 << 40])


@settings(max_examples=200)
@given(data=st.data())
def test_rows_are_those_of_the_formula(data: st.DataObject) -> None:
    vocab = VOCABS[data.draw(st.sampled_from(sorted(VOCABS)))]
    most = data.draw(st.sampled_from([1, 5, 65_535, 1 << 45]))
    counts = st.integers(1, most) | COUNTS.filter(lambda c: c <= most)
    cells = data.draw(
        st.lists(
            st.dictionaries(st.sampled_from(NAMES), counts, max_size=90), min_size=1, max_size=6
        )
    )
    some = st.sampled_from([1.0, 2.0, 3.0, 0.25, 1.0000001]) | st.floats(1e-6, 1e6)
    medians = data.draw(st.dictionaries(st.sampled_from(NAMES), some, min_size=1))
    add_cls, add_eos = data.draw(st.booleans()), data.draw(st.booleans())
    leads = add_cls + add_eos
    max_length = data.draw(st.integers(leads + 1, 95))
    ratio = data.draw(st.sampled_from([0, 0.15, 0.9]))
    pad_to = data.draw(st.sampled_from(["longest", "max", 8]))
    made = collator(
        vocab, medians, max_length=max_length, mask_ratio=ratio, pad_to=pad_to, add_cls=add_cls,
        add_eos=add_eos,
    )  # fmt: skip
    (batch,) = made.collate(cell_bytes(cells, vocab), 0)
    expected = [plain(cell, medians, vocab, max_length - leads) for cell in cells]
    longest = leads + max(map(len, expected))
    length = {"longest": longest, "max": max_length, 8: min(max_length, -(-longest // 8) * 8)}
    assert batch.genes.shape == batch.targets.shape == batch.is_pad.shape
    assert batch.genes.shape == (len(cells), length[pad_to])
    assert [t.dtype for t in (batch.genes, batch.targets, batch.left_out)] == [torch.int32] * 3
    for row, (cell, genes) in enumerate(zip(cells, expected, strict=True)):
        cls, eos = [made.vocab["<cls>"]] * add_cls, [made.vocab["<eos>"]] * add_eos
        assert tokens_of(batch, row) == [*cls, *genes, *eos]
        n = leads + len(genes)
        assert batch.is_pad[row].tolist() == [i >= n for i in range(length[pad_to])]
        assert set(batch.genes[row, n:].tolist()) <= {made.vocab["<pad>"]}
        hidden = batch.targets[row] >= 0
        assert not hidden[:add_cls].any() and not hidden[add_cls + len(genes) :].any()
        assert set(batch.targets[row][~hidden].tolist()) <= {-100}
        assert ratio > 0 or not hidden.any()
        assert batch.left_out[row] == sum(g not in medians for g in cell)
    assert batch.weight.tolist() == [float(bool(cell)) for cell in cells]


@settings(max_examples=60)
@given(
    cell=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 9), min_size=1),
    medians=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]), min_size=90, max_size=90),
)
def test_the_sum_of_a_cell_changes_no_order(cell: dict[str, int], medians: list[float]) -> None:
    vocab, by_gene = VOCABS["specials last"], dict(zip(NAMES, medians, strict=True))
    made = collator(vocab, by_gene, add_cls=False, add_eos=False)
    (batch,) = made.collate(cell_bytes([cell], vocab), 0)
    assert tokens_of(batch, 0) == of_total(cell, by_gene, vocab)


@pytest.mark.parametrize("top", [1, 3, 1000])
def test_large_cells_whose_values_lie_close_together(top: int) -> None:
    """Thousands of values within a millionth, and a few far off, so that their upper bits say little."""
    rng = np.random.default_rng(top)
    names = [f"g{i}" for i in range(6000)]
    vocab = Vocab(names).with_specials()
    medians = dict(zip(names, (1 + rng.permutation(6000) * 1e-10).tolist(), strict=True))
    medians["g0"], medians["g1"] = 1e-9, 1e9
    some = rng.choice(6000, 4000, replace=False)
    cell = {names[i]: int(c) for i, c in zip(some, rng.integers(1, top + 1, 4000), strict=True)}
    cell |= {"g0": 2, "g1": 2}
    made = collator(vocab, medians, max_length=3000)
    (batch,) = made.collate(cell_bytes([cell], vocab), 0)
    assert tokens_of(batch, 0)[1:-1] == plain(cell, medians, vocab, 2998)


def test_masks_are_berts_and_the_same_wherever_a_cell_is() -> None:
    vocab = VOCABS["specials first"]
    medians = {name: 1.0 + i for i, name in enumerate(NAMES[:80])}
    cells = [dict.fromkeys(NAMES[:80], 1 + i % 3) for i in range(3000)]
    made = collator(vocab, medians, seed=5)
    (batch,) = made.collate(cell_bytes(cells, vocab), 2)
    hidden = batch.targets >= 0
    shown = batch.genes[hidden]
    truth = batch.targets[hidden]
    n = 80 * 3000
    for share, found, of in (
        (0.15, int(hidden.sum()), n),
        (0.8, int((shown == vocab["<mask>"]).sum()), len(shown)),
        # One of 80 is replaced by itself.
        (0.1 * 79 / 80, int(((shown != vocab["<mask>"]) & (shown != truth)).sum()), len(shown)),
    ):
        assert abs(found / of - share) < 5 * math.sqrt(share * (1 - share) / of)
    replaced = shown[(shown != vocab["<mask>"]) & (shown != truth)]
    assert set(replaced.tolist()) <= {vocab[name] for name in NAMES[:80]}
    assert len(set(replaced.tolist())) == 80
    by_place = hidden.float().mean(dim=0)[1:-1]
    assert ((by_place - 0.15).abs() < 5 * math.sqrt(0.15 * 0.85 / 3000)).all()
    # Alone, and in another order; but not in another epoch, of another seed, or a second time.
    (one,) = made.collate(cell_bytes([cells[7], cells[3]], vocab, [7, 3]), 2)
    assert torch.equal(one.genes, batch.genes[[7, 3]])
    assert torch.equal(one.targets, batch.targets[[7, 3]])
    again = np.array([1, 0])
    for other in (
        made.collate(cell_bytes([cells[7], cells[3]], vocab, [7, 3]), 3)[0],
        collator(vocab, medians, seed=6).collate(cell_bytes(cells[:1], vocab, [7]), 2)[0],
        made.collate(cell_bytes([cells[7], cells[3]], vocab, [7, 3]), 2, 0, again)[0],
    ):
        assert not torch.equal(other.targets[0], batch.targets[7])


def test_it_goes_into_bert() -> None:
    vocab = VOCABS["specials first"]
    made = collator(vocab, dict.fromkeys(NAMES, 1.0))
    (batch,) = made.collate(cell_bytes([{"g1": 4, "g2": 1}, {"g3": 1}], vocab), 0)
    fed = batch.to_bert()
    assert list(fed) == ["input_ids", "attention_mask", "labels"]
    assert all(t.dtype == torch.int64 and t.shape == (2, 4) for t in fed.values())
    assert fed["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert torch.equal(fed["input_ids"], batch.genes.long())
    assert torch.equal(fed["labels"], batch.targets.long())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_size", [4, 9])
def test_a_loader_gives_the_cells_of_its_order(known: Known, threads: int, batch_size: int) -> None:
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": 4,
        "shuffle_buffer": 20,
        "lanes": 8,
    }
    options["threads"] = threads
    masked = [b.key.tolist() for b in loader_of(known.root, max_length=20, **options)]
    options |= {"objective": "ranks", "medians": MEDIANS, "max_length": 20}
    with loader_of(known.root, **options) as loader:
        batches = list(loader)
    assert [b.key.tolist() for b in batches] == masked
    alone = collator(known.vocab, MEDIANS, seed=4, max_length=20)
    for batch in batches:
        for row, key in enumerate(batch.key.tolist()):
            counts = known.values[key].tolist()
            cell = {f"g{g}": c for g, c in zip(known.genes[key], counts, strict=True)}
            assert tokens_of(batch, row)[1:-1] == plain(cell, MEDIANS, known.vocab, 18)
            assert batch.labels["donor"][row] == known.donor[key]
            (one,) = alone.collate(cell_bytes([cell], known.vocab, [key]), 0)
            n = one.genes.shape[1]
            assert torch.equal(one.genes[0], batch.genes[row, :n])
            assert torch.equal(one.targets[0], batch.targets[row, :n])


@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_it_resumes_on_two_ranks_and_another_batch_size(known: Known, at: int) -> None:
    options: dict[str, Any] = {
        "objective": "ranks", "medians": MEDIANS, "seed": 1, "lanes": 8, "shuffle_buffer": 16,
    }  # fmt: skip
    whole = loader_of(known.root, batch_size=4, drop_last=False, **options)
    batches = iter(whole)
    seen = [k for _ in range(at) for k in next(batches).key.tolist()]
    state = json.loads(json.dumps(whole.state_dict()))
    expected = {
        k: (b.genes[i][~b.is_pad[i]].tolist(), b.targets[i][~b.is_pad[i]].tolist())
        for b in batches
        for i, k in enumerate(b.key.tolist())
        if k >= 0
    }
    ranks = [
        loader_of(known.root, batch_size=3, rank=rank, world_size=2, drop_last=False, **options)
        for rank in range(2)
    ]
    rest: dict[int, Any] = {}
    steps = set()
    for loader in ranks:
        loader.load_state_dict(state)
        got = list(loader)
        steps.add(len(got))
        for b in got:
            for i, k in enumerate(b.key.tolist()):
                if k < 0:
                    assert b.weight[i] == 0 and (~b.is_pad[i]).sum() == 2
                    continue
                assert k not in rest
                there = ~b.is_pad[i]
                rest[k] = (b.genes[i][there].tolist(), b.targets[i][there].tolist())
    assert len(steps) == 1
    assert rest == expected and sorted([*seen, *rest]) == sorted(known.genes)


def test_a_ratio_is_drawn_for_each_batch_of_several(known: Known) -> None:
    options: dict[str, Any] = {"objective": "ranks", "medians": MEDIANS, "batch_size": 16}
    loader = loader_of(known.root, mask_ratio=[0, 0.9], **options)
    hides = {bool((b.targets >= 0).any()) for b in loader}
    assert hides == {False, True}


def test_medians_come_from_a_file_and_a_state_tells_them_apart(
    known: Known, tmp_path: Path
) -> None:
    state = loader_of(known.root, objective="ranks", medians=MEDIANS).state_dict()
    assert len(json.dumps(state)) < 2_000
    file = tmp_path / "medians.json"
    file.write_text(json.dumps(dict(reversed(MEDIANS.items()))))
    loader = loader_of(known.root, objective="ranks", medians=str(file))
    loader.load_state_dict(json.loads(json.dumps(state)))
    assert "medians=GeneMedians of 60 genes" in repr(loader)
    options = loader.options["collate"]
    assert isinstance(options, CollateOptions) and dict(options.medians) == MEDIANS  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(options))  # noqa: S301  # as DataLoader's workers are given it
    assert again == options
    other = loader_of(known.root, objective="ranks", medians=MEDIANS | {"g3": 9.5})
    with pytest.raises(StateError, match=r"another collate\.medians"):
        other.load_state_dict(state)
    old = loader_of(known.root).state_dict()
    for name in ("medians", "add_cls", "add_eos"):
        del old["collate"][name]
    loader_of(known.root).load_state_dict(old)


def test_what_a_vocabulary_lacks_is_appended(known: Known) -> None:
    for options in ({}, {"add_cls": False, "add_eos": False, "mask_ratio": 0.0}):
        loader = loader_of(known.root, objective="ranks", medians=MEDIANS, **options)
        assert loader.vocab.tokens == (*known.vocab.tokens, "<mask>", "<eos>")
    full = VOCABS["specials first"]
    assert collator(full, MEDIANS).vocab is full


def test_genes_without_a_median_are_said(known: Known, caplog: pytest.LogCaptureFixture) -> None:
    some = {name: m for name, m in MEDIANS.items() if name not in ("g3", "g5")} | {"absent": 3.0}
    with caplog.at_level(logging.WARNING):
        loader_of(known.root, objective="ranks", medians=some)
    assert "2 of 60 genes of the vocabulary have no median" in caplog.text and "g3" in caplog.text
    caplog.clear()
    loader_of(known.root, objective="ranks", medians=MEDIANS)
    assert caplog.text == ""


def test_what_makes_no_sense_is_refused(known: Known, tmp_path: Path) -> None:
    broken, pickled = tmp_path / "broken.json", tmp_path / "medians.pickle"
    broken.write_text("{")
    pickled.write_bytes(pickle.dumps(MEDIANS))
    for options, what in (
        ({"n_bins": 0}, "n_bins is no option of objective='ranks'"),
        ({"genes": ["g1"]}, "genes is no option of objective='ranks'"),
        ({"tokens_per_batch": 500}, "tokens_per_batch is no option"),
        ({"conditions": ["donor"]}, "conditions is no option"),
        ({"max_length": 2}, "it is at least 3, not 2: 2 for <cls> and <eos>"),
        ({"mask_ratio": 1.0}, "it is in [0, 1), not 1.0"),
        ({"medians": {}}, "there are no medians"),
        ({"medians": {"g1": 0}}, "a median is a number above 0"),
        ({"medians": {"g1": float("nan")}}, "a median is a number above 0"),
        ({"medians": {"g1": "2"}}, "a median is a number above 0"),
        ({"medians": [1.0]}, "medians by gene or a JSON file of them are needed"),
        ({"medians": "no/such/file"}, "the medians can't be read"),
        ({"medians": str(broken)}, "the medians can't be read"),
        ({"medians": str(pickled)}, "--from-pickle"),
    ):
        with pytest.raises(ConfigError, match=re.escape(what)):
            CollateOptions(objective="ranks", **options)  # type: ignore[arg-type]
    for name, value in (("medians", MEDIANS), ("add_eos", False)):
        with pytest.raises(ConfigError, match="give objective='ranks'"):
            CollateOptions(**{name: value})
    with pytest.raises(ConfigError, match=r"scshards genes ROOT --medians"):
        loader_of(known.root, objective="ranks")
    with pytest.raises(ConfigError, match=r"no gene of the vocabulary has a median.*'g0'.*'ENSG1'"):
        loader_of(known.root, objective="ranks", medians={"ENSG1": 1.0})
    floats = make_set(tmp_path / "floats", [90], kind="float")
    with pytest.raises(ConfigError, match=r"divides counts by medians.*holds fractions"):
        loader_of(floats.root, objective="ranks", medians=MEDIANS)


def test_a_bad_member_is_named() -> None:
    vocab = VOCABS["specials last"]
    good, bad = encode_cell([1, 5], [3, 4]), encode_cell([1, len(vocab)], [1, 1])
    sizes = np.array([len(good), len(bad)], np.int64)
    read = CellBytes(
        np.frombuffer(good + bad, np.uint8), np.cumsum(sizes) - sizes, sizes,
        np.array([0, 9], np.int64), np.zeros((2, 1), np.int64),
    )  # fmt: skip
    with pytest.raises(FormatError, match="000000-0000000009"):
        collator(vocab, MEDIANS).collate(read, 0)


def same(batch: RankBatch, other: RankBatch) -> None:
    assert batch.key.tolist() == other.key.tolist()
    for name in ("genes", "targets", "is_pad", "left_out"):
        assert torch.equal(batch[name], other[name])


def test_workers_of_a_dataloader_give_the_same(known: Known) -> None:
    options: dict[str, Any] = {
        "objective": "ranks",
        "medians": MEDIANS,
        "batch_size": 8,
        "lanes": 8,
    }
    expected = list(loader_of(known.root, **options))
    made = dataset_of(known.root, **options)
    found = list(torch.utils.data.DataLoader(made, batch_size=None, num_workers=2))
    for batch, other in zip(found, expected, strict=True):
        same(batch, other)


def test_a_webdataset_pipeline_gives_the_same(known: Known) -> None:
    options = CollateOptions(objective="ranks", medians=MEDIANS, max_length=30)
    shards = sorted(str(p) for p in known.root.glob("train/*.tar"))
    found = list(
        wds.DataPipeline(
            wds.SimpleShardList(shards),
            wds.tarfile_to_samples(),
            Collate(known.root, 10, seed=3, collate=options),
        )
    )
    once: dict[str, Any] = {"shuffle": False, "lanes": 1, "drop_last": False, "seed": 3}
    loader = loader_of(
        known.root, objective="ranks", medians=MEDIANS, max_length=30, batch_size=10, **once
    )
    for batch, other in zip(found, loader, strict=True):
        n = len(batch)
        assert batch.key.tolist() == other.key[:n].tolist()
        assert torch.equal(batch.genes, other.genes[:n])
        assert torch.equal(batch.targets, other.targets[:n])


def test_ranks_come_from_s3(s3: S3, tmp_path: Path) -> None:
    url = f"{s3.url}/set"
    known = make_set(tmp_path, [30, 20], url=url)
    take = partial(loader_of, objective="ranks", medians=MEDIANS, batch_size=10, drop_last=False)
    with take(url) as loader:
        rows = {k: tokens_of(b, i) for b in loader for i, k in enumerate(b.key.tolist())}
    assert rows.keys() == known.genes.keys()
    for key, row in rows.items():
        counts = known.values[key].tolist()
        cell = {f"g{g}": c for g, c in zip(known.genes[key], counts, strict=True)}
        assert row[1:-1] == plain(cell, MEDIANS, known.vocab, 1198)

"""Every objective and every way to show values, against the plain collator and by their distributions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import loader_of
from plain_collator import PlainCell, PlainCollator
from shardsets import Known, encode_cell, make_set

from scshards.base.errors import ConfigError, StateError
from scshards.cells.batch import Batch, GenerateBatch
from scshards.cells.vocab import Vocab
from scshards.shards.manifest import LabelInfo
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.loader import CellLoader
from scshards.streaming.read.source import CellBytes

GOLDEN = Path(__file__).parent.parent / "golden"
GENES = 300
VOCAB = Vocab([f"g{i}" for i in range(GENES)]).with_specials()
LABELS = {
    "donor": LabelInfo(kind="category", categories=("a", "b")),
    "age": LabelInfo(kind="number"),
    "tissue": LabelInfo(kind="category", categories=("blood", "lung", "")),
}


def collate(
    cells: list[tuple[np.ndarray, np.ndarray] | None],
    options: CollateOptions,
    *,
    kind: str = "counts",
    vocab: Vocab = VOCAB,
    labels: np.ndarray | None = None,
    seed: int = 0,
    epoch: int = 0,
    position: int = 0,
    keys: np.ndarray | None = None,
) -> Batch | GenerateBatch:
    members = [b"" if c is None else encode_cell(*map(list, c), kind=kind) for c in cells]
    sizes = np.array([len(m) for m in members], np.int64)
    if keys is None:
        keys = np.arange(len(cells), dtype=np.int64)
    if labels is None:
        labels = np.full((len(cells), len(LABELS)), -1, np.int64)
    data = np.frombuffer(b"".join(members) or b"\0", np.uint8)
    read = CellBytes(data, np.cumsum(sizes) - sizes, sizes, keys, labels)
    return Collator(options, vocab, kind, seed, LABELS).collate(read, epoch, position)[0]


def cell(rng: np.random.Generator, n: int, top: int = 12) -> tuple[np.ndarray, np.ndarray]:
    return np.sort(rng.choice(GENES, n, replace=False)), rng.integers(1, top + 1, n)


def fields(batch: Batch | GenerateBatch) -> dict[str, np.ndarray]:
    names = (n for n in type(batch).__slots__ if isinstance(getattr(batch, n), torch.Tensor))
    return {n: getattr(batch, n).numpy() for n in names}


@st.composite
def all_options(draw: st.DrawFn, kind: str = "counts") -> CollateOptions:
    objective = draw(st.sampled_from(["mask", "generate", "none"]))
    lowest = 0.01 if objective == "generate" else 0.0
    ratio = st.floats(lowest, 0.99)
    ratios = st.none() | ratio | st.lists(ratio, min_size=1, max_size=4).map(tuple)
    style = draw(st.sampled_from(["bins", "log1p", "counts"] if kind == "counts" else ["bins"]))
    conditions = draw(st.sampled_from([(), ("donor",), ("tissue", "donor")]))
    zeros = draw(st.integers(0, 9) | st.just(GENES))
    room = draw(st.integers(1, 60))
    kept = draw(st.none() | st.integers(0, room - 1))
    return CollateOptions(
        max_length=1 + len(conditions) + zeros + room,
        objective=objective,
        mask_ratio=None if objective == "none" else draw(ratios),
        exact_mask=objective == "mask" and draw(st.booleans()),
        values=style,
        n_bins=draw(st.integers(2, 60)),
        tie_break=draw(st.sampled_from(["high", "random"])),
        target_sum=draw(st.none() | st.just(1e4)) if style != "bins" else None,
        include_zero_genes=zeros,
        conditions=conditions,
        keep_first=None if kept is None else 1 + len(conditions) + kept,
        pad_to=draw(st.sampled_from(["longest", "max", 8, 64])),
        cls_value=draw(st.sampled_from([None, 0.0])),
    )


@settings(max_examples=120)
@given(data=st.data())
def test_batches_are_those_of_the_plain_collator(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["counts", "counts", "float"]))
    options = data.draw(all_options(kind))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    room = options.room
    lengths = data.draw(
        st.lists(
            st.none() | st.integers(0, 200) | st.sampled_from([1, room, room + 1]),
            min_size=1,
            max_size=5,
        )
    )
    top = data.draw(st.sampled_from([1, 12, 100_000]))
    cells = [None if n is None else cell(rng, n, top) for n in lengths]
    if kind == "float":
        cells = [None if c is None else (c[0], np.float32(c[1] / 7)) for c in cells]
    keys = rng.integers(0, 2**50, len(cells))
    codes = rng.integers(-1, 2, (len(cells), 3))
    seed, epoch, position = 5, int(rng.integers(3)), int(rng.integers(10_000))
    batch = collate(
        cells, options, kind=kind, labels=codes, seed=seed, epoch=epoch, position=position, keys=keys
    )  # fmt: skip
    plain = PlainCollator(options, VOCAB, seed, epoch)
    # Tokens behind the vocabulary: column by column, categories, then the missing value.
    ids, behind = {}, len(VOCAB)
    for column in options.conditions:
        names = [c for c in LABELS[column].categories if c] + [""]
        ids[column] = {name: behind + i for i, name in enumerate(names)}
        behind += len(names)
    known = list(LABELS)
    rows = []
    for c, key, code in zip(cells, keys, codes, strict=True):
        own = [
            ids[x]["" if code[known.index(x)] < 0 else LABELS[x].categories[code[known.index(x)]]]
            for x in options.conditions
        ]
        rows.append(PlainCell(int(key), *(c or (None, None)), own))
    if options.objective == "generate":
        assert isinstance(batch, GenerateBatch) and batch.ratio == plain.ratio(position)
        expected = plain.generated(rows, position)
    else:
        assert isinstance(batch, Batch)
        expected = plain.masked(rows, position)
    found = fields(batch)
    assert set(found) == set(expected)
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        if options.values == "log1p" and name in ("values", "targets", "known_values"):
            # numpy and the compiler's library may round log1p differently.
            assert np.allclose(found[name], want.astype(np.float32), rtol=3e-7, atol=0), name
        elif options.values == "log1p" and name == "unknown_targets":
            assert np.allclose(found[name], want.astype(np.float32), rtol=3e-7, atol=0)
        else:
            assert np.array_equal(found[name], want.astype(found[name].dtype)), name
    assert batch.weight.tolist() == [float(c is not None) for c in cells]


@pytest.mark.parametrize(("ratio", "known", "unknown"), [(0.25, 901, 299), (0.5, 601, 599), (0.75, 301, 899)])  # fmt: skip
def test_the_parts_have_the_shapes_of_the_reference(ratio: float, known: int, unknown: int) -> None:
    vocab = Vocab([f"g{i}" for i in range(3000)]).with_specials()
    rng = np.random.default_rng(0)
    cells = [(np.sort(rng.choice(3000, n, replace=False)), rng.integers(1, 9, n)) for n in (2500, 1199, 800)]  # fmt: skip
    batch = collate(cells, CollateOptions(objective="generate", mask_ratio=ratio), vocab=vocab)
    assert batch.known_genes.shape == (3, known) and batch.unknown_genes.shape == (3, unknown)
    scgpt = batch.to_scgpt()
    assert {n: t.dtype for n, t in scgpt.items()} == {
        "pcpt_gene": torch.int64, "pcpt_expr": torch.float32,
        "gen_gene": torch.int64, "gen_expr_target": torch.float32,
    }  # fmt: skip
    assert (scgpt["pcpt_gene"][:, 0] == vocab.cls_id).all() and (scgpt["pcpt_expr"][:, 0] == -2).all()  # fmt: skip
    masked = collate(cells, CollateOptions(), vocab=vocab)
    for row, (genes, _) in enumerate(cells):
        parts = [
            batch.known_genes[row][~batch.known_is_pad[row]][1:].tolist(),
            batch.unknown_genes[row][~batch.unknown_is_pad[row]].tolist(),
        ]
        n = min(1199, len(genes))
        assert len(parts[1]) == int(n * ratio)
        # The two parts are the cell's sample, the one that every objective has.
        both = sorted(parts[0] + parts[1])
        assert both == masked.genes[row, 1 : n + 1].tolist() and set(both) <= set(genes.tolist())
        values = dict(zip(masked.genes[row].tolist(), masked.targets[row].tolist(), strict=True))
        seen = batch.known_values[row][~batch.known_is_pad[row]][1:].tolist()
        hidden = batch.unknown_targets[row][~batch.unknown_is_pad[row]].tolist()
        assert seen + hidden == [values[g] for g in parts[0] + parts[1]]


def test_names_and_types_are_those_of_the_reference() -> None:
    """Of the inputs that scGPT's own pretraining model took when the golden numbers were made."""
    golden = np.load(GOLDEN / "generate_wqkv" / "io.npz")
    cells = [cell(np.random.default_rng(i), 40) for i in range(3)]
    ours = collate(cells, CollateOptions(objective="generate", mask_ratio=0.5)).to_scgpt()
    for name, tensor in ours.items():
        assert tensor.numpy().dtype == golden[f"in_{name}"].dtype and tensor.ndim == 2, name


def test_a_ratio_close_to_one_masks_nearly_all() -> None:
    batch = collate([cell(np.random.default_rng(0), 200)], CollateOptions(mask_ratio=0.9999999))
    assert batch.is_masked[:, 1:].float().mean() > 0.99


def test_scgpts_names_of_a_masked_batch() -> None:
    batch = collate([cell(np.random.default_rng(0), 40)], CollateOptions())
    scgpt = batch.to_scgpt()
    assert {n: t.dtype for n, t in scgpt.items()} == {
        "gene": torch.int64, "expr": torch.float32, "masked_expr": torch.float32,
    }  # fmt: skip
    assert torch.equal(scgpt["expr"][~batch.is_masked], scgpt["masked_expr"][~batch.is_masked])
    assert (scgpt["masked_expr"][batch.is_masked] == -1).all() and batch.is_masked.any()


def test_a_batch_of_tiny_cells_has_something_to_predict() -> None:
    """int(n * ratio) is 0 for all of them; scGPT's mean over nothing would be NaN."""
    rng = np.random.default_rng(1)
    options = CollateOptions(objective="generate", mask_ratio=0.25)
    batch = collate([cell(rng, n) for n in (3, 2, 1, 0)], options)
    assert batch.unknown_genes.shape == (4, 1) and batch.known_genes.shape == (4, 3)
    assert (~batch.unknown_is_pad).sum(1).tolist() == [1, 1, 1, 0]
    assert (~batch.known_is_pad).sum(1).tolist() == [3, 2, 1, 1]
    # One longer cell, and small ones are as in scGPT.
    batch = collate([cell(rng, n) for n in (9, 3)], options)
    assert (~batch.unknown_is_pad).sum(1).tolist() == [2, 0]
    assert collate([cell(rng, 0)], options).unknown_genes.shape == (1, 0)


def test_unknown_genes_and_exact_masks_are_uniform() -> None:
    genes = np.arange(50)
    cells = [(genes, np.ones(50, int))] * 4000
    split = collate(cells, CollateOptions(objective="generate", mask_ratio=0.5))
    exact = collate(cells, CollateOptions(mask_ratio=0.5, exact_mask=True))
    assert (exact.is_masked.sum(1) == 25).all()
    hidden = [split.unknown_genes.numpy(), np.nonzero(exact.is_masked.numpy())[1].reshape(-1, 25) - 1]  # fmt: skip
    for each in hidden:
        counts = np.bincount(each.ravel(), minlength=50)
        assert abs(counts - 2000).max() < 6 * np.sqrt(1000)
        both = ((each == 3).any(1) & (each == 4).any(1)).sum()
        assert abs(both - 4000 * 0.5 * 24 / 49) < 6 * np.sqrt(4000 * 0.245 * 0.755)
    # Two purposes, two draws.
    assert not np.array_equal(hidden[0], hidden[1])


def test_unexpressed_genes_are_uniform_and_none_of_the_cells_own() -> None:
    own = np.arange(100, 200)
    batch = collate([(own, np.ones(100, int))] * 3000, CollateOptions(include_zero_genes=20))
    zeros = batch.genes[:, 101:].numpy()
    assert zeros.shape == (3000, 20) and (np.diff(zeros, axis=1) > 0).all()
    assert (batch.targets[:, 101:] == 0).all() and (batch.targets[:, 1:101] > 0).all()
    counts = np.bincount(zeros.ravel(), minlength=GENES)
    assert counts[100:200].sum() == 0 and counts[:GENES].sum() == 60_000
    drawn = np.delete(counts, np.s_[100:200])
    assert abs(drawn - 300).max() < 6 * np.sqrt(300)
    masked = batch.is_masked[:, 101:].float().mean()
    assert abs(masked - 0.4) < 0.02


def test_one_ratio_for_each_batch_drawn_by_its_position() -> None:
    ratios = (0.1, 0.5, 0.9)
    collator = Collator(CollateOptions(mask_ratio=ratios, exact_mask=True), VOCAB, "counts", 3)
    member = np.frombuffer(encode_cell(range(100), [1] * 100), np.uint8)
    starts, sizes = np.zeros(2, np.int64), np.full(2, len(member))
    read = CellBytes(member, starts, sizes, np.arange(2), np.zeros((2, 0), np.int64))
    seen = []
    for position in range(0, 6400, 64):
        (batch,) = collator.collate(read, 1, position)
        counts = set(batch.is_masked.sum(1).tolist())
        assert len(counts) == 1
        seen.append(counts.pop())
    assert set(seen) == {10, 50, 90} and all(15 <= seen.count(n) <= 55 for n in set(seen))


def test_scaled_counts_add_up_over_the_whole_cell() -> None:
    genes, counts = cell(np.random.default_rng(4), 90, top=3000)
    options = {"max_length": 31, "objective": "none", "target_sum": 1e4}
    scaled = collate([(genes, counts)], CollateOptions(values="counts", **options))
    logs = collate([(genes, counts)], CollateOptions(values="log1p", **options))
    known = dict(zip(genes.tolist(), counts.tolist(), strict=True))
    want = np.array([known[g] for g in scaled.genes[0, 1:].tolist()]) / counts.sum() * 1e4
    assert np.allclose(scaled.targets[0, 1:], want, rtol=1e-6)
    assert np.allclose(logs.targets[0, 1:], np.log(1 + want), rtol=1e-6)
    assert torch.equal(logs.values, logs.targets) and not logs.is_masked.any()


def test_conditions_are_tokens_behind_cls() -> None:
    own = Vocab([*(f"g{i}" for i in range(GENES)), "<tissue:lung>"]).with_specials()
    options = CollateOptions(conditions=("tissue", "donor"), max_length=12, mask_ratio=0.9)
    collator = Collator(options, own, "counts", 0, LABELS)
    assert collator.vocab.tokens[len(own) :] == (
        "<tissue:blood>", "<tissue:>", "<donor:a>", "<donor:b>", "<donor:>",
    )  # fmt: skip
    labels = np.array([[0, 0, 1], [-1, 0, 0], [1, 0, 2], [0, 0, -1]])
    cells = [cell(np.random.default_rng(5), 50)] * 4
    batch = collate(cells, options, vocab=own, labels=labels)
    tokens = [[collator.vocab.tokens[i] for i in row[:3]] for row in batch.genes.tolist()]
    assert tokens == [
        ["<cls>", "<tissue:lung>", "<donor:a>"], ["<cls>", "<tissue:blood>", "<donor:>"],
        ["<cls>", "<tissue:>", "<donor:b>"], ["<cls>", "<tissue:>", "<donor:a>"],
    ]  # fmt: skip
    assert not batch.is_masked[:, :3].any() and (batch.targets[:, :3] == -2).all()
    # A token of the vocabulary that is a category is no gene.
    zeros = collate([(np.arange(5), np.ones(5, int))], CollateOptions(include_zero_genes=295, max_length=301), vocab=own)  # fmt: skip
    assert zeros.genes[0, 1:].tolist() == list(range(300))


@pytest.mark.parametrize(
    ("conditions", "said"),
    [(("tisue",), "did you mean 'tissue'"), (("age",), "numbers"), (("donor", "donor"), "twice")],
)
def test_conditions_that_cant_be(conditions: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Collator(CollateOptions(conditions=conditions), VOCAB, "counts", 0, LABELS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "gen"}, "objective"),
        ({"objective": "none", "mask_ratio": 0.1}, "leave mask_ratio out"),
        ({"objective": "generate", "mask_ratio": 0.0}, "mask_ratio"),
        ({"objective": "generate", "exact_mask": True}, "exact_mask"),
        ({"mask_ratio": ()}, "empty"),
        ({"mask_ratio": (0.5, 1.0)}, "mask_ratio"),
        ({"values": "raw"}, "values"),
        ({"target_sum": 1e4}, "bins"),
        ({"values": "log1p", "target_sum": 0.0}, "target_sum"),
        ({"include_zero_genes": -1}, "include_zero_genes"),
        ({"include_zero_genes": 10, "max_length": 11}, "at least 12(.|\n)*max_length"),
        ({"conditions": ("a", "b"), "max_length": 3}, "at least 4(.|\n)*max_length"),
        ({"conditions": ("a",), "keep_first": 1}, "at least 2(.|\n)*keep_first"),
        ({"keep_first": 1200}, "keep_first"),
        ({"pad_to": 0}, "pad_to"),
        ({"pad_to": "shortest"}, "pad_to"),
    ],
)
def test_bad_options_say_why(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CollateOptions(**options)


@pytest.mark.parametrize("options", [{"values": "log1p"}, {"values": "counts", "target_sum": 1e4}])
def test_fractions_are_not_scaled(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="fractions"):
        Collator(CollateOptions(**options), VOCAB, "float", 0)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), [60, 1, 33, 90, 16], longest=30)


def loader(known: Known, **options: object) -> CellLoader:
    return loader_of(known.root, **{"batch_size": 4, "shuffle_buffer": 48, "lanes": 12, **options})


def same(a: Batch | GenerateBatch, b: Batch | GenerateBatch) -> bool:
    x, y = fields(a), fields(b)
    return torch.equal(a.key, b.key) and all(np.array_equal(x[n], y[n]) for n in (*x, *y))


EVERYTHING = [
    {"objective": "generate", "conditions": ["donor"], "include_zero_genes": 3},
    {"mask_ratio": [0.2, 0.6], "exact_mask": True, "values": "log1p", "target_sum": 1e4},
    {"objective": "none", "values": "counts", "pad_to": "max", "keep_first": 3, "max_length": 20},
]


@pytest.mark.parametrize("options", EVERYTHING)
def test_same_bits_for_any_threads_and_after_a_resume(
    known: Known, options: dict[str, object]
) -> None:
    whole = list(loader(known, threads=1, **options))
    for threads in (2, 8):
        assert all(map(same, loader(known, threads=threads, **options), whole))
    part = loader(known, **options)
    iterator = iter(part)
    for _ in range(17):
        next(iterator)
    state = json.loads(json.dumps(part.state_dict()))
    iterator.close()
    rest = loader(known, **options)
    rest.load_state_dict(state)
    assert all(map(same, rest, whole[17:]))


def test_all_ranks_draw_the_same_ratio(known: Known) -> None:
    ranks = [
        [b.ratio for b in loader(known, objective="generate", rank=r, world_size=2)] for r in (0, 1)
    ]
    assert ranks[0] == ranks[1] and set(ranks[0]) == {0.25, 0.5, 0.75}


@pytest.mark.parametrize(
    "change",
    [{"mask_ratio": 0.3}, {"objective": "generate"}, {"n_bins": 11}, {"max_length": 20},
     {"include_zero_genes": 2}, {"conditions": ["donor"]}, {"values": "log1p"}, {"exact_mask": True}],
)  # fmt: skip
def test_a_state_of_another_collation_is_refused(known: Known, change: dict[str, object]) -> None:
    state = loader(known).state_dict()
    with pytest.raises(StateError, match=f"another collate.{next(iter(change))}: "):
        loader(known, **change).load_state_dict(state)
    with pytest.raises(StateError, match="collate"):
        loader(known).load_state_dict({**state, "collate": 3})


def test_the_loader_tells_the_tokens_of_its_conditions(known: Known) -> None:
    one = loader(known, conditions=("donor",))
    assert len(one.vocab) == len(known.vocab) + 4
    batch = next(iter(one))
    for row, code in enumerate(batch.labels["donor"].tolist()):
        name = ("a", "b", "c", "")[code]
        assert one.vocab.tokens[batch.genes[row, 1]] == f"<donor:{name}>"
    assert loader(known).vocab == known.vocab


def test_rows_of_fixed_length(known: Known) -> None:
    widths = {b.genes.shape[1] for b in loader(known, pad_to="max", max_length=25)}
    assert widths == {25}
    widths = {b.genes.shape[1] for b in loader(known, pad_to=8, max_length=28)}
    assert widths <= {8, 16, 24, 28} and len(widths) > 1

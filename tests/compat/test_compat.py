"""scGPT's trainer by its names: tokens, masks, dictionaries, losses; a script with other imports runs."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from loaders import loader_of
from plain_bins import bin_values

from scshards.base.errors import ConfigError, ScshardsError
from scshards.cells.vocab import Vocab
from scshards.compat.model import batch_of
from scshards.model.transformer import CellModel
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack
from scshards.train import compat

GENES = [f"G{i:02d}" for i in range(24)]
VOCAB = Vocab.from_genes(GENES)
DOCS = Path(__file__).parents[2] / "docs" / "tutorials" / "from_scgpt.md"
SCRIPT = DOCS.parents[2] / "examples" / "scgpt_script.py"


def config(**changes: Any) -> SimpleNamespace:
    flags = dict.fromkeys(("GEP", "GEPC", "CLS", "ESC", "DAR", "DSBN", "use_batch_labels"), True)
    values = dict(
        task="annotation", seed=3, mask_ratio=0.4, mask_value=-1, pad_value=-2, pad_token="<pad>",
        max_seq_len=20, n_bins=8, batch_size=16, epochs=3, lr=3e-3, amp=False, log_interval=2,
        dab_weight=0.5, explicit_zero_prob=False, include_zero_gene=False,
    )  # fmt: skip
    return SimpleNamespace(**{**flags, **values, **changes})


def made_cells(n: int = 90) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts that tell the class, classes and domains."""
    rng = np.random.default_rng(5)
    kind, domain = rng.integers(0, 3, n), rng.integers(0, 2, n)
    rates = rng.gamma(0.5, 5.0, (3, len(GENES)))
    counts = rng.poisson(rates[kind] * (1 + domain[:, None]))
    counts[:, 0] += 1
    return counts.astype(np.float32), kind, domain


def binned(counts: np.ndarray, n_bins: int = 8) -> np.ndarray:
    out = np.zeros_like(counts)
    for row, new in zip(counts, out, strict=True):
        new[row > 0] = bin_values(row[row > 0], n_bins)
    return out


def small_model(**parts: Any) -> compat.TransformerModel:
    return compat.TransformerModel(
        len(VOCAB), 16, 2, 24, 1, vocab=VOCAB, dropout=0.0, pad_value=-2, **parts
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("compat")
    counts, kind, domain = made_cells()
    cells = anndata.AnnData(counts)
    cells.var_names = GENES
    cells.obs["cell_type"] = [f"k{k}" for k in kind]
    cells.obs["donor"] = [f"d{k}" for k in domain]
    cells.obs["gap"] = [None if i == 4 else "x" for i in range(len(kind))]
    cells.write_h5ad(folder / "in.h5ad")
    options = PackOptions(
        obs=("cell_type", "donor", "gap"), valid_fraction=0.2, cells_per_shard=30, workers=1
    )
    pack(str(folder / "in.h5ad"), str(folder / "shards"), VOCAB, options, progress=False)
    return str(folder / "shards")


def test_masks_are_exact_numbers_of_what_is_no_padding_and_keyed_by_row_and_epoch() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, (400, 30)).astype(np.float32)
    for i, row in enumerate(values):
        row[i % 31 :] = -2  # from no value at all to a whole row
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    masked = compat.random_mask_value(torch.from_numpy(values), 0.3, -1, -2, seed=1).numpy()
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    hidden = masked == -1
    assert hidden.sum(1).tolist() == [int((row != -2).sum() * 0.3) for row in values]
    assert np.array_equal(masked[~hidden], values[~hidden]) and not (hidden & (values == -2)).any()
    assert (hidden & (values == 0)).any(), "zeros can be hidden unless they are padding"
    # Each place is as likely as another: of full rows, 9 of 30.
    full = np.full((4000, 30), 5.0, np.float32)
    share = (compat.random_mask_value(full, 0.3, -1, -2) == -1).float().mean(0).numpy()
    assert np.abs(share - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 4000)
    part = compat.random_mask_value(values[7:9], 0.3, -1, -2, seed=1, rows=np.array([7, 8])).numpy()
    assert np.array_equal(part, masked[7:9])
    for other in ({"seed": 2}, {"epoch": 1}, {"name": "valid"}):
        again = compat.random_mask_value(values, 0.3, -1, -2, **{"seed": 1, **other}).numpy()
        assert not np.array_equal(again, masked)


def test_tokens_are_the_rows_non_zeros_behind_cls() -> None:
    x = np.array([[0, 3, 0, 1.5], [1, 2, 3, 4], [0, 0, 0, 0]])
    ids = np.array([7, 5, 9, 6])
    vocab = {"<pad>": 0, "<cls>": 1}
    made = compat.tokenize_and_pad_batch(x, ids, 10, vocab, "<pad>", -2)
    assert made["genes"].tolist() == [[1, 5, 6, 0, 0], [1, 7, 5, 9, 6], [1, 0, 0, 0, 0]]
    assert made["values"].tolist() == [[0, 3, 1.5, -2, -2], [0, 1, 2, 3, 4], [0, -2, -2, -2, -2]]
    assert made["genes"].dtype == torch.int64 and made["values"].dtype == torch.float32
    cut = compat.tokenize_and_pad_batch(x, ids, 3, vocab, "<pad>", -2, return_pt=False)
    genes, values = cut["genes"][1], cut["values"][1]
    assert genes[0] == 1 and len(set(genes.tolist())) == 3
    assert [x[1][ids.tolist().index(g)] for g in genes[1:]] == values[1:].tolist()
    bare = compat.tokenize_and_pad_batch(
        x, ids, 9, vocab, "<pad>", -2, append_cls=False, include_zero_gene=True
    )
    assert bare["genes"].tolist() == [ids.tolist()] * 3 and bare["values"].tolist() == x.tolist()
    with pytest.raises(ConfigError, match="3 gene ids"):
        compat.tokenize_and_pad_batch(x, ids[:3], 9, vocab, "<pad>", -2)
    with pytest.raises(ConfigError, match="modalities"):
        compat.tokenize_and_pad_batch(x, ids, 9, vocab, "<pad>", -2, mod_type=ids)


def tokenized(n: int = 40) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]:
    counts, kind, domain = made_cells(n)
    ids = np.array([VOCAB[g] for g in GENES])
    made = compat.tokenize_and_pad_batch(binned(counts), ids, 20, VOCAB, "<pad>", -2)
    return made, kind, domain


def test_dictionaries_of_an_epoch() -> None:
    cells, kind, domain = tokenized()
    args = (cells, cells, domain, domain, config())
    train, valid = compat.prepare_data(*args, 1, kind, kind, sort_seq_batch=True)
    order = np.argsort(domain, kind="stable")
    assert list(train) == ["gene_ids", "values", "target_values", "batch_labels", "celltype_labels"]
    assert train["batch_labels"].tolist() == sorted(domain.tolist())
    assert train["celltype_labels"].tolist() == kind[order].tolist()
    assert torch.equal(train["target_values"], cells["values"][order])
    hidden = train["values"] == -1
    assert torch.equal(train["values"][~hidden], train["target_values"][~hidden])
    assert hidden.sum(1).tolist() == [
        int(int(n) * 0.4) for n in (train["target_values"] != -2).sum(1)
    ]
    later, later_valid = compat.prepare_data(*args, 2, kind, kind, sort_seq_batch=True)
    assert not torch.equal(later["values"], train["values"])
    assert torch.equal(later_valid["values"], valid["values"])
    plain, _ = compat.prepare_data(*args[:4], config(task="integration"), 1)
    assert "celltype_labels" not in plain
    with pytest.raises(ConfigError, match="train_celltype_labels"):
        compat.prepare_data(*args, 1)
    with pytest.raises(ConfigError, match="multiomic"):
        compat.prepare_data(*args[:4], config(task="multiomic"), 1)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("per_domain", [False, True])
def test_loaders_in_memory_can_be_passed_again_in_another_order(
    per_domain: bool, drop_last: bool
) -> None:
    cells, kind, domain = tokenized()
    data, _ = compat.prepare_data(cells, cells, domain, domain, config(), 1, kind, kind)
    data["row"] = torch.arange(40)

    def passes() -> list[list[list[int]]]:
        loader = compat.prepare_data_loader(
            data, 8, shuffle=True, intra_domain_shuffle=True, drop_last=drop_last,
            per_seq_batch_sample=per_domain,
        )  # fmt: skip
        out = []
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == len(loader)
            out.append([b["row"].tolist() for b in batches])
        return out

    state = torch.get_rng_state()
    first, second = passes()
    assert torch.equal(torch.get_rng_state(), state)
    assert passes() == [first, second] and first != second
    for batches in (first, second):
        rows = [r for batch in batches for r in batch]
        assert len(set(rows)) == len(rows) and (drop_last or sorted(rows) == list(range(40)))
        assert not drop_last or {len(b) for b in batches} == {8}
        if per_domain:
            assert all(len(set(domain[b])) == 1 for b in batches)
            whole = (
                (np.bincount(domain) // 8).sum()
                if drop_last
                else (-(-np.bincount(domain) // 8)).sum()
            )
            assert len(batches) == whole
    with pytest.raises(ConfigError, match="only a shard set takes batch_column"):
        compat.prepare_dataloader(data, 8, batch_column="donor")


def test_the_model_answers_by_scgpts_names_with_cell_models_numbers() -> None:
    model = small_model(
        n_cls=3, do_mvc=True, do_dab=True, num_batch_labels=2, explicit_zero_prob=True
    )
    twin = CellModel(model.config)
    twin.load_state_dict(model.state_dict())
    cells, _, _ = tokenized(6)
    genes, values = cells["genes"], cells["values"]
    is_pad = genes == VOCAB.pad_id
    out = model(genes, values, is_pad, CLS=True, MVC=True, ECS=True)
    own = twin(batch_of(genes, values, is_pad))
    for name, tensor in (
        ("mlm_output", own.predictions), ("mvc_output", own.mvc_predictions), ("cell_emb", own.cell_embeddings),
        ("cls_output", own.class_logits), ("dab_output", own.domain_logits),
        ("mlm_zero_probs", own.zero_probs), ("mvc_zero_probs", own.mvc_zero_probs),
    ):  # fmt: skip
        assert torch.equal(out[name], tensor), name
    cells_BD = out["cell_emb"].detach().double()
    unit = cells_BD / cells_BD.norm(dim=1, keepdim=True)
    cosine = [
        [float(a @ b) if i != j else 0.0 for j, b in enumerate(unit)] for i, a in enumerate(unit)
    ]
    ecs = np.mean(1 - (np.maximum(cosine, 0) - 0.3) ** 2)
    assert out["loss_ecs"].item() == pytest.approx(ecs, abs=1e-6)
    assert set(model(genes, values, is_pad)) == {
        "mlm_output",
        "cell_emb",
        "mlm_zero_probs",
        "dab_output",
    }
    bare = small_model()
    for asked in ({"CLS": True}, {"MVC": True}, {"CCE": True}, {"do_sample": True}):
        with pytest.raises(ConfigError):
            bare(genes, values, is_pad, **asked)
    for wrong in ({"pre_norm": True}, {"domain_spec_batchnorm": "do_affine"}, {"do_dab": True},
                  {"input_emb_style": "category"}):  # fmt: skip
        with pytest.raises(ConfigError):
            small_model(**wrong)
    category = compat.TransformerModel(
        len(VOCAB),
        16,
        2,
        24,
        1,
        vocab=VOCAB,
        pad_value=8,
        input_emb_style="category",
        n_input_bins=10,
    ).config
    assert (category.n_bins, category.pad_value, category.mask_value) == (8, 8, 9)


def by_hand(model: Any, batch: dict[str, torch.Tensor], settings: Any) -> dict[str, float]:
    """Each term of scGPT's loss, written out."""
    is_pad = batch["gene_ids"] == VOCAB.pad_id
    with torch.no_grad():
        out = model(
            batch["gene_ids"], batch["values"], is_pad, batch["batch_labels"],
            CLS=True, MVC=True, ECS=True,
        )  # fmt: skip
    hidden = batch["values"] == settings.mask_value
    target = batch["target_values"][hidden]

    def mse(name: str) -> float:
        return float(((out[name][hidden] - target) ** 2).mean())

    def ce(name: str, codes: torch.Tensor) -> float:
        logp = out[name] - out[name].logsumexp(1, keepdim=True)
        return float(-logp[torch.arange(len(codes)), codes].mean())

    def zeros(name: str) -> float:
        p = out[name][hidden]
        return float(-torch.where(target > 0, p, 1 - p).log().mean())

    return {
        "train/gep": mse("mlm_output"),
        "train/nzlp": zeros("mlm_zero_probs"),
        "train/mvc": mse("mvc_output"),
        "train/mvc_nzlp": zeros("mvc_zero_probs"),
        "train/cls": ce("cls_output", batch["celltype_labels"]),
        "train/ecs": float(out["loss_ecs"]),
        "train/dab": ce("dab_output", batch["batch_labels"]),
    }


def test_training_adds_up_scgpts_terms_and_evaluating_weighs_batches_by_cells() -> None:
    cells, kind, domain = tokenized()
    settings = config(explicit_zero_prob=True)
    model = small_model(
        n_cls=3, do_mvc=True, do_dab=True, use_batch_labels=True, num_batch_labels=2, explicit_zero_prob=True
    )  # fmt: skip
    data, _ = compat.prepare_data(cells, cells, domain, domain, settings, 1, kind, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ce = torch.nn.CrossEntropyLoss()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler(enabled=False)
    rest = ("cpu", settings)

    batches = list(compat.prepare_dataloader(data, 16))
    expected = [by_hand(model.eval(), b, settings) for b in batches]
    got = compat.evaluate(model, batches, VOCAB, compat.masked_mse_loss, ce, ce, *rest, 1)
    weights = [len(b["gene_ids"]) for b in batches]
    assert weights == [16, 16, 8]
    assert got == pytest.approx(
        np.average([e["train/cls"] for e in expected], weights=weights), rel=1e-5
    )
    masked = config(task="integration")
    got = compat.evaluate(model, batches, VOCAB, compat.masked_mse_loss, ce, None, "cpu", masked, 1)
    assert got == pytest.approx(
        np.average([e["train/gep"] for e in expected], weights=weights), rel=1e-5
    )

    one = compat.prepare_dataloader(data, 40)
    expected_one = by_hand(model, next(iter(one)), settings)
    terms = compat.train(
        model, one, VOCAB, compat.masked_mse_loss, ce, ce, scaler, optimizer, schedule, *rest,
        logging.getLogger(), 1,
    )  # fmt: skip
    total = terms.pop("train/loss")
    assert terms == pytest.approx(expected_one, rel=1e-4)
    with torch.no_grad():
        after = {k: v for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("transformer_encoder") for k in after), "a step was taken"
    plain = sum(v for k, v in expected_one.items() if k not in ("train/ecs", "train/dab"))
    weighed = 10 * expected_one["train/ecs"] + 0.5 * expected_one["train/dab"]
    assert total == pytest.approx(plain + weighed, rel=1e-4)

    bad = {k: v.clone() for k, v in batches[0].items()}
    bad["target_values"][:] = float("nan")
    with pytest.raises(ScshardsError, match="epoch 2, batch 1: the gradient is not finite"):
        compat.train(
            model, [bad], VOCAB, compat.masked_mse_loss, ce, ce, scaler, optimizer, schedule, *rest,
            logging.getLogger(), 2,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="criterion_cls"):
        compat.evaluate(model, batches, VOCAB, compat.masked_mse_loss, ce, None, *rest, 1)


def test_a_shard_set_gives_the_dictionaries_as_it_streams(shards: str) -> None:
    counts, kind, domain = made_cells()
    by_row = {tuple(np.round(binned(counts)[i][counts[i] > 0])): i for i in range(len(kind))}
    settings = config(max_seq_len=30)

    def loader(**options: Any) -> compat.StreamLoader:
        made = compat.prepare_dataloader(
            shards,
            16,
            config=settings,
            batch_column="donor",
            celltype_column="cell_type",
            **options,
        )
        assert isinstance(made, compat.StreamLoader)
        return made

    train = loader(shuffle=True, per_seq_batch_sample=True)
    epochs = [list(train), list(train)]
    assert len(epochs[0]) == len(train)
    for batches in epochs:
        labels = Counter()
        for b in batches:
            assert b["gene_ids"].dtype == b["batch_labels"].dtype == torch.int64
            assert len(set(b["batch_labels"].tolist())) == 1
            hidden = b["values"] == -1
            assert hidden.sum(1).tolist() == [
                int(int(n) * 0.4) for n in (b["target_values"] != -2).sum(1)
            ]
            assert torch.equal(b["values"][~hidden], b["target_values"][~hidden])
            assert (b["gene_ids"][:, 0] == VOCAB.cls_id).all() and (
                b["target_values"][:, 0] == 0
            ).all()
            for genes, values, k, d in zip(
                b["gene_ids"],
                b["target_values"],
                b["celltype_labels"],
                b["batch_labels"],
                strict=True,
            ):
                row = {
                    int(g): float(v) for g, v in zip(genes[1:], values[1:], strict=True) if v != -2
                }
                i = by_row[tuple(row[VOCAB[g]] for g in GENES if VOCAB[g] in row)]
                assert (int(k), int(d)) == (kind[i], domain[i])
                labels[i] += 1
        assert set(labels.values()) == {1} and len(labels) == train.loader.cells
    assert not torch.equal(epochs[0][0]["values"][0], epochs[1][0]["values"][0])

    valid = loader(split="valid")
    first, second = list(valid), list(valid)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, second, strict=True) for k in a)

    own = loader_of(shards, batch_size=8, mask_ratio=0.5, max_length=30, lanes=1)
    given = next(iter(compat.prepare_dataloader(own, 8, batch_column="donor")))
    assert "celltype_labels" not in given and bool((given["values"] == -1).any())


def test_a_stream_that_can_t_be_is_refused(shards: str) -> None:
    settings = config()
    with pytest.raises(ConfigError, match="no label 'nope'"):
        compat.prepare_dataloader(shards, 16, config=settings, batch_column="nope")
    with pytest.raises(ConfigError, match="needs config"):
        compat.prepare_dataloader(shards, 16)
    with pytest.raises(ConfigError, match="include_zero_genes=N"):
        compat.prepare_dataloader(shards, 16, config=config(include_zero_gene=True))
    with pytest.raises(ConfigError, match="needs batch_column"):
        compat.prepare_dataloader(shards, 16, config=settings, per_seq_batch_sample=True)
    with pytest.raises(ConfigError, match="a cell has no 'gap'") as e:
        for split in ("train", "valid"):
            list(
                compat.prepare_dataloader(
                    shards, 16, config=settings, batch_column="gap", split=split
                )
            )
    assert "000000-0000000004" in str(e.value)
    loader = loader_of(shards, batch_size=8, objective="generate", max_length=30, lanes=1)
    with pytest.raises(ConfigError, match="GenerateBatch"):
        next(iter(compat.prepare_dataloader(loader, 8)))
    with pytest.raises(ConfigError, match="batch_size=8"):
        compat.prepare_dataloader(loader, 16)
    unmasked = loader_of(shards, batch_size=8, objective="none", max_length=30, lanes=1)
    with pytest.raises(ConfigError, match="hides no value"):
        next(iter(compat.prepare_dataloader(unmasked, 8)))


def test_the_docs_show_the_script_and_what_it_imported_before() -> None:
    before, after, *parts = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    script = SCRIPT.read_text()
    assert all(part in script for part in (after, *parts)) and len(parts) == 6
    imported = re.findall(r"^from scgpt\S* import (.*)$", before, re.MULTILINE)
    names = {n.strip() for line in imported for n in line.split(",")}
    assert all(re.search(rf"^    {n},$", after, re.MULTILINE) for n in names)

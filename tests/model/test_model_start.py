"""load_weights: a model starts from a checkpoint with other heads and another vocabulary."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from model_support import NEAR, as_batch, golden_batch, golden_io
from torch import Tensor

from scshards.base.errors import CheckpointError
from scshards.model.config import ModelConfig
from scshards.model.scgpt import load_model, load_weights, write_folder
from scshards.model.transformer import CellModel


@pytest.fixture
def folder(golden: Path) -> str:
    return str(golden / "mask_in_proj")


@pytest.fixture
def config(folder: str) -> ModelConfig:
    return load_model(folder).model.config


def vocab_of(folder: str) -> dict[str, int]:
    return json.loads((Path(folder) / "vocab.json").read_text())


def test_the_same_model_comes_whole(folder: str, config: ModelConfig) -> None:
    model = CellModel(config, seed=5)
    report = load_weights(model, folder, vocab_of(folder))
    loaded = load_model(folder).model
    assert report.loaded == list(model.state_dict())
    assert report[1:] == ([], [])
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_embeddings_go_by_token(folder: str, config: ModelConfig) -> None:
    """Ids turned round, two genes new, one gone, the padding token under another name."""
    theirs = vocab_of(folder)
    names = [t for t in theirs if t not in ("<pad>",)][::-1]
    gone, names = names[40], names[:40] + names[41:]
    vocab = {t: i for i, t in enumerate(["NEW1", *names, "PAD", "NEW2"])}
    config = dataclasses.replace(config, n_tokens=len(vocab), pad_id=vocab["PAD"])
    model = CellModel(config, seed=5)
    before = model.encoder.embedding.weight.detach().clone()
    report = load_weights(model, folder, vocab)
    assert report.fresh == report.unused == []
    after, own = model.encoder.embedding.weight, load_model(folder).model.encoder.embedding.weight
    for token in names:
        assert torch.equal(after[vocab[token]], own[theirs[token]])
    assert torch.equal(after[vocab["PAD"]], own[theirs["<pad>"]])
    for token in ("NEW1", "NEW2"):
        assert torch.equal(after[vocab[token]], before[vocab[token]])
    # The same cells, in other ids, have the same embeddings.
    batch = golden_batch(golden_io(Path(folder)))
    has_gone = (batch.genes == theirs[gone]).any(1)
    ids = torch.tensor([vocab.get("PAD" if t == "<pad>" else t, -1) for t in theirs])
    turned = as_batch(ids[batch.genes][~has_gone], batch.values[~has_gone], batch.is_pad[~has_gone])
    expected = golden_io(Path(folder))["out_cell_emb"][~has_gone]
    assert len(expected) >= 2
    with torch.no_grad():
        torch.testing.assert_close(model.eval().embed(turned), expected, **NEAR)


def test_other_heads_stay_fresh_and_are_named(folder: str, config: ModelConfig) -> None:
    config = dataclasses.replace(
        config,
        n_classes=3,
        n_domains=2,
        use_domain_labels=True,
        domain_norm=True,
        explicit_zero_prob=True,
        mvc=False,
    )
    model = CellModel(config, seed=5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = load_weights(model, folder, vocab_of(folder))
    assert {*report.fresh} & {*report.unused} == {
        "decoder.fc.0.weight",
        "cls_decoder.out_layer.weight",
        "cls_decoder.out_layer.bias",
    }
    fresh = {n.split(".")[0] for n in report.fresh}
    assert fresh == {"decoder", "batch_encoder", "dsbn", "cls_decoder"}
    assert "decoder.zero_logit.0.weight" in report.fresh
    assert "cls_decoder._decoder.0.weight" in report.loaded
    assert {n for n in report.unused if n.startswith("mvc_decoder")} == {
        "mvc_decoder.gene2query.weight",
        "mvc_decoder.gene2query.bias",
        "mvc_decoder.W.weight",
    }
    assert sorted([*report.loaded, *report.fresh]) == sorted(before)
    state = model.state_dict()
    assert all(torch.equal(state[n], before[n]) for n in report.fresh)


def edited(folder: str, to: Path, drop: str = "", **tensors: Tensor) -> str:
    copy = Path(shutil.copytree(folder, to / "copy"))
    state = dict(torch.load(copy / "best_model.pt", weights_only=True))
    state = {n: t for n, t in state.items() if n != drop} | tensors
    torch.save(state, copy / "best_model.pt")
    return str(copy)


def test_all_sizes_that_differ_are_named_at_once(folder: str, config: ModelConfig) -> None:
    others = {"d_model": 16, "d_hid": 24, "n_heads": 2, "n_layers": 4, "value_style": "scaling"}
    model = CellModel(dataclasses.replace(config, **others), seed=5)  # type: ignore[arg-type]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError) as e:
        load_weights(model, folder, vocab_of(folder))
    for name, other in others.items():
        assert f"{name} = {getattr(config, name)!r} (the model: {other!r})" in e.value.what
        assert f"model.{name}" in str(e.value.advice)
    assert "the --config that states them" in str(e.value.advice)
    assert "[" not in e.value.what, "no shapes of tensors beside them"
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "named"), [({"n_heads": 2}, "n_heads"), ({"value_style": "scaling"}, "value_style")]
)
def test_what_shapes_do_not_show_is_compared(
    folder: str, config: ModelConfig, changes: dict[str, object], named: str
) -> None:
    model = CellModel(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"checkpoint has {named}") as e:
        load_weights(model, folder, vocab_of(folder))
    assert str(e.value.advice).startswith(f"leave model.{named} out")


def test_a_table_of_bins_is_of_a_size_too(tmp_path: Path, small: ModelConfig) -> None:
    vocab = {"<pad>" if i == small.pad_id else f"G{i}": i for i in range(small.n_tokens)}
    bins = {"value_style": "category", "n_bins": 9, "pad_value": 9.0, "mask_value": 10.0}
    write_folder(str(tmp_path), CellModel(dataclasses.replace(small, **bins)), vocab)  # type: ignore[arg-type]
    more = bins | {"n_bins": 7, "pad_value": 7.0, "mask_value": 8.0}
    with pytest.raises(CheckpointError, match=r"n_bins = 9 \(the model: 7\)") as e:
        load_weights(CellModel(dataclasses.replace(small, **more)), str(tmp_path), vocab)  # type: ignore[arg-type]
    assert "leave data.n_bins out" in str(e.value.advice)


def test_weights_that_args_do_not_describe_are_refused(
    folder: str, config: ModelConfig, tmp_path: Path
) -> None:
    spoiled = edited(folder, tmp_path, drop="encoder.embedding.weight")
    with pytest.raises(CheckpointError, match=r"missing: encoder\.embedding\.weight") as e:
        load_weights(CellModel(config), spoiled, vocab_of(folder))
    assert "best_model.pt" in str(e.value) and "come from one training run" in str(e.value)


def test_vocabularies_that_have_nothing_in_common(folder: str, config: ModelConfig) -> None:
    vocab = vocab_of(folder)
    foreign = {(t if t.startswith("<") else f"ENSG{i}"): i for t, i in vocab.items()}
    with pytest.raises(CheckpointError, match="no gene of the model's"):
        load_weights(CellModel(config), folder, foreign)
    with pytest.raises(CheckpointError, match="202 tokens, the model 203"):
        load_weights(CellModel(config), folder, {f"G{i}": i for i in range(202)})


def test_a_model_of_ones_own(tmp_path: Path, small: ModelConfig) -> None:
    vocab = {"<pad>" if i == small.pad_id else f"G{i}": i for i in range(small.n_tokens)}
    other = CellModel(dataclasses.replace(small, n_domains=2, domain_norm=True), seed=1)
    other.dsbn.running_mean[1] += 3
    write_folder(str(tmp_path), other, vocab)
    model = CellModel(other.config, seed=2).to(torch.bfloat16)
    report = load_weights(model, str(tmp_path), vocab)
    assert report.fresh == report.unused == []
    assert (model.dsbn.running_mean[1] == 3).all()
    assert model.decoder.fc[0].weight.dtype == torch.bfloat16

"""Known and unknown genes: who sees whom, and the second pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from model_support import NEAR, as_batch, split_batch

from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch, GenerateBatch
from scshards.model.config import ModelConfig
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel


@pytest.fixture
def model(small: ModelConfig) -> CellModel:
    return CellModel(dataclasses.replace(small, generate=True, n_classes=3), seed=3).eval()


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> GenerateBatch:
    return split_batch(make_batch(7, 3, 5), make_batch(2, 4, 1, seed=1))


def test_shapes_and_dtypes(model: CellModel, batch: GenerateBatch) -> None:
    out = model(batch, cell_prompt=True)
    for x in (out.predictions, out.mvc_predictions, out.prompt_predictions):
        assert x.shape == (3, 4)
    assert out.cell_embeddings.shape == (3, 16)
    assert out.class_logits.shape == (3, 3)
    assert {x.dtype for x in out if x is not None} == {torch.float32}


def test_no_unknown_gene_depends_on_another(model: CellModel, batch: GenerateBatch) -> None:
    out = model(batch, cell_prompt=True)
    for i in range(4):
        genes = batch.unknown_genes.clone()
        genes[:, i] = (genes[:, i] + 5) % 37
        other = model(dataclasses.replace(batch, unknown_genes=genes), cell_prompt=True)
        rest = torch.arange(4) != i
        for x, y in ((0, 0), (2, 2), (7, 7)):
            torch.testing.assert_close(out[x][:, rest], other[y][:, rest], **NEAR)
            assert (out[x][:, i] - other[y][:, i]).abs().min() > 1e-4
        torch.testing.assert_close(out.cell_embeddings, other.cell_embeddings, **NEAR)


def test_known_genes_are_as_in_the_plain_encoder(
    model: CellModel, batch: GenerateBatch, make_batch: Callable[..., Batch]
) -> None:
    plain = model(make_batch(7, 3, 5))
    out = model(batch)
    torch.testing.assert_close(out.cell_embeddings, plain.cell_embeddings, **NEAR)
    torch.testing.assert_close(out.class_logits, plain.class_logits, **NEAR)


def test_padding_changes_nothing(
    model: CellModel, batch: GenerateBatch, make_batch: Callable[..., Batch]
) -> None:
    wide = split_batch(make_batch(7, 3, 5, to=10), make_batch(2, 4, 1, seed=1))
    for x in ("known_genes", "known_values"):
        getattr(wide, x)[:, :7] = getattr(batch, x)
    is_real = ~batch.unknown_is_pad
    for x, y in zip(model(batch, cell_prompt=True), model(wide, cell_prompt=True), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            of_real = x.shape == is_real.shape
            torch.testing.assert_close(*((x[is_real], y[is_real]) if of_real else (x, y)), **NEAR)


def test_the_second_pass_starts_from_the_cell(model: CellModel, batch: GenerateBatch) -> None:
    """With `<cls>`'s place overwritten by a hook, one pass gives what two give."""
    out = model(batch, cell_prompt=True)
    cells = out.cell_embeddings.detach()

    def put_in(_: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0].clone()
        x[:, 0] = cells
        return (x, *inputs[1:])

    handle = model.transformer_encoder.register_forward_pre_hook(put_in)
    again = model(batch)
    handle.remove()
    torch.testing.assert_close(again.predictions, out.prompt_predictions, **NEAR)
    assert not torch.allclose(out.predictions, out.prompt_predictions, atol=1e-3)


def test_the_second_pass_does_not_train_the_cell_embedding(
    model: CellModel, batch: GenerateBatch
) -> None:
    """Its gradient does not reach the `<cls>` that made the embedding; the first pass's does."""
    cls = 38
    batch.known_genes[:, 0] = cls
    out = model(batch, cell_prompt=True)
    out.prompt_predictions.sum().backward(retain_graph=True)
    assert (model.encoder.embedding.weight.grad[cls] == 0).all()
    out.predictions.sum().backward()
    assert (model.encoder.embedding.weight.grad[cls] != 0).any()


def test_gradients_reach_the_flag(model: CellModel, batch: GenerateBatch) -> None:
    out = model(batch)
    s, _ = masked_squared_error(out.predictions, batch.unknown_targets, ~batch.unknown_is_pad)
    s.backward()
    grad = model.flag_encoder.weight.grad
    assert (grad[0] == 0).all(), "row 0 is not used, as in scGPT"
    assert (grad[1] != 0).any()


def test_refused(small: ModelConfig, model: CellModel, batch: GenerateBatch) -> None:
    with pytest.raises(ConfigError, match="not built to predict unknown genes"):
        CellModel(small)(batch)
    with pytest.raises(ConfigError, match="only a GenerateBatch"):
        model(as_batch(batch.known_genes, batch.known_values, batch.known_is_pad), cell_prompt=True)

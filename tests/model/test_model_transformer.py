"""CellModel: official keys and shapes, seeded weights, padding, heads, learning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_support import as_batch

from scshards.cells.batch import Batch
from scshards.model.config import ModelConfig
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel


def test_keys_and_shapes_are_the_official_ones(golden: Path) -> None:
    with torch.device("meta"):
        model = CellModel(ModelConfig(n_tokens=60697, pad_id=60694, generate=True))
    assert next(model.parameters()).is_meta
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    official = json.loads((golden / "scgpt_human_state_dict.json").read_text())
    assert own == official
    assert len(own) == 163
    assert sum(p.numel() for p in model.parameters()) == 51_330_049


def test_shapes_and_dtypes(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    model = CellModel(small).eval()
    batch = make_batch(7, 3)
    out = model(batch)
    assert out.predictions.shape == out.mvc_predictions.shape == (2, 7)
    assert out.cell_embeddings.shape == (2, 16)
    assert {t.dtype for t in out if t is not None} == {torch.float32}
    again = model(dataclasses.replace(batch, genes=batch.genes.long()))
    for a, b in zip(out, again, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert torch.equal(model.embed(batch), out.cell_embeddings)


def test_float32_comes_out_of_autocast(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = CellModel(small).eval()(make_batch(7, 3))
    assert {t.dtype for t in out if t is not None} == {torch.float32}


def test_without_mvc(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    both = CellModel(small, seed=4).eval()
    one = CellModel(dataclasses.replace(small, mvc=False), seed=4).eval()
    assert {n for n in both.state_dict() if n not in one.state_dict()} == {
        "mvc_decoder.gene2query.weight",
        "mvc_decoder.gene2query.bias",
        "mvc_decoder.W.weight",
    }
    out = one(make_batch(7, 3))
    assert out.mvc_predictions is None
    assert torch.equal(out.predictions, both(make_batch(7, 3)).predictions)


def test_weights_are_a_function_of_the_seed(small: ModelConfig) -> None:
    before = torch.get_rng_state()
    a, b, c = CellModel(small, seed=1), CellModel(small, seed=1), CellModel(small, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])
    assert not torch.equal(a.encoder.embedding.weight, c.encoder.embedding.weight)
    torch.rand(3)
    assert torch.equal(CellModel(small, seed=1).decoder.fc[0].weight, a.decoder.fc[0].weight)


def test_token_embedding_starts_as_in_scgpt(small: ModelConfig) -> None:
    weight = CellModel(dataclasses.replace(small, n_tokens=2000)).encoder.embedding.weight
    assert weight.min() >= -0.1
    assert weight.max() <= 0.1
    assert abs(weight.std().item() - 0.2 / 12**0.5) < 1e-3
    assert weight[small.pad_id].abs().max() > 0


def test_padding_changes_nothing(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    model = CellModel(small).eval()
    lengths = (9, 2, 6, 1)
    batch = make_batch(*lengths)
    inputs = (batch.genes, batch.values, batch.is_pad)
    out = model(batch)
    wide = model(as_batch(*(torch.cat([x, x[-1:, -1:].expand(4, 5)], 1) for x in inputs)))
    for b, n in enumerate(lengths):
        alone = model(as_batch(*(x[b : b + 1, :n] for x in inputs)))
        for many in (out, wide):
            for x, y in zip(many[:3], alone[:3], strict=True):
                x = x[b, :n] if x.ndim == 2 and x.shape[1] != small.d_model else x[b]
                torch.testing.assert_close(x, y[0], atol=1e-5, rtol=1e-4)


def test_order_of_genes_does_not_matter(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    model = CellModel(small).eval()
    batch = make_batch(9, 9)
    order = torch.tensor([0, 5, 3, 8, 1, 2, 7, 4, 6])
    out = model(batch)
    turned = model(as_batch(*(x[:, order] for x in (batch.genes, batch.values, batch.is_pad))))
    torch.testing.assert_close(out.predictions[:, order], turned.predictions, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.cell_embeddings, turned.cell_embeddings, atol=1e-5, rtol=1e-4)


def test_mvc_is_the_inner_product_written_out(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    model = CellModel(small).eval()
    batch = make_batch(7, 7)
    out = model(batch)
    query = torch.sigmoid(model.mvc_decoder.gene2query(model.encoder(batch.genes)))
    expected = (model.mvc_decoder.W(query) * out.cell_embeddings[:, None, :]).sum(-1)
    torch.testing.assert_close(out.mvc_predictions, expected, atol=1e-5, rtol=1e-5)


def test_values_above_512_are_512(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    model = CellModel(small).eval()
    batch = make_batch(7)
    outs = []
    for value in (511.0, 512.0, 9000.0):
        batch.values[0, 3] = value
        outs.append(model(batch).predictions)
    assert torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[0], outs[1])


def test_gradients_reach_all_but_the_padding_row(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    model = CellModel(dataclasses.replace(small, dropout=0.0))
    batch = make_batch(9, 4, 6)
    out = model(batch)
    total = sum(
        masked_squared_error(p, batch.values, ~batch.is_pad, batch.weight)[0]
        for p in (out.predictions, out.mvc_predictions)
    )
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    rows = model.encoder.embedding.weight.grad.abs().amax(1)
    assert rows[small.pad_id] == 0
    assert set(torch.nonzero(rows).flatten().tolist()) == set(batch.genes[~batch.is_pad].tolist())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_learns(small: ModelConfig, make_batch: Callable[..., Batch], dropout: float) -> None:
    """Masked values that depend on the gene alone are found."""
    batch = make_batch(20, 12, 20, 15)
    genes, is_pad = batch.genes, batch.is_pad
    targets = (genes % 5).float()
    is_masked = (torch.arange(20) % 2 == 1) & ~is_pad
    batch = as_batch(genes, torch.where(is_masked, -1.0, targets), is_pad, targets, is_masked)
    model = CellModel(dataclasses.replace(small, dropout=dropout))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    errors = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(80):
            out = model(batch)
            s, n = masked_squared_error(out.predictions, targets, is_masked, batch.weight)
            optimizer.zero_grad()
            (s / n).backward()
            optimizer.step()
            errors.append((s / n).item())
    assert errors[-1] < 0.2 * errors[0]

"""Value and cell styles, zero probabilities, MVC's gradient: each against its formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from model_support import NEAR
from torch import Tensor

from scshards.cells.batch import Batch
from scshards.model.config import ModelConfig
from scshards.model.transformer import CellModel


def token_outputs(model: CellModel, batch: Batch) -> Tensor:
    """What the encoder makes of each token, caught on its way out."""
    caught: list[Tensor] = []
    handle = model.transformer_encoder.register_forward_hook(lambda *a: caught.append(a[2]))
    model(batch)
    handle.remove()
    return caught[0]


def test_avg_pool_is_the_mean_of_the_tokens(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    model = CellModel(dataclasses.replace(small, cell_style="avg-pool")).eval()
    batch = make_batch(7, 3, 1)
    x = token_outputs(model, batch)
    cells = model(batch).cell_embeddings
    for b, n in enumerate((7, 3, 1)):
        torch.testing.assert_close(cells[b], x[b, :n].mean(0), **NEAR)


def test_w_pool_is_weighed_by_values(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    model = CellModel(dataclasses.replace(small, cell_style="w-pool")).eval()
    batch = make_batch(7, 3)
    batch.values[:, 0], batch.values[:, 1] = -2, -1
    x = token_outputs(model, batch)
    cells = model(batch).cell_embeddings
    for b, n in enumerate((7, 3)):
        total = sum(batch.values[b, i] * x[b, i] for i in range(n))
        torch.testing.assert_close(cells[b], total / total.norm(), **NEAR)
    assert torch.equal(model.embed(batch), cells)


def test_scaling_multiplies_the_token(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    model = CellModel(dataclasses.replace(small, value_style="scaling")).eval()
    assert not list(model.value_encoder.parameters())
    batch = make_batch(7, 3)
    expected = model.encoder(batch.genes) * batch.values[:, :, None]
    caught: list[Tensor] = []
    model.transformer_encoder.register_forward_pre_hook(lambda _, a: caught.append(a[0]))
    model(batch)
    torch.testing.assert_close(caught[0], expected, **NEAR)


def test_categories_have_a_row_each(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    config = dataclasses.replace(
        small, value_style="category", n_bins=10, pad_value=10.0, mask_value=11.0
    )
    model = CellModel(config).eval()
    assert model.value_encoder.embedding.weight.shape == (12, 16)
    batch = make_batch(12)
    batch.values[0] = torch.arange(12)
    rows = model.value_encoder(batch.values)[0]
    expected = torch.nn.functional.layer_norm(model.value_encoder.embedding.weight, (16,))
    torch.testing.assert_close(rows, expected, **NEAR)
    model(batch).predictions.sum().backward()
    norms = model.value_encoder.embedding.weight.grad.abs().amax(1)
    assert norms[10] == 0
    assert (norms[[0, 5, 9, 11]] > 0).all()


def test_zero_probabilities_multiply_nothing(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    """Predictions are those of the model without them, as in scGPT unless it samples."""
    model = CellModel(dataclasses.replace(small, explicit_zero_prob=True), seed=1)
    plain = CellModel(small, seed=1)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "zero_logit" not in k})
    batch = make_batch(7, 3)
    for training in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = model.train(training)(batch)
            torch.manual_seed(0)
            expected = plain.train(training)(batch)
        assert torch.equal(out.predictions, expected.predictions)
        for p in (out.zero_probs, out.mvc_zero_probs):
            assert p.shape == (2, 7)
            assert ((p > 0) & (p < 1)).all()
    assert expected.zero_probs is expected.mvc_zero_probs is None


@pytest.mark.parametrize("style", ["inner product", "inner product, detach"])
def test_mvc_trains_the_tokens_unless_detached(
    small: ModelConfig, make_batch: Callable[..., Batch], style: str
) -> None:
    """Through the query alone: the cell embedding is cut off by a hook."""
    model = CellModel(dataclasses.replace(small, mvc_style=style)).eval()
    model.mvc_decoder.register_forward_pre_hook(lambda _, a: (a[0].detach(), *a[1:]))
    model(make_batch(7, 3)).mvc_predictions.sum().backward()
    grad = model.encoder.embedding.weight.grad
    assert (grad is None or bool((grad == 0).all())) == (style == "inner product, detach")

"""Low-rank adapters: a model with them beside the formula, and beside the model they are merged into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from scshards.model.adapters import ATTENTION, FEED_FORWARD, add_adapters, merged, scales
from scshards.model.config import ModelConfig
from scshards.model.transformer import CellModel

SHAPE = {"n_tokens": 40, "pad_id": 37, "d_model": 16, "n_heads": 2, "d_hid": 24, "n_layers": 2}


def model() -> CellModel:
    return CellModel(ModelConfig(**SHAPE, dropout=0.0, n_classes=3), seed=4)


def adapted(layers=ATTENTION + FEED_FORWARD, seed: int = 9) -> CellModel:
    out = model()
    add_adapters(out.transformer_encoder, layers, 3, 6.0, seed=seed)
    return out


def spread(of: nn.Module) -> None:
    """Adapters as training leaves them: B is no longer 0."""
    with torch.no_grad():
        for name, p in of.named_parameters():
            if name.endswith("lora_b"):
                p.copy_(torch.sin(torch.arange(p.numel())).view_as(p) / 5)


def test_a_layer_computes_the_formula():
    layer = adapted().transformer_encoder.layers[1].linear1
    spread(layer)
    x = torch.randn(5, 7, 16)
    w, b, lora_a, lora_b = (
        t.detach().double().numpy() for t in (layer.weight, layer.bias, layer.lora_a, layer.lora_b)
    )
    expected = np.einsum("...i,oi->...o", x.double().numpy(), w + 2.0 * lora_b @ lora_a) + b
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-5)


def test_at_first_it_is_the_model_itself_to_the_bit(make_batch):
    batch = make_batch(9, 4, 7, 12)
    plain, with_adapters = model()(batch), adapted()(batch)
    assert plain.predictions.equal(with_adapters.predictions)
    assert plain.class_logits.equal(with_adapters.class_logits)


@pytest.mark.parametrize("layers", [ATTENTION, ATTENTION + FEED_FORWARD])
def test_merged_it_is_the_model_with_them(make_batch, layers):
    batch = make_batch(9, 4, 7, 12)
    one, plain = adapted(layers), model()
    spread(one)
    assert set(scales(one)) == {
        f"transformer_encoder.layers.{i}.{'self_attn.' if name in ATTENTION else ''}{name}"
        for i in range(2)
        for name in layers
    }
    state = merged(one.state_dict(), scales(one))
    assert state.keys() == plain.state_dict().keys()
    before = plain(batch)
    plain.load_state_dict(state)
    found, expected = plain(batch), one(batch)
    moved = (before.predictions - expected.predictions).abs().max()
    assert moved > 0.01, "the adapters must do something"
    for name in ("predictions", "cell_embeddings", "class_logits", "mvc_predictions"):
        a, b = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_is_drawn_is_a_function_of_seed_and_name():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    all_of, attention, other = adapted(), adapted(ATTENTION), adapted(seed=10)
    assert torch.get_rng_state().equal(state)
    a, b, c = (
        {n: t for n, t in m.state_dict().items() if n.endswith("lora_a")}
        for m in (all_of, attention, other)
    )
    assert len(a) == 8 and len(b) == 4
    assert all(a[n].equal(t) for n, t in b.items())
    assert not any(a[n].equal(t) for n, t in c.items())
    assert len({t.sum().item() for t in a.values()}) == 8, "each has weights of its own"
    assert all(t.abs().max() <= t.shape[1] ** -0.5 and t.std() > 0.1 for t in a.values())

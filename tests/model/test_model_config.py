"""ModelConfig refuses what no model can be built from."""

from __future__ import annotations

import dataclasses

import pytest

from scshards.base.config import build
from scshards.base.errors import ConfigError
from scshards.model.config import ModelConfig


def test_defaults_are_the_whole_human_model() -> None:
    config = ModelConfig(n_tokens=60697, pad_id=60694)
    assert (config.d_model, config.n_heads, config.d_hid, config.n_layers) == (512, 8, 512, 12)
    assert (config.pad_value, config.mask_value, config.n_bins, config.max_length) == (
        -2,
        -1,
        51,
        1200,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_tokens": 0},
        {"pad_id": 10},
        {"pad_id": -1},
        {"d_model": 0},
        {"d_model": 100},
        {"n_heads": 0},
        {"d_hid": 0},
        {"n_layers": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"pad_value": float("nan")},
        {"mask_value": float("inf")},
        {"mask_value": -2.0},
        {"n_bins": 1},
        {"max_length": 1},
        {"value_style": "binned"},
        {"cell_style": "max-pool"},
        {"mvc_style": "concat query"},
        {"pad_value": -2.0, "value_style": "category"},
        {"mask_value": 53.0, "value_style": "category", "pad_value": 51.0},
        {"n_bins": 0, "value_style": "category"},
        {"value_style": "scaling", "generate": True},
        {"cell_style": "avg-pool", "generate": True},
        {"domain_norm": True, "generate": True, "n_domains": 2},
        {"n_classes": 1},
        {"n_classes": -2},
        {"n_class_layers": 0},
        {"n_domains": 2},
        {"n_domains": 0, "use_domain_labels": True},
        {"n_domains": 0, "adversary": True},
        {"n_domains": 0, "domain_norm": True},
    ],
    ids=str,
)
def test_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as e:
        ModelConfig(**({"n_tokens": 10, "pad_id": 7} | wrong))  # type: ignore[arg-type]
    assert next(iter(wrong)) in str(e.value)
    assert e.value.advice


def test_frozen_and_rebuilt_from_its_tables() -> None:
    config = ModelConfig(n_tokens=10, pad_id=7, d_model=8, n_heads=2, mvc=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 16  # type: ignore[misc]
    assert build(ModelConfig, dataclasses.asdict(config)) == config

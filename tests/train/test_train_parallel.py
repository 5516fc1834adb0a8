from __future__ import annotations

import dataclasses

import pytest
import torch
from train_support import small_batch, small_config, small_model

from scshards.base.errors import ConfigError
from scshards.cells.batch import GenerateBatch
from scshards.train.parallel import as_wide, prepare
from scshards.train.setup import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_a_wide_batch_is_the_batch_and_padding():
    model = small_model()
    config = dataclasses.replace(model.config, max_length=60)
    batch = small_batch(5)
    wide = as_wide(batch, config)
    n = batch.genes.shape[1]
    assert wide.genes.shape == wide.values.shape == wide.targets.shape == (5, 60)
    assert wide.is_pad[:, n:].all() and not wide.is_masked[:, n:].any()
    assert set(wide.genes[:, n:].flatten().tolist()) == {config.pad_id}
    with torch.no_grad():
        a, b = model(batch), model(wide)
    real = ~batch.is_pad
    torch.testing.assert_close(b.predictions[:, :n][real], a.predictions[real])
    torch.testing.assert_close(b.cell_embeddings, a.cell_embeddings)


def test_both_parts_of_a_generate_batch_are_widened():
    model = small_model(generate=True)
    config = dataclasses.replace(model.config, max_length=50)
    known, unknown = small_batch(4), small_batch(4, seed=1)
    batch = GenerateBatch(
        known_genes=known.genes,
        known_values=known.targets,
        known_is_pad=known.is_pad,
        unknown_genes=unknown.genes[:, 1:],
        unknown_targets=unknown.targets[:, 1:],
        unknown_is_pad=unknown.is_pad[:, 1:],
        ratio=0.5,
        key=known.key,
        labels={},
        weight=known.weight,
    )
    wide = as_wide(batch, config)
    assert wide.known_genes.shape == wide.unknown_genes.shape == (4, 50)
    assert as_wide(wide, config).known_values.equal(wide.known_values)
    with torch.no_grad():
        a, b = model(batch), model(wide)
    real = ~batch.unknown_is_pad
    n = real.shape[1]
    torch.testing.assert_close(b.predictions[:, :n][real], a.predictions[real])


def test_padding_that_would_count_is_refused():
    model = small_model(domain_norm=True, n_domains=2)
    with pytest.raises(ConfigError, match="counts padding"):
        prepare(model, ALONE, small_config("run.compile=true").run)
    prepare(model, ALONE, small_config("run.parallel=fsdp2").run)  # alone there is nothing to shard
    assert type(model).__name__ == "CellModel"

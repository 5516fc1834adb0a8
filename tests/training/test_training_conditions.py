"""Models that are told a label of each cell by a token: trained, evaluated, applied to shard sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from train_support import small_config

from scshards import CellLoader, CollateOptions
from scshards.applying.embed import embed
from scshards.applying.evaluate import evaluate_run
from scshards.base.errors import SourceError
from scshards.cells.batch import GenerateBatch
from scshards.model.scgpt import load_model
from scshards.ranks.ranks import Ranks
from scshards.training.data import once_loader
from scshards.training.loop import train

HERE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), bf16=False)


def mean_of_the_genes(batches: list[Any]) -> tuple[float, int]:
    """The mean squared error of the mean of the values that are seen in a cell, and how many are asked."""
    errors: list[float] = []
    for batch in batches:
        for b in range(len(batch)):
            if isinstance(batch, GenerateBatch):
                seen = batch.known_values[b, 2:][~batch.known_is_pad[b, 2:]]
                asked = batch.unknown_targets[b][~batch.unknown_is_pad[b]]
            else:
                hidden, is_gene = batch.is_masked[b, 2:], ~batch.is_pad[b, 2:]
                seen = batch.targets[b, 2:][is_gene & ~hidden]
                asked = batch.targets[b, 2:][hidden]
            errors += (asked.double() - seen.double().mean()).square().tolist()
    return float(np.mean(errors)), len(errors)


@pytest.mark.parametrize("objective", ["mask", "generate"])
def test_a_model_is_told_the_conditions(shards: str, tmp_path: Path, objective: str) -> None:
    run = str(tmp_path / "run")
    more = ["data.max_length=70", "data.conditions=['kind']", f"task.objective={objective}"]
    train(shards, run, small_config(*more), shown=False)
    loaded = load_model(run)
    collate = CollateOptions(max_length=70, conditions=("kind",), objective="none")
    loader = CellLoader(shards, batch_size=8, shuffle=False, drop_last=False, collate=collate)
    assert loaded.vocab == loader.vocab.to_dict()
    assert {"<kind:k0>", "<kind:k1>", "<kind:k2>", "<kind:>"} < loaded.vocab.keys()

    # Tokens of conditions are no genes: no baseline looks at their values.
    found = evaluate_run(run, shards, device="cpu", shown=False)
    once = once_loader(shards, small_config(*more), HERE, "valid", 64)
    expected, n = mean_of_the_genes(list(once))
    assert (found.n_masked, found.cell_mean) == (n, pytest.approx(expected))

    embed(run, shards, tmp_path / "cells.h5ad", shown=False)
    vectors = anndata.read_h5ad(tmp_path / "cells.h5ad")
    batch = next(iter(loader))
    with torch.no_grad():
        own = loaded.model.eval()(batch).cell_embeddings
    own = torch.nn.functional.normalize(own, dim=1).numpy()
    rows = [list(vectors.obs_names).index(key) for key in batch.cell_keys]
    np.testing.assert_allclose(np.asarray(vectors.obsm["X_scshards"])[rows], own, atol=1e-5)

    with pytest.raises(SourceError, match="told kind of each cell") as e:
        embed(run, str(Path(shards).with_name("cells.h5ad")), tmp_path / "no.h5ad", shown=False)
    assert "--obs kind" in str(e.value)

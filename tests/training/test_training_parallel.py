from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from train_support import N_GENES, small_batch, small_config, small_model, take

from scshards.base.errors import ConfigError
from scshards.ranks.ranks import Ranks
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.loader import CellLoader
from scshards.tasks.finetune import IntegrateTask
from scshards.training.micro import as_wide, cut
from scshards.training.parallel import prepare
from scshards.training.step import Stepper

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


@pytest.mark.parametrize("kept", [None, 6])
def test_both_parts_of_a_generate_batch_are_as_wide_as_a_cell(shards, kept):
    """One shape for each ratio, whatever cells there are, and no token more than max_length."""
    options = CollateOptions(
        max_length=50, objective="generate", mask_ratio=(0.25, 0.5, 0.75), keep_first=kept
    )
    model = small_model(generate=True, max_length=50)
    shapes, narrow = {}, set()
    with CellLoader(shards, batch_size=9, collate=options) as loader:
        for batch in loader:
            for piece in cut(batch, 2):
                wide = as_wide(piece, model.config, kept or 1)
                sizes = tuple(
                    getattr(wide, f"{part}_{name}").shape[1]
                    for part, names in (("known", "values"), ("unknown", "targets"))
                    for name in ("genes", names, "is_pad")
                )
                shapes.setdefault(batch.ratio, set()).add(sizes)
                narrow.add(piece.known_genes.shape[1] + piece.unknown_genes.shape[1])
    assert len(narrow) > 3, "the pieces must be of several widths"
    for ratio in (0.25, 0.5, 0.75):
        n_unknown = int((50 - (kept or 1)) * ratio)
        assert shapes.pop(ratio) == {(*[50 - n_unknown] * 3, *[n_unknown] * 3)}
    assert shapes == {}
    piece = dataclasses.replace(
        piece, known_genes=piece.known_genes % N_GENES, unknown_genes=piece.unknown_genes % N_GENES
    )
    wide = as_wide(piece, model.config)
    assert as_wide(wide, model.config).known_values.equal(wide.known_values)
    with torch.no_grad():
        a, b = (model(x, cell_prompt=True) for x in (piece, wide))
    real = ~piece.unknown_is_pad
    for x, y in ((a.predictions, b.predictions), (a.prompt_predictions, b.prompt_predictions)):
        torch.testing.assert_close(y[:, : real.shape[1]][real], x[real])


def test_batch_norm_by_domain_compiles(monkeypatch):
    """Three steps as they are written and compiled, where batches are padded to one shape."""
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"),
    )
    found = {}
    for compiled in (False, True):
        torch.compiler.reset()
        config = small_config(f"run.compile={str(compiled).lower()}")
        model = small_model(n_domains=2, domain_norm=True, max_length=60)
        task = IntegrateTask(model, "domain", similarity_weight=0)
        prepare(model, ALONE, config.run)
        sgd = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
        stepper = Stepper(task, sgd, config, ALONE, micro_batch=6, total_steps=10)
        results = []
        for seed in range(3):
            batch = small_batch(6, seed=seed, weight=[1, 1, 1, 1, 1, 0])
            batch.labels["domain"] = torch.tensor([seed % 2] * 5 + [-1])
            results.append(take(stepper, batch, 9))
        assert {r.padded_tokens == 6 * 60 for r in results} == {compiled}
        found[compiled] = (
            [r.sums for r in results],
            [torch.tensor(r.grad_norm) for r in results],
            dict(model.state_dict()),
        )
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-5)
    state = found[True][2]
    assert [int(state[f"dsbn.bns.{k}.num_batches_tracked"]) for k in (0, 1)] == [2, 1]


def test_alone_there_is_nothing_to_shard():
    model = small_model()
    prepare(model, ALONE, small_config("run.parallel=fsdp2").run)
    assert type(model).__name__ == "CellModel"


@pytest.mark.parametrize("bf16", [False, True])
def test_layers_that_are_computed_anew_have_the_same_gradients(bf16: bool) -> None:
    found, kept = {}, {}
    for flag in ("true", "false"):
        model = small_model(dropout=0.2)
        names = list(model.state_dict())
        prepare(model, ALONE, small_config(f"run.activation_checkpointing={flag}").run)
        saved: list[int] = []

        def note(x: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(x.numel())
            return x

        torch.manual_seed(5)
        here = dataclasses.replace(ALONE, bf16=bf16)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), here.autocast():
            out = model(small_batch(5))
        kept[flag] = sum(saved)
        (out.predictions.square().sum() + out.mvc_predictions.sum()).backward()
        assert list(model.state_dict()) == names
        found[flag] = {n: p.grad for n, p in model.named_parameters()}
    assert all(g.equal(found["false"][n]) for n, g in found["true"].items())
    assert kept["true"] < 0.5 * kept["false"]


def test_models_are_shared_by_a_number_that_divides_the_ranks():
    settings = small_config("run.parallel=fsdp2", "run.shard_ranks=3").run
    with pytest.raises(ConfigError, match="4 ranks can't be dealt to models that 3 ranks share"):
        prepare(small_model(), Ranks(0, 4, torch.device("cpu")), settings)
    with pytest.raises(ConfigError, match=r"run\.shard_ranks: is for run\.parallel"):
        small_config("run.shard_ranks=2")

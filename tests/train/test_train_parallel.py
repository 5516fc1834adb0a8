from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from train_support import small_batch, small_config, small_model, take

from scshards.cells.batch import GenerateBatch
from scshards.train.parallel import as_wide, prepare
from scshards.train.setup import Ranks
from scshards.train.step import Stepper
from scshards.train.tasks_finetune import IntegrateTask

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

"""Domains: batch norm by domain, labels in the decoders, the adversary's reversed gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_support import NEAR
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch
from scshards.model.config import ModelConfig
from scshards.model.layout import Padded
from scshards.model.loss import cross_entropy
from scshards.model.norm import DomainNorm
from scshards.model.transformer import CellModel


@pytest.fixture
def x() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return 3 * torch.randn(5, 7, 4, generator=g) + torch.arange(4)


ALL = torch.ones(5)
EVERYWHERE = Padded(torch.zeros(5, 7, dtype=torch.bool))


def test_one_domain_a_time_is_batch_norm(x: torch.Tensor) -> None:
    """Without padding and in turn, as scGPT has it: torch's own layer, one for each domain."""
    theirs = [nn.BatchNorm1d(4, eps=6.1e-5, affine=False) for _ in range(3)]
    ours = DomainNorm(3, 4)
    for step, k in enumerate((0, 2, 0, 2)):
        a = (x * (step + 1)).requires_grad_(True)
        b = a.detach().clone().requires_grad_(True)
        expected = theirs[k](a.permute(0, 2, 1)).permute(0, 2, 1)
        found = ours(b, torch.full((5,), k), ALL, EVERYWHERE)
        torch.testing.assert_close(found, expected, **NEAR)
        weigh = torch.arange(a.numel()).reshape(a.shape) % 7
        (expected * weigh).sum().backward()
        (found * weigh).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4)
    state = nn.ModuleList(theirs).state_dict(prefix="bns.")
    torch.testing.assert_close(dict(ours.state_dict()), dict(state), **NEAR)
    assert list(ours.state_dict()) == list(state)
    ours.eval()
    for k, bn in enumerate(theirs):
        expected = bn.eval()(x.permute(0, 2, 1)).permute(0, 2, 1)
        found = ours(x, torch.full((5,), k), ALL, EVERYWHERE)
        torch.testing.assert_close(found, expected, **NEAR)


def test_mixed_domains_and_padding(x: torch.Tensor) -> None:
    ours = DomainNorm(3, 4)
    domains = torch.tensor([0, 1, 0, 1, 1])
    counts = torch.arange(7) < torch.tensor([7, 3, 1, 5, 0])[:, None]
    found = ours(x, domains, ALL, Padded(~counts))
    state = ours.state_dict()
    for k in (0, 1):
        tokens = x[domains == k][counts[domains == k]]
        mean, variance = tokens.mean(0), tokens.var(0, unbiased=False)
        expected = (x[domains == k] - mean) / (variance + 6.1e-5).sqrt()
        torch.testing.assert_close(found[domains == k], expected, **NEAR)
        running = 0.9 + 0.1 * tokens.var(0)
        torch.testing.assert_close(state[f"bns.{k}.running_var"], running, **NEAR)
    assert (state["bns.2.running_mean"] == 0).all()
    assert [int(state[f"bns.{k}.num_batches_tracked"]) for k in range(3)] == [1, 1, 0]
    torch.testing.assert_close(
        ours.eval()(x, domains, ALL, Padded(~counts))[3],
        (x[3] - state["bns.1.running_mean"]) / (state["bns.1.running_var"] + 6.1e-5).sqrt(),
        **NEAR,
    )


class Made(TorchDispatchMode):
    """Counts operators, and the numbers that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if not func._schema.is_mutable:
            self.numbers += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_costs_the_same_for_any_number_of_domains(x: torch.Tensor, training: bool) -> None:
    found, domains = [], torch.tensor([0, 1, 0, 1, 1])
    for n_domains in (2, 1000):
        norm, own = DomainNorm(n_domains, 4).train(training), x.clone().requires_grad_()
        with Made() as made:
            norm(own, domains, ALL, EVERYWHERE).sum().backward()
        found.append((made.calls, made.numbers))
    assert found[0] == found[1]
    assert found[0][1] > x.numel()


def test_weights_are_loaded_by_scgpts_names(x: torch.Tensor) -> None:
    norm, other = DomainNorm(2, 4), DomainNorm(2, 4)
    norm(x, torch.tensor([0, 1, 0, 1, 1]), ALL, EVERYWHERE)
    state = dict(norm.state_dict())
    other.load_state_dict(state)
    torch.testing.assert_close(dict(other.state_dict()), state)
    with torch.device("meta"):
        meta = DomainNorm(2, 4)
    meta.load_state_dict(state, assign=True)
    torch.testing.assert_close(dict(meta.state_dict()), state)
    with pytest.raises(RuntimeError, match=r"Missing key.*bns\.1\.running_var"):
        other.load_state_dict({k: v for k, v in state.items() if k != "bns.1.running_var"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bns\.2\.running_var"):
        other.load_state_dict(state | {"bns.2.running_var": torch.ones(4)})
    with pytest.raises(RuntimeError, match=r"bns\.0\.running_mean is \[5\], not \[4\]"):
        other.load_state_dict(state | {"bns.0.running_mean": torch.ones(5)})


def test_cells_of_weight_0_are_not_measured(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    config = dataclasses.replace(small, n_domains=2, domain_norm=True, dropout=0.0)
    batch = make_batch(7, 3, 5)
    batch.weight[2] = 0
    whole, two = CellModel(config, seed=1), CellModel(config, seed=1)
    whole(batch, domains_B=torch.tensor([0, 1, 1]))
    two(make_batch(7, 3, 5), domains_B=torch.tensor([0, 1, 0]))
    means = [m.dsbn.running_mean[1] for m in (whole, two)]
    torch.testing.assert_close(*means, **NEAR)
    assert means[0].abs().max() > 0


def test_decoders_are_told_the_domain(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    config = dataclasses.replace(small, n_domains=2, use_domain_labels=True)
    model = CellModel(config).eval()
    a, b = (model(make_batch(7, 3), domains_B=torch.tensor(d)) for d in ([0, 1], [0, 0]))
    assert torch.equal(a.cell_embeddings, b.cell_embeddings)
    for x, y in ((a.predictions, b.predictions), (a.mvc_predictions, b.mvc_predictions)):
        torch.testing.assert_close(x[0], y[0], **NEAR)
        assert (x[1, :3] - y[1, :3]).abs().min() > 1e-4


def test_the_adversary_learns_and_the_encoder_unlearns(
    small: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    """Beside a model whose domains are its classes: the head's gradient is the same, and what goes
    on from it has the opposite sign."""
    adversary = CellModel(dataclasses.replace(small, n_domains=3, adversary=True)).eval()
    plain = CellModel(dataclasses.replace(small, n_classes=3)).eval()
    head = adversary.grad_reverse_discriminator
    batch, codes = make_batch(7, 3, 5, 4), torch.tensor([0, 2, 1, 0])
    found = adversary(batch)
    cross_entropy(found.domain_logits, codes, batch.weight)[0].backward()
    # The same head without the reversal.
    logits = head(plain.embed(batch))
    torch.testing.assert_close(found.domain_logits, logits, **NEAR)
    before = {n: p.grad.clone() for n, p in head.named_parameters()}
    head.zero_grad()
    cross_entropy(logits, codes, batch.weight)[0].backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(before[name], p.grad, **NEAR)
    reached = 0
    for (name, a), b in zip(
        adversary.transformer_encoder.named_parameters(),
        plain.transformer_encoder.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(a.grad, -b.grad, msg=name, **NEAR)
        reached += int(a.grad.abs().max() > 0)
    assert reached > 20


def test_refused(small: ModelConfig, make_batch: Callable[..., Batch]) -> None:
    batch, domains = make_batch(7, 3), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="without domains"):
        CellModel(small)(batch, domains_B=domains)
    labels = CellModel(dataclasses.replace(small, n_domains=2, use_domain_labels=True))
    norm = CellModel(dataclasses.replace(small, n_domains=2, domain_norm=True))
    for model in (labels, norm):
        with pytest.raises(ConfigError, match="not told the cells' domains"):
            model(batch)
    with pytest.raises(ConfigError, match="not told the cells' domains"):
        norm.embed(batch)
    assert labels.embed(batch).shape == (2, 16)

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train_support import small_batch

from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.config import ModelConfig
from scshards.model.transformer import CellModel
from scshards.training.log.flops import Amounts, forward_flops, peak_flops, peak_of, training_flops

B, L = 3, 11


def config(**more) -> ModelConfig:
    sizes = {"d_model": 16, "n_heads": 2, "d_hid": 24, "n_layers": 3, "dropout": 0.0}
    return ModelConfig(n_tokens=42, pad_id=40, **(sizes | more))


def full_batch() -> Batch:
    """No padding, so that what a model computes is what counts."""
    is_masked = torch.zeros(B, L, dtype=torch.bool)
    is_masked[:, 1::2] = True
    targets = torch.ones(B, L)
    return Batch(
        genes=torch.randint(0, 40, (B, L), dtype=torch.int32),
        values=targets,
        targets=targets,
        is_masked=is_masked,
        is_pad=torch.zeros(B, L, dtype=torch.bool),
        key=torch.arange(B),
        labels={},
        weight=torch.ones(B),
    )


def counted(run) -> int:
    """What torch's own counter sees of the products; of an attention kernel for CPUs it is told."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    told = {kernel: lambda q, k, v, **_: 4 * math.prod(q) * k[2]}
    counter = FlopCounterMode(display=False, custom_mapping=told)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"mvc": False},
        {"explicit_zero_prob": True},
        {"value_style": "category", "pad_value": 51.0, "mask_value": 52.0},
        {"value_style": "scaling"},
        {"n_classes": 5, "n_class_layers": 2},
        {"n_domains": 3, "use_domain_labels": True, "adversary": True},
    ],
)
def test_a_forward_pass_has_the_products_that_torch_counts(parts):
    model, batch = CellModel(config(**parts)), full_batch()
    domains_B = torch.arange(B) if "n_domains" in parts else None
    expected = forward_flops(model.config, Amounts.of(batch))
    assert counted(lambda: model(batch, domains_B=domains_B)) == expected


@pytest.mark.parametrize("cell_prompt", [False, True])
def test_unknown_genes_skip_the_keys_and_the_projection_that_they_do_not_have(cell_prompt):
    model = CellModel(config(generate=True))
    p, g = 7, 4
    batch = GenerateBatch(
        known_genes=torch.zeros(B, p, dtype=torch.int32),
        known_values=torch.ones(B, p),
        known_is_pad=torch.zeros(B, p, dtype=torch.bool),
        unknown_genes=torch.ones(B, g, dtype=torch.int32),
        unknown_targets=torch.ones(B, g),
        unknown_is_pad=torch.zeros(B, g, dtype=torch.bool),
        ratio=0.4,
        key=torch.arange(B),
        labels={},
        weight=torch.ones(B),
    )
    c = model.config
    found = counted(lambda: model(batch, cell_prompt=cell_prompt))
    # A gene's product with itself is no matrix product; values are embedded once more, too.
    itself = B * g * 4 * c.d_model * c.n_layers
    again = 2 * B * p * (c.d_model + c.d_model**2) if cell_prompt else 0
    passes = 2 if cell_prompt else 1
    expected = forward_flops(c, Amounts.of(batch), cell_prompt=cell_prompt)
    assert found == expected - passes * itself + again


def test_a_backward_pass_is_twice_the_forward_pass():
    model, batch = CellModel(config()), full_batch()

    def step():
        out = model(batch)
        (out.predictions.sum() + out.mvc_predictions.sum()).backward()

    # Values have no gradient: the first product of their embedding has only one in its backward.
    skipped = 2 * B * L * model.config.d_model
    assert counted(step) == training_flops(model.config, Amounts.of(batch)) - skipped


def test_padding_is_no_work():
    batch = small_batch(6)
    lengths = (~batch.is_pad).sum(dim=1).tolist()
    assert len(set(lengths)) > 3
    amounts = Amounts.of(batch)
    assert (amounts.cells, amounts.encoded) == (6, sum(lengths))
    assert amounts.pairs == sum(n * n for n in lengths)

    wider = dataclasses.replace(
        batch,
        **{
            name: torch.nn.functional.pad(getattr(batch, name), (0, 9), value=fill)
            for name, fill in (
                ("genes", 40), ("values", -2), ("targets", -2), ("is_masked", False), ("is_pad", True)
            )
        },
    )  # fmt: skip
    assert Amounts.of(wider) == amounts

    keep = ~batch.is_pad
    spare = 7
    packed = PackedBatch(
        **{
            name: torch.cat([getattr(batch, name)[keep], torch.zeros(spare)]).to(
                getattr(batch, name).dtype
            )
            for name in ("genes", "values", "targets", "is_masked")
        },
        is_pad=torch.cat([torch.zeros(sum(lengths)), torch.ones(spare)]).bool(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=50,
        key=batch.key,
        labels={},
        weight=batch.weight,
    )
    assert Amounts.of(packed) == amounts


def test_unknown_genes_attend_to_the_known_ones_and_themselves():
    known, unknown = torch.tensor([4, 2]), torch.tensor([3, 5])
    batch = GenerateBatch(
        known_genes=torch.zeros(2, 4, dtype=torch.int32),
        known_values=torch.zeros(2, 4),
        known_is_pad=torch.arange(4) >= known[:, None],
        unknown_genes=torch.zeros(2, 5, dtype=torch.int32),
        unknown_targets=torch.zeros(2, 5),
        unknown_is_pad=torch.arange(5) >= unknown[:, None],
        ratio=0.5,
        key=torch.arange(2),
        labels={},
        weight=torch.ones(2),
    )
    amounts = Amounts.of(batch)
    assert (amounts.encoded, amounts.valued, amounts.predicted) == (14, 6, 8)
    allowed = 0
    for p, g in zip(known.tolist(), unknown.tolist(), strict=True):
        is_known = torch.arange(p + g) < p
        allowed += int((is_known[None, :] | torch.eye(p + g, dtype=torch.bool)).sum())
    assert amounts.pairs == allowed


def test_the_published_model_needs_what_the_literature_says_of_its_size():
    """6 FLOPs a weight and token, apart from attention: 12 layers of 512 are 113 MFLOP a token."""
    whole = ModelConfig(n_tokens=60697, pad_id=60694)
    token = Amounts(cells=0, encoded=1, valued=0, projected=1, predicted=0, pairs=0)
    pair = Amounts(cells=0, encoded=0, valued=0, projected=0, predicted=0, pairs=1200)
    assert training_flops(whole, token) == pytest.approx(113e6, rel=0.01)
    assert training_flops(whole, pair) == pytest.approx(88e6, rel=0.01)


def test_a_peak_is_known_or_absent():
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_of("NVIDIA A10", "fp32") == 31.2e12
    assert peak_of("Tesla V100-SXM2-32GB", "bf16") is None
    for name in ("NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Abacus 3000"):
        assert peak_of(name, "bf16") is None
    cpu = torch.device("cpu")
    assert peak_flops(cpu, bf16=True) is None
    assert peak_flops(cpu, bf16=True, told=0.25) == 0.25e12

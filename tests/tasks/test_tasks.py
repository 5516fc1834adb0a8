"""The losses of every task: against the reference's own numbers, and against formulas written here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from train_support import N_GENES, PAD, small_batch, small_config, take

from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.config import ModelConfig
from scshards.model.scgpt import load_model
from scshards.model.transformer import CellModel, ModelOutput
from scshards.ranks.ranks import Ranks
from scshards.tasks.finetune import AnnotateTask, IntegrateTask
from scshards.tasks.pretrain import GenerateTask, MaskTask
from scshards.training.micro import cut
from scshards.training.step import Stepper

GOLDEN = Path(__file__).parent.parent / "golden"
ALONE = Ranks(0, 1, torch.device("cpu"))


def _model(**options) -> CellModel:
    shape = {"d_model": 16, "n_heads": 2, "d_hid": 16, "n_layers": 2, "dropout": 0.0}
    return CellModel(
        ModelConfig(n_tokens=N_GENES + 2, pad_id=PAD, **(shape | options)), seed=1
    ).eval()


def _labelled(n: int, weight: list[float] | None = None) -> Batch:
    batch = small_batch(n, weight=weight)
    batch.labels["kind"] = torch.tensor([(b % 4) - 1 for b in range(n)])  # -1, 0, 1, 2, -1 ...
    batch.labels["donor"] = torch.tensor([b % 2 for b in range(n)])
    return batch


def _generated(n: int, weight: list[float] | None = None) -> GenerateBatch:
    """small_batch's cells, their first genes known and the rest unknown."""
    batch = small_batch(n, weight=weight)
    width = batch.genes.shape[1] // 2
    return GenerateBatch(
        known_genes=batch.genes[:, :width],
        known_values=batch.targets[:, :width],
        known_is_pad=batch.is_pad[:, :width],
        unknown_genes=batch.genes[:, width:],
        unknown_targets=batch.targets[:, width:],
        unknown_is_pad=batch.is_pad[:, width:],
        ratio=0.5,
        key=batch.key,
        labels=batch.labels,
        weight=batch.weight,
    )


def _golden(name: str) -> tuple[CellModel, dict[str, torch.Tensor]]:
    with np.load(GOLDEN / name / "io.npz") as data:
        io = {k: torch.from_numpy(data[k]) for k in data.files}
    return load_model(str(GOLDEN / name)).model, io


def _means(task, batch) -> dict[str, float]:
    with torch.no_grad():
        sums = task(batch)
    return {t: float(s) / task.counts(batch)[t] for t, s in sums.items()}


def _masked_batch(io: dict[str, torch.Tensor], **labels: torch.Tensor) -> Batch:
    n = len(io["in_genes"])
    return Batch(
        genes=io["in_genes"],
        values=io["in_values"].float(),
        targets=io["in_targets"].float(),
        is_masked=io["in_is_masked"].bool(),
        is_pad=io["in_is_pad"].bool(),
        key=torch.arange(n),
        labels=labels,
        weight=torch.ones(n),
    )


def test_masked_losses_and_similarity_are_the_references():
    model, io = _golden("mask_in_proj")
    means = _means(MaskTask(model), _masked_batch(io))
    assert means["masked_mse"] == pytest.approx(float(io["out_loss_mse"]), rel=1e-5)
    assert means["mvc_mse"] == pytest.approx(float(io["out_loss_mvc_mse"]), rel=1e-5)
    both = IntegrateTask(model, "donor", similarity_threshold=0.3)
    means = _means(both, _masked_batch(io))
    assert means["similarity"] == pytest.approx(float(io["out_loss_ecs"]), rel=1e-5)


def test_the_three_generate_losses_are_the_references():
    model, io = _golden("generate_wqkv")
    n = len(io["in_pcpt_gene"])
    batch = GenerateBatch(
        known_genes=io["in_pcpt_gene"],
        known_values=io["in_pcpt_expr"].float(),
        known_is_pad=io["in_pcpt_is_pad"].bool(),
        unknown_genes=io["in_gen_gene"],
        unknown_targets=io["in_gen_expr_target"].float(),
        unknown_is_pad=io["in_gen_is_pad"].bool(),
        ratio=0.5,
        key=torch.arange(n),
        labels={},
        weight=torch.ones(n),
    )
    means = _means(GenerateTask(model), batch)
    names = {"unknown_mse": "gene_prompt", "mvc_mse": "mvc", "prompt_mse": "cell_prompt"}
    for term, name in names.items():
        assert means[term] == pytest.approx(float(io[f"out_loss_{name}"]), rel=1e-5), term


def test_the_second_pass_begins_at_its_step():
    task = GenerateTask(_model(generate=True), cell_prompt_after=5)
    batch = _generated(4)
    with torch.no_grad():
        before, at, always = task(batch, 4), task(batch, 5), task(batch, None)
    assert set(before) == {"unknown_mse", "mvc_mse"}
    assert set(at) == set(always) == {"unknown_mse", "mvc_mse", "prompt_mse"}
    assert at["unknown_mse"].equal(before["unknown_mse"])
    assert set(GenerateTask(task.model, prompt_weight=0.0)(batch, 9)) == set(before)


def test_the_step_reports_no_second_pass_before_it_begins():
    task = GenerateTask(_model(generate=True), cell_prompt_after=1)
    sgd = torch.optim.SGD(task.parameters(), lr=0.0, fused=True)
    stepper = Stepper(task, sgd, small_config(), ALONE, micro_batch=2, total_steps=9)
    results = [take(stepper, _generated(4), step) for step in (0, 1)]
    at = list(task.terms).index("prompt_mse")
    assert results[0].counts[at] == 0 and results[0].sums[at] == 0
    assert results[1].counts[at] == results[1].counts[0] > 0 and results[1].sums[at] > 0


def _integrate_by_hand(task: IntegrateTask, batch: Batch, out: ModelOutput) -> dict[str, float]:
    """Every loss of integrate, cell by cell in plain Python: scGPT's formulas."""
    cells = [b for b in range(len(batch)) if batch.weight[b] > 0]
    errors, mvc, zero, mvc_zero = [], [], [], []
    for b in cells:
        for i in range(batch.genes.shape[1]):
            if batch.is_masked[b, i]:
                target = batch.targets[b, i].item()
                errors.append((out.predictions[b, i].item() - target) ** 2)
                mvc.append((out.mvc_predictions[b, i].item() - target) ** 2)
                for probs, found in ((out.zero_probs, zero), (out.mvc_zero_probs, mvc_zero)):
                    p = probs[b, i].item()
                    found.append(-math.log(p if target > 0 else 1 - p))
    unit = torch.nn.functional.normalize(out.cell_embeddings.double(), dim=1)
    pairs = []
    for a in cells:
        for b in cells:
            cosine = 0.0 if a == b else max(float(unit[a] @ unit[b]), 0.0)
            pairs.append(1 - (cosine - 0.6) ** 2)
    domains = []
    for b in cells:
        logits = out.domain_logits[b].double()
        code = int(batch.labels["donor"][b])
        domains.append(math.log(sum(math.exp(x) for x in logits.tolist())) - logits[code].item())
    return {
        "masked_mse": np.mean(errors),
        "mvc_mse": np.mean(mvc),
        "zero_nll": np.mean(zero),
        "mvc_zero_nll": np.mean(mvc_zero),
        "similarity": np.mean(pairs),
        "domain_ce": np.mean(domains),
    }


def _integrate(**options) -> IntegrateTask:
    model = _model(
        n_domains=2, use_domain_labels=True, adversary=True, domain_norm=True,
        explicit_zero_prob=True,
    )  # fmt: skip
    return IntegrateTask(model, "donor", similarity_threshold=0.6, **options)


def test_each_loss_of_integrate_against_its_formula():
    task, batch = _integrate(), _labelled(6, weight=[1, 1, 1, 1, 0, 1])
    batch.targets[0, 1:4] = 0.0  # unexpressed genes, or "above zero" would always be right
    batch.is_masked[0, 1:4] = True
    batch.labels["donor"][4] = -1
    with torch.no_grad():
        out = task.run(batch, None)
    expected = _integrate_by_hand(task, batch, out)
    means = _means(task, batch)
    assert set(means) == set(expected) == set(task.terms)
    for term, value in expected.items():
        assert means[term] == pytest.approx(value, rel=1e-5), term


def test_the_adversarys_gradient_is_reversed_on_its_way_into_the_encoder():
    task, batch = _integrate(), _labelled(6)

    def gradient(weight: float) -> dict[str, torch.Tensor]:
        task.zero_grad()
        (weight * task(batch)["domain_ce"]).backward()
        return {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}

    found = gradient(1.0)
    # What the encoder gets makes the head worse: a step along it raises the cross-entropy.
    before = task(batch)["domain_ce"].item()
    with torch.no_grad():
        for name, p in task.model.named_parameters():
            if name.startswith("transformer_encoder") and name in found:
                p -= 1e-3 * found[name]
    assert task(batch)["domain_ce"].item() > before + 1e-5
    with torch.no_grad():
        middle = task(batch)["domain_ce"].item()
        for name, p in task.model.named_parameters():
            if name.startswith("grad_reverse_discriminator") and name in found:
                p -= 1e-3 * found[name]
    assert task(batch)["domain_ce"].item() < middle - 1e-5


def test_annotate_against_softmax_written_out_and_no_class_counts_nothing():
    task = AnnotateTask(_model(n_classes=3, mvc=False), "kind")
    batch = _labelled(9, weight=[1, 1, 1, 1, 1, 1, 1, 0, 1])
    with torch.no_grad():
        logits = task.run(batch, None).class_logits.double().numpy()
    codes, weight = batch.labels["kind"].numpy(), batch.weight.numpy()
    rows = [b for b in range(9) if codes[b] >= 0 and weight[b] > 0]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert task.counts(batch) == {"class_ce": len(rows)} and len(rows) == 5
    expected = -np.mean([np.log(p[b, codes[b]]) for b in rows])
    assert _means(task, batch)["class_ce"] == pytest.approx(expected, rel=1e-6)


def test_accuracy_and_f1_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score

    task = AnnotateTask(_model(n_classes=4, mvc=False), "kind")
    rng = np.random.default_rng(2)
    truth, found = rng.integers(0, 3, 50), rng.integers(0, 3, 50)  # class 3 never occurs
    batch = small_batch(50)
    batch.labels["kind"] = torch.tensor(truth)
    logits = torch.nn.functional.one_hot(torch.tensor(found), 4).float()
    out = ModelOutput(logits, logits, class_logits=logits)
    figures = task.figures(task.tally(batch, out))
    assert figures["accuracy"] == pytest.approx(accuracy_score(truth, found))
    assert figures["macro_f1"] == pytest.approx(f1_score(truth, found, average="macro"))


def test_heads_that_annotate_has_no_part_for_are_frozen():
    task = AnnotateTask(_model(n_classes=3), "kind")
    task(_labelled(5))["class_ce"].backward()
    for name, p in task.model.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
    assert not task.model.decoder.fc[0].weight.requires_grad


def test_codes_of_another_shard_set_become_the_models():
    model = _model(n_classes=3, mvc=False)
    batch, other = _labelled(8), _labelled(8)
    codes = {-1: -1, 0: 2, 1: 0, 2: 1}
    other.labels["kind"] = torch.tensor([codes[c] for c in batch.labels["kind"].tolist()])
    # Their 0 is our 1, their 1 our 2, their 2 our 0.
    table = (1, 2, 0)
    ours = _means(AnnotateTask(model, "kind"), batch)
    assert _means(AnnotateTask(model, "kind", codes=table), other) == pytest.approx(ours)


def _packed(batch: Batch) -> PackedBatch:
    lengths = (~batch.is_pad).sum(dim=1)
    rows = [torch.arange(n) for n in lengths.tolist()]
    pick = {
        name: torch.cat([getattr(batch, name)[b, r] for b, r in enumerate(rows)])
        for name in ("genes", "values", "targets", "is_masked", "is_pad")
    }
    return PackedBatch(
        **pick,
        cu_seqlens=torch.cat((torch.zeros(1), lengths.cumsum(0))).int(),
        max_seqlen=int(lengths.max()),
        key=batch.key,
        labels=batch.labels,
        weight=batch.weight,
    )


def test_packed_cells_have_the_losses_of_padded_ones():
    batch = _labelled(6)
    for task in (MaskTask(_model(explicit_zero_prob=True)), _integrate()):
        padded, packed = _means(task, batch), _means(task, _packed(batch))
        assert set(padded) == set(packed)
        for term in padded:
            assert packed[term] == pytest.approx(padded[term], rel=1e-5), term


def test_pieces_of_generated_cells_are_the_cells():
    batch = _generated(7)
    pieces = list(cut(batch, 3))
    assert [len(p) for p in pieces] == [3, 3, 1]
    for i, piece in enumerate(pieces):
        r = slice(3 * i, 3 * i + 3)
        for pad, names in (
            ("known_is_pad", ("known_genes", "known_values")),
            ("unknown_is_pad", ("unknown_genes", "unknown_targets")),
        ):
            width = getattr(piece, pad).shape[1]
            assert getattr(batch, pad)[r, width:].all()
            for name in names:
                assert getattr(piece, name).equal(getattr(batch, name)[r, :width])


TASKS = {
    "mask": (lambda: MaskTask(_model(explicit_zero_prob=True)), _labelled),
    "generate": (lambda: GenerateTask(_model(generate=True), cell_prompt_after=0), _generated),
    "annotate": (lambda: AnnotateTask(_model(n_classes=3), "kind"), _labelled),
}


@pytest.mark.parametrize("name", TASKS)
def test_micro_batches_take_the_step_of_the_whole_batch(name):
    """30 steps of real training, cut in four ways: the same losses to 1e-6 of their size."""
    make, batches = TASKS[name]
    losses = {}
    for micro in (8, 4, 1):
        task = make()
        adam = torch.optim.SGD(task.parameters(), lr=1e-3, fused=True)
        config = small_config("optim.lr=1e-3")
        stepper = Stepper(task, adam, config, ALONE, micro_batch=micro, total_steps=30)
        batch = batches(8, weight=[1, 1, 1, 1, 1, 1, 0, 1])
        losses[micro] = [take(stepper, batch, s).sums.numpy() for s in range(30)]
    for micro in (4, 1):
        np.testing.assert_allclose(losses[micro], losses[8], rtol=1e-6)
    assert losses[8][-1].sum() < 0.999 * losses[8][0].sum(), "it must have learnt something"

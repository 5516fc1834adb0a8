from __future__ import annotations

import numpy as np
import pytest
import step_worker
import torch
from train_support import small_batch, small_config, small_model, take

from scshards.base.errors import ScshardsError
from scshards.ranks.ranks import Ranks
from scshards.tasks.pretrain import MaskTask
from scshards.training.ema import WeightAverage
from scshards.training.micro import cut
from scshards.training.optim import make_optimizer, moments
from scshards.training.step import Stepper

ALONE = Ranks(0, 1, torch.device("cpu"))


def _stepper(model, config, micro_batch):
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    return Stepper(MaskTask(model), sgd, config, ALONE, micro_batch=micro_batch, total_steps=10)


def _weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_micro_batches_make_the_same_step_as_the_whole_batch():
    batch = small_batch(8)
    masked = [int(m.is_masked.sum()) for m in cut(batch, 2)]
    assert len(set(masked)) > 1, "the micro-batches must differ, or a mean of means would pass"
    config = small_config("optim.clip=1e9")
    start = _weights(small_model())
    results, after = {}, {}
    for micro in (8, 4, 2, 1):
        model = small_model()
        results[micro] = take(_stepper(model, config, micro), batch, 9)
        after[micro] = _weights(model)
    for micro in (4, 2, 1):
        n = float(batch.is_masked.sum())
        assert results[micro].counts.tolist() == results[8].counts.tolist() == [n, n]
        torch.testing.assert_close(results[micro].sums, results[8].sums, rtol=1e-6, atol=0)
        assert results[micro].grad_norm == pytest.approx(results[8].grad_norm, rel=1e-5)
        torch.testing.assert_close(after[micro], after[8], rtol=0, atol=1e-6)
    moved = max((after[8][k] - start[k]).abs().max() for k in start)
    assert moved > 1e-4, "the step must have done something"


def test_a_batch_without_any_cell_changes_nothing_and_is_finite():
    batch = small_batch(4, weight=[0, 0, 0, 0])
    model = small_model()
    before = _weights(model)
    result = take(_stepper(model, small_config("optim.lr=0.1"), 2), batch, 3)
    assert result.counts.tolist() == [0, 0] and result.grad_norm == 0
    assert result.sums.tolist() == [0, 0]
    torch.testing.assert_close(_weights(model), before, rtol=0, atol=0)


def test_the_loss_is_the_mean_over_all_masked_values():
    batch = small_batch(6, weight=[1, 1, 1, 1, 0, 1])
    with torch.no_grad():
        out = small_model()(batch)
    result = take(_stepper(small_model(), small_config(), 2), batch, 0)
    targets, masked = batch.targets.double().numpy(), batch.is_masked.numpy().copy()
    masked[4] = False
    for i, predictions in enumerate((out.predictions, out.mvc_predictions)):
        errors = (predictions.double().numpy() - targets)[masked]
        assert result.sums[i].item() == pytest.approx(np.square(errors).sum(), rel=1e-5)
    assert result.counts.tolist() == [masked.sum()] * 2


def test_pieces_are_the_batch_without_needless_padding():
    batch = small_batch(7)
    pieces = list(cut(batch, 3))
    assert [len(p) for p in pieces] == [3, 3, 1]
    assert torch.cat([p.key for p in pieces]).equal(batch.key)
    for i, p in enumerate(pieces):
        width = p.genes.shape[1]
        assert not p.is_pad[:, width - 1].all()
        rows = slice(3 * i, 3 * i + 3)
        assert p.targets.equal(batch.targets[rows, :width])
        assert batch.is_pad[rows, width:].all()
    (whole,) = cut(batch, 7)
    assert whole is batch


def test_a_loss_that_is_not_finite_stops_and_names_step_and_cells():
    batch = small_batch(4)
    batch.targets[2, 1] = float("nan")
    batch.is_masked[2, 1] = True
    model = small_model()
    before = _weights(model)
    with pytest.raises(ScshardsError) as e:
        take(_stepper(model, small_config("optim.max_skipped=0"), 2), batch, 11)
    assert "step 12: the loss is not finite" in str(e.value)
    assert "000007-0000000002" in str(e.value)
    torch.testing.assert_close(_weights(model), before, rtol=0, atol=0)


def test_bad_steps_are_left_out_until_there_are_too_many_in_a_row():
    model = small_model()
    stepper = _stepper(model, small_config("optim.max_skipped=2"), 2)
    bad = small_batch(4)
    bad.targets[2, 1] = float("inf")
    bad.is_masked[2, 1] = True
    before = _weights(model)
    for step in (0, 1):
        result = take(stepper, bad, step)
        assert result.skip is not None and "000007-0000000002" in result.skip.cells
        assert result.sums.tolist() == result.counts.tolist() == [0, 0]
    torch.testing.assert_close(_weights(model), before, rtol=0, atol=0)
    assert take(stepper, small_batch(4), 5).skip is None  # a good step, with gradients of its own
    assert stepper.skipped_in_a_row == 0
    moved = _weights(model)
    fresh = small_model()
    take(_stepper(fresh, small_config(), 2), small_batch(4), 5)
    torch.testing.assert_close(moved, _weights(fresh), rtol=0, atol=0)
    for step in (6, 7):
        assert take(stepper, bad, step).skip is not None
    with pytest.raises(ScshardsError, match="step 9: the loss is not finite after 2 such steps"):
        take(stepper, bad, 8)


def test_a_step_that_is_left_out_is_told_a_step_later_and_leaves_all_as_it_was():
    """Three steps, the second of them bad: as the first and third alone, to the bit."""
    config = small_config("optim.weight_decay=0.1")
    bad = small_batch(4)
    bad.targets[2, 1] = float("nan")
    bad.is_masked[2, 1] = True
    ends, told = [], []
    for batches in (
        [(0, small_batch(4)), (1, bad), (2, small_batch(4))],
        [(0, small_batch(4)), (2, small_batch(4))],
    ):
        model = small_model(dropout=0.1)
        optimizer = make_optimizer(model, config.optim)
        average = WeightAverage(model, 0.9)
        stepper = Stepper(
            MaskTask(model), optimizer, config, ALONE, micro_batch=2, total_steps=9, average=average
        )
        results = [stepper.step(stepper.prepare(batch), step) for step, batch in batches]
        told.append([*results, stepper.settle()])
        ends.append(
            _weights(model)
            | moments(model, optimizer)
            | {f"{n}/mean": t for n, t in average.tensors().items()}
        )
    assert told[0][0] is None
    assert [(r.step, r.skip is None) for r in told[0][1:]] == [(0, True), (1, False), (2, True)]
    assert told[0][3].sums.equal(told[1][2].sums)
    assert ends[0].keys() == ends[1].keys()
    assert all(t.equal(ends[1][name]) for name, t in ends[0].items())
    assert ends[0]["decoder.fc.0.weight/step"] == 2


def test_a_loss_that_is_infinite_is_left_out_though_its_gradient_is_not(monkeypatch):
    losses = MaskTask.losses

    def huge(self, batch, out):
        found = losses(self, batch, out)
        return found | {"masked_mse": found["masked_mse"] + float("inf")}

    monkeypatch.setattr(MaskTask, "losses", huge)
    model = small_model()
    before = _weights(model)
    result = take(_stepper(model, small_config("optim.lr=0.1"), 2), small_batch(4), 3)
    assert result.skip is not None and result.skip.why == "the loss is not finite"
    torch.testing.assert_close(_weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_says_what_to_turn(monkeypatch, error):
    def full(self, batch, step):
        raise error

    monkeypatch.setattr(MaskTask, "forward", full)
    with pytest.raises(ScshardsError, match="a forward pass of 6 cells of up to 40 tokens") as e:
        take(_stepper(small_model(), small_config(), 6), small_batch(12), 0)
    assert "run.micro_batch=3, a smaller data.max_length" in str(e.value)
    assert "fsdp2" not in str(e.value)
    monkeypatch.setattr(error, "args", ("something else",))
    if not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(RuntimeError, match="something else"):
            take(_stepper(small_model(), small_config(), 6), small_batch(12), 0)


def test_dropout_is_a_function_of_seed_and_step():
    def sums(step, seed=0):
        torch.rand(step + 3)  # whatever was drawn before must not matter
        stepper = _stepper(small_model(dropout=0.3), small_config(f"run.seed={seed}"), 2)
        return take(stepper, small_batch(4), step).sums.tolist()

    assert sums(3) == sums(3)
    assert sums(3) != sums(4)
    assert sums(3) != sums(3, seed=1)


def test_two_ranks_take_the_step_of_one(tmp_path, two_ranks):
    step_worker.main(str(tmp_path / "1.pt"))
    two_ranks.run("step_worker:main", str(tmp_path / "2.pt"))
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    # Alone, autocast's copies are kept; shards are gathered in bf16, and let go of.
    (alone_kept, size), (shards_kept, _) = one.pop("kept"), two.pop("kept")
    assert alone_kept >= size and shards_kept == 0
    # One rank's loss was not finite: no rank took the step, and only that rank's cells are named.
    cells = [f"000007-{i:010d}" for i in range(8)]
    assert (one.pop("spoilt"), two.pop("spoilt")) == (cells, cells[1::2])
    assert set(one) == {"mask", "generate", "annotate", "integrate"}
    for name, alone in one.items():
        both = two[name]
        assert alone["counts"] == both["counts"]
        if name != "annotate":
            assert both["shares"][0] != both["shares"][1], "the ranks must hold different numbers"
        assert alone["sums"] == pytest.approx(both["sums"], rel=1e-6), name
        assert alone["grad_norm"] == pytest.approx(both["grad_norm"], rel=1e-5)
        torch.testing.assert_close(both["weights"], alone["weights"], rtol=0, atol=1e-6)

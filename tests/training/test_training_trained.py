"""Frozen parts, rates by layer and adapters: what a step changes, and what a run keeps of it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from train_support import read_tensors, small_batch, small_config, small_model, take

from scshards.base.errors import ConfigError
from scshards.model.adapters import scales
from scshards.model.scgpt import load_model
from scshards.ranks.ranks import Ranks
from scshards.tasks.pretrain import MaskTask
from scshards.training.config import OptimSettings, TrainConfig
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.optim import make_optimizer, moments, update
from scshards.training.parallel import unsharded
from scshards.training.save.checkpoint import Checkpoints, TrainState
from scshards.training.step import Stepper
from scshards.training.trained import choose_trained, keeps

ALONE = Ranks(0, 1, torch.device("cpu"))
TRUNK = ("encoder", "value_encoder", "transformer_encoder")
FROZEN = 'optim.freeze=["encoder", "value_encoder", "transformer_encoder.layers.0"]'
ANNOTATE = ("task.name=annotate", "task.label=kind", "model.mvc=false")
LORA = ("optim.lora_rank=2", "optim.lora_alpha=8.0", "optim.lora_feed_forward=true")


@pytest.fixture(scope="module")
def start(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("start") / "run"
    train(shards, run, small_config("run.steps=5", "run.save_every=99"), shown=False)
    return run


def _tensors(run: Path, kind: str = "model", step: int = 20) -> dict[str, torch.Tensor]:
    return read_tensors(run / "checkpoints" / f"step-{step:08d}", kind)


def _resumed(run: Path, shards: str, config: TrainConfig, to: Path) -> Path:
    """A copy of a run of 20 steps that goes on from its 10th."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-00000020")
    assert train(shards, to, config, shown=False).start == 10
    return to


@pytest.mark.parametrize("task", [ANNOTATE, ()])
def test_frozen_parts_keep_their_bits_and_have_nothing_of_an_optimizer(
    shards, start, tmp_path, task, capfd
):
    settings = (f"task.start={start}", FROZEN, "optim.ema=0.9", "run.micro_batch=8", *task)
    config = small_config(*settings)
    summary = train(shards, tmp_path / "run", config)
    before, after = load_model(str(start)).model.state_dict(), _tensors(tmp_path / "run")
    frozen = ("encoder.", "value_encoder.", "transformer_encoder.layers.0.")
    kept = {n for n in after if n.startswith(frozen)}
    assert len(kept) > 10 and all(after[n].equal(before[n]) for n in kept)
    trained = ("transformer_encoder.layers.1.", *(["cls_decoder."] if task else ["decoder."]))
    moved = {n for n in after if n.startswith(trained)}
    assert moved and not any(n in before and after[n].equal(before[n]) for n in moved)
    # No moments, no average; the optimizer's parameters are those that are said to be trained.
    optimizer, average = (_tensors(tmp_path / "run", kind) for kind in ("optimizer", "average"))
    names = {n.rpartition("/")[0] for n in optimizer}
    assert names == set(average) and not names & kept and names >= moved
    assert summary.trained == sum(after[n].numel() for n in names) < summary.parameters
    assert f"({summary.trained:,} of them trained)" in capfd.readouterr().err

    again = _resumed(tmp_path / "run", shards, config, tmp_path / "again")
    for kind in ("model", "optimizer", "average"):
        theirs = _tensors(tmp_path / "run", kind)
        assert theirs and all(t.equal(theirs[n]) for n, t in _tensors(again, kind).items())


def test_frozen_parts_are_out_of_the_norm_and_the_update():
    batch = small_batch(6)
    whole, part = small_model(), small_model()
    choose_trained(part, OptimSettings(freeze=("encoder", "mvc_decoder.W")), seed=0)
    config = small_config("optim.clip=1e9")
    norms = []
    for model in (whole, part):
        optimizer = make_optimizer(model, OptimSettings(weight_decay=0.5))
        stepper = Stepper(MaskTask(model), optimizer, config, ALONE, micro_batch=6, total_steps=9)
        norms.append(take(stepper, batch, 3).grad_norm)
    reference = small_model()
    out = reference(batch)
    masked = batch.is_masked
    losses = [
        (p - batch.targets)[masked].square().mean() for p in (out.predictions, out.mvc_predictions)
    ]
    sum(losses).backward()
    squares = {n: float(p.grad.double().square().sum()) for n, p in reference.named_parameters()}
    frozen = [n for n in squares if n.startswith("encoder.") or n == "mvc_decoder.W.weight"]
    assert len(frozen) == 4
    assert norms[0] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)
    left = sum(s for n, s in squares.items() if n not in frozen) ** 0.5
    assert norms[1] == pytest.approx(left, rel=1e-5) and norms[1] < 0.99 * norms[0]
    for name, p in part.named_parameters():
        assert p.equal(dict(small_model().named_parameters())[name]) == (name in frozen)


def test_what_is_frozen_as_a_whole_computes_as_in_an_evaluation():
    """Of two steps with other dropout the sums are the same, but for what is trained."""
    batch = small_batch(6)
    for freeze, same in ((TRUNK, True), (TRUNK[:1], False), (TRUNK[:2], False)):
        model = small_model(dropout=0.4)
        choose_trained(model, OptimSettings(freeze=freeze), seed=0)
        optimizer = make_optimizer(model, OptimSettings())
        config = small_config("optim.lr=1e-30")
        stepper = Stepper(MaskTask(model), optimizer, config, ALONE, micro_batch=6, total_steps=9)
        first, second = take(stepper, batch, 3), take(stepper, batch, 4)
        assert first.sums.equal(second.sums) == same, freeze


def test_names_that_no_part_has_are_refused(shards, tmp_path):
    for freeze, said in (
        ('["layers"]', "no part 'layers'"),
        ('["encode"]', "no part 'encode'"),
        ('["encoder", "encoder"]', "names a part twice"),
        ('["encoder","value_encoder","transformer_encoder","decoder","mvc_decoder"]', "nothing of"),
    ):
        with pytest.raises(ConfigError, match=said) as e:
            config = small_config(f"optim.freeze={freeze}")
            train(shards, tmp_path / "run", config, shown=False)
        assert e.value.where == "optim.freeze"
        if "no part" in said:
            assert "encoder, value_encoder, transformer_encoder.layers.0, " in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_alpha": 4.0}, "needs optim.lora_rank"),
        ({"lora_feed_forward": True}, "needs optim.lora_rank"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha: must be above 0"),
        ({"lora_rank": -1}, "at least 0"),
        ({"layer_decay": 0.0}, "above 0"),
        ({"layer_decay": 1.1}, "at most 1"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        OptimSettings(**settings)


def test_adapters_need_weights_to_stand_beside_and_layers_to_be_in(shards, start, tmp_path):
    with pytest.raises(ConfigError, match=r"give task\.start"):
        small_config(*LORA)
    for more, said in (
        ('optim.freeze=["transformer_encoder"]', "leaves no layer"),
        ("optim.lora_rank=17", "larger than the weights"),
    ):
        config = small_config(f"task.start={start}", *LORA, more)
        with pytest.raises(ConfigError, match=said):
            train(shards, tmp_path / "run", config, shown=False)


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({}, False),
        ({"lora_rank": 2}, True),
        ({"freeze": ("encoder",)}, True),
        ({"freeze": ("encoder.embedding",)}, True),
        ({"freeze": ("encoder.enc_norm", "transformer_encoder")}, False),
    ],
)
def test_tokens_that_stay_as_they_were_drawn_are_told_of(settings, stay):
    assert keeps(OptimSettings(**settings), "encoder.embedding.weight") == stay


def test_rates_fall_from_the_heads_down_as_in_beit():
    """Adam's first step is the rate times the gradient's sign: against a table by hand, of 2 layers."""
    model = small_model(generate=True)
    by_hand = {
        "encoder": 0.125,
        "value_encoder": 0.125,
        "flag_encoder": 0.125,
        "transformer_encoder.layers.0": 0.25,
        "transformer_encoder.layers.1": 0.5,
        "decoder": 1.0,
        "mvc_decoder": 1.0,
    }
    optimizer = make_optimizer(model, OptimSettings(layer_decay=0.5, eps=1e-30, weight_decay=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.where(torch.arange(p.numel()).view_as(p) % 2 == 0, 1.0, -3.0)
    update(optimizer, 1e-2, torch.tensor(True))
    seen = set()
    for name, p in model.named_parameters():
        part = next(n for n in by_hand if name.startswith(f"{n}."))
        seen.add(part)
        rate, old = 1e-2 * by_hand[part], before[name]
        signs = torch.where(torch.arange(p.numel()).view_as(p) % 2 == 0, 1.0, -1.0)
        shrinks = p.ndim > 1 and name != "encoder.embedding.weight" and part != "flag_encoder"
        expected = old * (1 - 0.1 * rate * shrinks) - rate * signs
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)
    assert seen == by_hand.keys()


def test_a_decay_of_one_changes_no_bit_and_another_one_resumes_to_the_bit(shards, tmp_path):
    for name, decay in (("plain", ()), ("one", ("optim.layer_decay=1.0",))):
        train(shards, tmp_path / name, small_config(*decay), shown=False)
    plain, one = (_tensors(tmp_path / n) for n in ("plain", "one"))
    assert all(t.equal(one[n]) for n, t in plain.items())
    config = small_config("optim.layer_decay=0.6", "model.dropout=0.1")
    train(shards, tmp_path / "run", config, shown=False)
    again = _resumed(tmp_path / "run", shards, config, tmp_path / "again")
    theirs = _tensors(tmp_path / "run")
    assert all(t.equal(theirs[n]) for n, t in _tensors(again).items())
    assert not all(t.equal(theirs[n]) for n, t in plain.items())


@pytest.mark.parametrize("task", [ANNOTATE, ("optim.ema=0.9", "optim.ema_best=true")])
def test_a_run_of_adapters_trains_them_and_writes_the_merged_model(shards, start, tmp_path, task):
    frozen = 'optim.freeze=["transformer_encoder.layers.0"]' if task == ANNOTATE else "run.seed=0"
    settings = (f"task.start={start}", *LORA, *task, frozen)
    config = small_config(*settings, "run.eval_every=20")
    summary = train(shards, tmp_path / "run", config, shown=False)
    before, after = load_model(str(start)).model.state_dict(), _tensors(tmp_path / "run")
    for name, tensor in after.items():
        if name.split(".")[0] in TRUNK and "lora" not in name:
            assert tensor.equal(before[name]), name
    layers = {n.split(".")[2] for n in after if "lora" in n}
    assert layers == ({"1"} if task == ANNOTATE else {"0", "1"})
    optimizer = _tensors(tmp_path / "run", "optimizer")
    trained = {n.rpartition("/")[0] for n in optimizer}
    assert {n for n in trained if n.split(".")[0] in TRUNK} == {n for n in after if "lora" in n}
    assert all(after[n].abs().max() > 0 for n in after if n.endswith("lora_b"))
    assert summary.trained == sum(after[n].numel() for n in trained)

    # What was published is what the run has, merged: the same cells, the same outputs.
    loaded = load_model(str(tmp_path / "run"))
    assert not any("lora" in n for n in loaded.model.state_dict())
    model = load_model(str(tmp_path / "run")).model
    choose_trained(model, config.optim, seed=config.run.seed)
    assert len(scales(model)) == (4 if task == ANNOTATE else 8)
    kind = "average" if config.optim.ema_best else "model"
    model.load_state_dict(after | _tensors(tmp_path / "run", kind))
    batch = small_batch(6)
    expected, found = model.eval()(batch), loaded.model(batch)
    torch.testing.assert_close(found.predictions, expected.predictions, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.cell_embeddings, expected.cell_embeddings, rtol=0, atol=1e-6)
    whole = unsharded(model).state_dict()
    assert all(t.equal(whole[n]) for n, t in loaded.model.state_dict().items())

    again = _resumed(tmp_path / "run", shards, config, tmp_path / "again")
    for kind in ("model", "optimizer"):
        theirs = _tensors(tmp_path / "run", kind)
        assert theirs and all(t.equal(theirs[n]) for n, t in _tensors(again, kind).items())
    best = [torch.load(r / "best_model.pt", weights_only=True) for r in (again, tmp_path / "run")]
    assert all(t.equal(best[1][n]) for n, t in best[0].items())


def test_a_checkpoint_with_moments_of_what_is_not_trained_is_read(tmp_path):
    """Earlier versions kept zeros for the heads that annotate leaves alone."""
    model = small_model()
    optimizer = make_optimizer(model, OptimSettings(ema=0.5))
    tensors = {f"model/{n}": t for n, t in model.state_dict().items()}
    tensors |= {f"optimizer/{n}": t for n, t in moments(model, optimizer).items()}
    with Checkpoints(tmp_path, ALONE, keep_last=1) as checkpoints:
        checkpoints.save(TrainState(step=1), tensors)
    choose_trained(model, OptimSettings(freeze=("decoder",)), seed=0)
    fewer = {n: t for n, t in tensors.items() if not n.startswith("optimizer/decoder.")}
    assert len(fewer) < len(tensors)
    Checkpoints(tmp_path, ALONE, keep_last=1).load("step-00000001", fewer)


SAME = ("model.dropout=0", "optim.eps=1e-2", "run.steps=6", "run.log_every=1", "run.eval_every=6")
"""Adam divides by the root of a mean square: where that is nearly 0, rounding decides unless eps is large."""

INTEGRATE = (
    "task.name=integrate",
    "task.domain=kind",
    "task.domain_norm=false",
    "task.similarity_weight=0",
    "task.metric_cells=0",
)
KINDS = {
    "lora": (*LORA, "optim.layer_decay=0.7", "optim.ema=0.9"),
    "trunk": (f"optim.freeze={json.dumps(TRUNK)}", *ANNOTATE),
    "both": (*LORA, *INTEGRATE, 'optim.freeze=["decoder", "transformer_encoder.layers.0"]'),
}
WAYS = {
    "ddp": ("run.micro_batch=2",),
    "fsdp2": ("run.parallel=fsdp2", "run.activation_checkpointing=true"),
}


@pytest.fixture(scope="module")
def ways(shards, start, tmp_path_factory, two_ranks) -> Path:
    """Each of KINDS alone, and on two ranks in each of WAYS."""
    folder = tmp_path_factory.mktemp("ways")
    for kind, settings in KINDS.items():
        config = small_config(f"task.start={start}", *SAME, *settings)
        train(shards, folder / f"{kind} alone", config, shown=False)
    runs = [
        [str(folder / f"{kind} {way}"), [f"task.start={start}", *SAME, *settings, *more]]
        for kind, settings in KINDS.items()
        for way, more in WAYS.items()
    ]
    assert two_ranks.run("train_worker:runs", shards, runs) == 2 * [len(runs) * [""]]
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_steps_of_one(ways, kind, way):
    mine, one = (read_metrics(ways / f"{kind} {w}" / "metrics.jsonl") for w in (way, "alone"))
    assert [m["step"] for m in mine] == [*range(1, 7), 6]
    for a, b in zip(mine, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) if "loss" in b else True
        if "grad_norm" in b:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    best = [load_model(str(ways / f"{kind} {w}")).model.state_dict() for w in (way, "alone")]
    torch.testing.assert_close(best[0], best[1], rtol=0, atol=1e-6)
    a, b = (_tensors(ways / f"{kind} {w}", "optimizer", 6) for w in (way, "alone"))
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [LORA, (FROZEN,), ("data.tokens_per_batch=700", *LORA)])
def test_compiled_and_packed_steps_are_those_of_padded_ones(
    shards, start, tmp_path, monkeypatch, settings
):
    aot = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", aot)
    torch.compiler.reset()
    padded = [s for s in settings if "tokens_per_batch" not in s]
    for name, given in (("compiled", ("run.compile=true", *settings)), ("plain", padded)):
        config = small_config(
            f"task.start={start}", *SAME, *given, "run.steps=4", "run.eval_every=4"
        )
        train(shards, tmp_path / name, config, shown=False)
    a, b = (_tensors(tmp_path / name, step=4) for name in ("compiled", "plain"))
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

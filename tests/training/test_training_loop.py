from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pack_support import counts, quiet_pack, vocab_of, write
from train_support import read_tensors, small_config

from scshards.base.errors import ConfigError, StateError
from scshards.model.scgpt import load_model
from scshards.packing.pack import append
from scshards.ranks.ranks import Ranks
from scshards.shards.shardset import ShardSet
from scshards.training import heldout, loop
from scshards.training.config import TrainConfig
from scshards.training.data import endless
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.save.checkpoint import complete
from scshards.training.step import Stepper

DROPOUT = "model.dropout=0.1"


def _weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(run / "checkpoints" / f"step-{step:08d}")


def _assert_same_run(a: Path, b: Path, step: int) -> None:
    theirs = _weights(b, step)
    for name, tensor in _weights(a, step).items():
        assert tensor.equal(theirs[name]), name
    timing = ("cells_per_s", "tokens_per_s", "padded_tokens_per_s", "data_wait", "memory_bytes")
    lines = [
        [{k: v for k, v in m.items() if k not in timing} for m in read_metrics(r / "metrics.jsonl")]
        for r in (a, b)
    ]
    assert lines[0] == lines[1]
    best = [torch.load(r / "best_model.pt", weights_only=True) for r in (a, b)]
    assert all(best[0][k].equal(best[1][k]) for k in best[0])


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> Path:
    """20 steps with dropout and micro-batches, never stopped; a checkpoint at 10 and at 20."""
    run = tmp_path_factory.mktemp("straight") / "run"
    summary = train(shards, run, small_config(DROPOUT, "run.micro_batch=8"), shown=False)
    assert (summary.start, summary.step, summary.stopped_by) == (0, 20, None)
    return run


def test_a_run_writes_all_that_it_promises(straight, shards):
    names = {p.name for p in straight.iterdir()}
    assert names == {
        "args.json",
        "best_model.pt",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "vocab.json",
    }
    assert complete(straight / "checkpoints") == ["step-00000010", "step-00000020"]
    lines = read_metrics(straight / "metrics.jsonl")
    assert [(m["kind"], m["step"]) for m in lines] == [
        ("train", 5),
        ("train", 10),
        ("valid", 10),
        ("train", 15),
        ("train", 20),
        ("valid", 20),
    ]
    assert lines[3]["masked_mse"] < lines[0]["masked_mse"]
    assert all(m["cells_per_s"] > 0 and 0 <= m["data_wait"] < 1 for m in lines if "lr" in m)
    args = json.loads((straight / "args.json").read_text())
    assert (args["embsize"], args["nlayers"], args["max_seq_len"]) == (16, 2, 40)
    assert args["scshards"]["config"]["optim"]["lr"] == 3e-3
    loaded = load_model(str(straight))
    best = min((m for m in lines if m["kind"] == "valid"), key=lambda m: m["masked_mse"])
    weights = _weights(straight, best["step"])
    assert all(v.equal(weights[k]) for k, v in loaded.model.state_dict().items())
    assert len(loaded.vocab) == 63


def test_ten_steps_and_ten_more_are_twenty(straight, shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "step-00000020")  # as if killed after step 10
    (run / "best_model.pt").unlink()
    shutil.copy(straight / "best_model.pt", run)
    summary = train(shards, run, small_config(DROPOUT, "run.micro_batch=8"), shown=False)
    assert (summary.start, summary.step) == (10, 20)
    _assert_same_run(run, straight, 20)


def test_saving_changes_nothing(straight, shards, tmp_path):
    config = small_config(DROPOUT, "run.micro_batch=8", "run.save_every=1000")
    train(shards, tmp_path / "run", config, shown=False)
    _assert_same_run(tmp_path / "run", straight, 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(straight, shards, tmp_path, monkeypatch, number):
    run, config = tmp_path / "run", small_config(DROPOUT, "run.micro_batch=8")
    take = Stepper.step

    def signalled(self, share, step):
        if step == 14:
            os.kill(os.getpid(), number)  # arrives while step 15 is being taken
        return take(self, share, step)

    monkeypatch.setattr(Stepper, "step", signalled)
    summary = train(shards, run, config, shown=False)
    assert summary.stopped_by == number.name
    assert summary.step in (15, 16), "after the step in progress, or the next"
    assert complete(run / "checkpoints")[-1] == f"step-{summary.step:08d}"
    assert "the same command goes on" in summary.text()
    marker = json.loads((run / "STOPPED").read_text())
    assert marker == {"signal": number.name, "step": summary.step}
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)

    monkeypatch.undo()
    again = train(shards, run, config, shown=False)
    assert (again.start, again.step, again.stopped_by) == (summary.step, 20, None)
    assert not (run / "STOPPED").exists()
    theirs = _weights(straight, 20)
    assert all(v.equal(theirs[k]) for k, v in _weights(run, 20).items())


def test_a_stop_on_a_set_that_grew_meanwhile_says_what_to_do(tmp_path, monkeypatch):
    files = [write(tmp_path / f"{i}.h5ad", counts(200, 40, seed=i)) for i in range(2)]
    root, run = tmp_path / "set", tmp_path / "run"
    quiet_pack(files[:1], root, vocab_of(40), cells_per_shard=50)
    take, config = Stepper.step, small_config()
    then = []

    def signalled(self, share, step):
        if step == 4:
            for do in then:
                do()
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, share, step)

    monkeypatch.setattr(Stepper, "step", signalled)
    then[:] = [lambda: append(files[1:], str(root), {"workers": 1}, progress=False)]
    said = train(str(root), run, config, shown=False).text()
    assert "saved; the same command does not go on from there: cells were added" in said
    assert f"scshards reshard {root} -o NEW --where " in said
    assert f"scshards train NEW -o {run}, or" in said and f"--start {run}" in said
    with pytest.raises(StateError, match="cells were added"):
        train(str(root), run, config, shown=False)

    then[:] = [lambda: (root / "manifest.json").rename(tmp_path / "manifest.json")]
    said = train(str(root), tmp_path / "other", config, shown=False).text()
    assert "does not go on from there: the shard set can't be opened now" in said


def test_a_stop_during_an_evaluation_is_made_up_for(straight, shards, tmp_path, monkeypatch):
    run, config = tmp_path / "run", small_config(DROPOUT, "run.micro_batch=8")

    def stopped(model, loader, ranks, *, should_stop):
        if not calls:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return assess(model, loader, ranks, should_stop=should_stop)

    calls, assess = [], heldout.validate
    monkeypatch.setattr(heldout, "validate", stopped)
    summary = train(shards, run, config, shown=False)
    assert (summary.step, summary.stopped_by, summary.best_step) == (10, "SIGTERM", None)
    again = train(shards, run, config, shown=False)
    assert (again.start, again.step) == (10, 20)
    _assert_same_run(run, straight, 20)


def test_the_callers_random_state_is_left_alone(shards, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(shards, tmp_path / "run", small_config(DROPOUT, "run.steps=2"), shown=False)
    assert torch.rand(3).equal(expected)


def test_a_finished_run_has_nothing_left_to_do(straight, shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = (run / "metrics.jsonl").read_bytes()
    config = small_config(DROPOUT, "run.micro_batch=8")
    summary = train(shards, run, config, shown=False)
    assert (summary.start, summary.step) == (20, 20)
    assert "nothing was left to do" in summary.text()
    assert (run / "metrics.jsonl").read_bytes() == before


def test_more_steps_go_on_and_the_schedule_stretches(straight, shards, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config = small_config(DROPOUT, "run.micro_batch=8", "run.steps=25")
    assert train(shards, run, config).step == 25
    said = capsys.readouterr().err
    assert "run.steps was 20, is 25" in said
    parameters = sum(t.numel() for t in load_model(str(run)).model.parameters())
    manifest = ShardSet(shards).manifest
    cells = [manifest.cells(split) for split in ("train", "valid")]
    told = said[said.index("model: ") :].splitlines()[:3]
    assert told == [
        f"model:      {parameters:,} parameters, fp32, 1 rank on cpu",
        f"cells:      {cells[0]:,} train, {cells[1]:,} valid; at most 40 tokens of each",
        f"steps:      25 of 16 cells, {25 / (cells[0] // 16):.3g} epochs; on from step 20",
    ]
    rates = {m["step"]: m["lr"] for m in read_metrics(run / "metrics.jsonl") if "lr" in m}
    assert rates[25] < rates[15]


def test_another_config_is_refused_and_nothing_is_touched(straight, shards):
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*")}
    with pytest.raises(ConfigError, match=r"model\.dropout is 0\.1 there, 0\.2 now"):
        train(shards, straight, small_config("run.micro_batch=8"), shown=False)
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*")} == before


def test_what_can_not_be_trained_leaves_no_folder(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="fewer than one global batch"):
        train(shards, run, small_config("run.batch_size=4096"), shown=False)
    with pytest.raises(ConfigError, match="longer than the run"):
        train(shards, run, small_config("optim.warmup_steps=21"), shown=False)
    with pytest.raises(ConfigError, match="no such device"):
        train(shards, run, small_config("run.device=abacus"), shown=False)
    with pytest.raises(ConfigError, match="this machine has 0"):
        train(shards, run, small_config("run.device=cuda"), shown=False)
    with pytest.raises(ConfigError, match="multiple of 7"):
        train(shards, run, small_config("run.micro_batch=7"), shown=False)
    assert not run.exists()


def test_ranks_that_found_other_cells_do_not_begin(shards, tmp_path, monkeypatch):
    """One rank alone found an index bad and went without its shard: their batches would not match."""
    monkeypatch.setattr(Ranks, "gather", lambda self, thing: [thing, f"another {thing}"])
    with pytest.raises(StateError, match="other cells than each other"):
        train(shards, tmp_path / "run", small_config())


def test_bf16_and_no_mvc_train_too(shards, tmp_path):
    config = small_config("run.precision=bf16", "model.mvc=false", "run.steps=10")
    summary = train(shards, tmp_path / "run", config, shown=False)
    assert summary.precision == "bf16"
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not any("mvc_mse" in m for m in lines)
    assert lines[0]["loss"] == lines[0]["masked_mse"] > 0
    weights = _weights(tmp_path / "run", 10)
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_counts_without_bins_train_too(shards, tmp_path):
    train(shards, tmp_path / "run", small_config("data.n_bins=0", "run.steps=2"), shown=False)
    args = load_model(str(tmp_path / "run")).args
    assert (args["n_bins"], args["input_style"]) == (0, "normed_raw")


def _refuse_nothing(*args, **kwargs):
    raise AssertionError("a checkpoint should have been found")


def test_a_run_whose_folder_was_lost_goes_on_from_the_store(shards, tmp_path, s3, monkeypatch):
    settings = [DROPOUT, "optim.ema=0.9", "run.eval_every=7"]
    train(shards, tmp_path / "straight", small_config(*settings), shown=False)
    config = small_config(*settings, f"run.checkpoints={s3.url}/run")
    take = Stepper.step

    def signalled(self, share, step):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, share, step)

    with monkeypatch.context() as m:
        m.setattr(Stepper, "step", signalled)
        stopped = train(shards, tmp_path / "a", config, shown=False)
    assert complete(f"{s3.url}/run")[-1] == f"step-{stopped.step:08d}"
    assert not (tmp_path / "a" / "checkpoints").exists()
    monkeypatch.setattr(type(config), "check_lanes", _refuse_nothing)
    again = train(shards, tmp_path / "b", config, shown=False)
    assert (again.start, again.step, again.best_step in (14, 20)) == (stopped.step, 20, True)
    for kind in ("model", "optimizer", "average"):
        mine = read_tensors(f"{s3.url}/run/step-00000020", kind)
        theirs = read_tensors(tmp_path / "straight" / "checkpoints" / "step-00000020", kind)
        assert mine.keys() == theirs.keys()
        assert all(t.equal(theirs[name]) for name, t in mine.items())
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.003 there"):
        other = small_config(*settings, f"run.checkpoints={s3.url}/run", "optim.lr=1e-4")
        train(shards, tmp_path / "c", other, shown=False)


def test_the_average_is_what_is_evaluated_and_published(shards, tmp_path):
    settings = ["model.dropout=0", "optim.ema=0.8", "optim.ema_best=true"]
    train(shards, tmp_path / "run", small_config(*settings), shown=False)
    lines = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "valid"]
    best = min(lines, key=lambda m: m["masked_mse"])["step"]
    folder = tmp_path / "run" / "checkpoints" / f"step-{best:08d}"
    published = load_model(str(tmp_path / "run")).model.state_dict()
    average, model = (read_tensors(folder, kind) for kind in ("average", "model"))
    assert all(t.equal(average[name]) for name, t in published.items())
    assert not any(t.equal(model[name]) for name, t in published.items())
    # Training itself does not know of it.
    train(shards, tmp_path / "plain", small_config("model.dropout=0"), shown=False)
    assert all(t.equal(model[n]) for n, t in _weights(tmp_path / "plain", best).items())


def test_bad_steps_are_skipped_told_and_counted(shards, tmp_path, monkeypatch):
    def spoilt(loader):
        for step, batch in enumerate(endless(loader)):
            if step in (3, 7, 8):
                batch.targets[0, 1:].fill_(float("nan"))
                batch.is_masked[0, 1] = True
                bad.append(batch.cell_keys)
            yield batch

    bad: list[list[str]] = []
    monkeypatch.setattr(loop, "endless", spoilt)
    run = tmp_path / "run"
    config = small_config("model.dropout=0", "optim.max_skipped=2")
    assert train(shards, run, config, shown=False).step == 20
    lines = read_metrics(run / "metrics.jsonl")
    told = [m for m in lines if m["kind"] == "skipped"]
    assert [m["step"] for m in told] == [4, 8, 9]
    assert [m["cells"] for m in told] == bad
    assert all(m["loss"] > 0 for m in lines if m["kind"] == "train")
    state = json.loads((run / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert (state["skipped"], state["skipped_in_a_row"]) == (3, 0)


def test_deterministic_algorithms_are_asked_for_and_given_back(shards, tmp_path, monkeypatch):
    seen = []
    take = Stepper.step

    def watched(self, share, step):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return take(self, share, step)

    monkeypatch.setattr(Stepper, "step", watched)
    for flag in ("true", "false"):
        config = small_config(f"run.deterministic={flag}", "run.steps=1")
        train(shards, tmp_path / flag, config, shown=False)
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_lanes_that_ranks_can_not_share_are_refused():
    with pytest.raises(ConfigError, match="64 lanes can't be dealt equally to 3 ranks") as e:
        TrainConfig().check_lanes(3)
    assert "data.lanes=63 or 66 fits" in str(e.value)
    for ranks in (1, 2, 64):
        TrainConfig().check_lanes(ranks)


@pytest.mark.slow
def test_compiled_layers_give_the_same_run(shards, tmp_path):
    settings = ("model.dropout=0", "model.n_layers=1", "run.steps=10", "run.log_every=1")
    lines = {}
    for flag in ("true", "false"):
        config = small_config(*settings, f"run.compile={flag}")
        train(shards, tmp_path / flag, config, shown=False)
        lines[flag] = read_metrics(tmp_path / flag / "metrics.jsonl")
    for a, b in zip(lines["true"], lines["false"], strict=True):
        assert a["masked_mse"] == pytest.approx(b["masked_mse"], rel=1e-5)
    widths = [m["padded_tokens_per_s"] / m["cells_per_s"] for m in lines["true"] if "lr" in m]
    assert widths == pytest.approx([40] * 10), "all batches have one width"
    assert not any("_orig_mod" in name for name in _weights(tmp_path / "true", 10))


def test_steps_that_are_asked_for_are_profiled(shards, tmp_path):
    for name, steps in (("whole", "[2, 3]"), ("cut", "[4, 9]"), ("never", "[7, 9]")):
        config = small_config("run.steps=5", f"run.profile={steps}")
        train(shards, tmp_path / name, config, shown=False)
    assert not (tmp_path / "never" / "profile").exists()
    for name, file, n in (("whole", "steps-2-3.json", 2), ("cut", "steps-4-9.json", 2)):
        assert [p.name for p in (tmp_path / name / "profile").iterdir()] == [file]
        events = json.loads((tmp_path / name / "profile" / file).read_text())["traceEvents"]
        updates = [e for e in events if e["name"].startswith("Optimizer.step#")]
        assert len(updates) == n
    for steps in ("[3, 2]", "[0, 2]"):
        with pytest.raises(ConfigError, match="the first at least 1 and not above the second"):
            small_config(f"run.profile={steps}")

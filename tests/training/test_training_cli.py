"""The commands as a user starts them: their own processes, exit codes, standard output and error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_support import SMALL

from scshards.cli import main
from scshards.training.log.metrics import read_metrics
from scshards.training.save.checkpoint import complete

ALONE = ["-m", "scshards"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scshards"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _train(shards, run, *settings) -> list[str]:
    sets = [x for s in (*SMALL, *settings) for x in ("--set", s)]
    return ["train", shards, "-o", str(run), *sets]


def _call(*words) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT
    )


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A run of one process, without dropout."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = _call(sys.executable, *ALONE, *_train(shards, folder, "model.dropout=0"), "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["step"], summary["ranks"], summary["stopped_by"]) == (20, 1, None)
    return folder


def test_train_evaluate_and_plot(python, run, shards, tmp_path):
    done = _call(python, *ALONE, "evaluate", str(run), shards, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    head, _, model, gene, cell, _, counted, _, verdict = done.stdout.splitlines()
    assert head.split("  ")[0] == "prediction"
    assert [line.split("  ")[0] for line in (model, gene, cell)] == [
        "model",
        "each gene's mean",
        "each cell's mean",
    ]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert f"{evaluation['n_masked']:,} masked values" in counted
    assert verdict.startswith("the model is ")
    assert ("better than" in verdict) == (evaluation["margin"] > 0)

    done = _call(python, *ALONE, "plot", str(run), "-o", str(tmp_path / "run.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_a_users_mistake_is_one_message_without_a_traceback(run, shards, tmp_path, capsys):
    for words, said in (
        (_train(shards, run, "optim.lrr=1"), "did you mean 'lr'"),
        (_train(shards, run), "model.dropout is 0.0 there, 0.2 now"),
        (_train(f"{shards}-not", run, "model.dropout=0"), "no complete shard set"),
        ([*_train(shards, run), "--storage-options", "{"], "not valid JSON"),
        (["evaluate", shards, shards], "not the folder of a run"),
        (["plot", shards, "-o", str(tmp_path / "x.png")], "not the folder of a run"),
    ):
        with pytest.raises(SystemExit) as e:
            main(words)
        out, err = capsys.readouterr()
        assert e.value.code == 1
        assert err.startswith("error: ")
        assert said in err
        assert out == ""


def test_two_ranks_go_on_with_what_one_began(run, shards, tmp_path):
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000020")
    done = _call(sys.executable, *TWO, *_train(shards, resumed, "model.dropout=0"), "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # of the first rank only
    assert (summary["start"], summary["step"], summary["ranks"]) == (10, 20, 2)
    one, two = (read_metrics(r / "metrics.jsonl") for r in (run, resumed))
    assert [(m["kind"], m["step"]) for m in one] == [(m["kind"], m["step"]) for m in two]
    for a, b in zip(one, two, strict=True):
        # The same cells and masks: all that differs is the order in which sums are rounded.
        assert b["masked_mse"] == pytest.approx(a["masked_mse"], rel=1e-4)
        assert b["mvc_mse"] == pytest.approx(a["mvc_mse"], rel=1e-4)


def test_a_signal_to_one_rank_saves_and_ends_both_with_exit_code_0(python, shards, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *TWO, *_train(shards, run, "run.steps=100000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"PYTHON_EXEC": python},
    )
    try:
        deadline = time.monotonic() + 600
        while len(read_metrics(run / "metrics.jsonl")) < 2 and process.poll() is None:
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGUSR1)
        out, err = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 0, err
    assert "saved; the same command goes on from there" in out
    (*_, latest) = complete(run / "checkpoints")
    state = json.loads((run / "checkpoints" / latest / "state.json").read_text())
    assert json.loads((run / "STOPPED").read_text())["step"] == state["step"]
    assert 10 <= state["step"] < 100_000
    assert f"after step {state['step']:,}" in out

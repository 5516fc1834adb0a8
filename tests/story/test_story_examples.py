"""Story: the scripts of examples/ run as their headers say, and go on after a crash without losing a cell."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scshards import PackOptions, ShardSet, Vocab
from scshards.packing.pack import pack

EXAMPLES = Path(__file__).parents[2] / "examples"
BATCH = 8
Run = Callable[..., str]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 cells, a fifth of them in the split valid."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 250)
    counts = rng.poisson(rng.gamma(0.5, 6.0, (3, 60))[kind])
    counts[:, :6] += 1
    genes = [f"G{i:02d}" for i in range(60)]
    anndata.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"tissue": [f"t{k}" for k in kind], "donor": [f"d{i % 2}" for i in range(250)]},
            index=[f"c{i}" for i in range(250)],
        ),
        var=pd.DataFrame(index=genes),
    ).write_h5ad(folder / "cells.h5ad")
    options = PackOptions(
        obs=("tissue", "donor"), valid_fraction=0.2, cells_per_shard=40, workers=1
    )
    pack(
        [folder / "cells.h5ad"],
        folder / "shards",
        Vocab.from_genes(genes),
        options,
        progress=False,
    )
    return folder / "shards"


def needs(*libraries: str) -> pytest.MarkDecorator:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"needs {', '.join(missing)}: tools/examples installs it"
    )


@pytest.fixture
def run(python: str) -> Run:
    return functools.partial(_run, python)


def _run(python: str, *command: object, fails: bool = False, **told: object) -> str:
    """What a script said on the CPU, or of its failure; it is told things by the environment."""
    here = {
        "PYTHON_EXEC": python,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [python, "-W", "ignore", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | here | {name: str(value) for name, value in told.items()},
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def torchrun(processes: int) -> list[object]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]


def train_cells(shards: Path) -> int:
    return ShardSet(shards).manifest.cells("train")


def test_torch_dataloader(run: Run, shards: Path) -> None:
    said = run(EXAMPLES / "torch_dataloader.py", shards, "--batch-size", BATCH)
    cells = train_cells(shards)
    steps = cells // BATCH
    assert f"epoch 1: {steps} batches" in said
    assert f"{steps // 2} + {steps - steps // 2} batches" in said
    assert f"{steps * BATCH} cells, none twice" in said
    assert f"genes ({BATCH}, " in said


def test_webdataset_pipeline(run: Run, shards: Path) -> None:
    manifest = ShardSet(shards).manifest
    cells = manifest.cells("train")
    said = run(EXAMPLES / "webdataset_pipeline.py", shards, "--where", "tissue != 't0'")
    found = [int(n) for n in re.findall(r"epoch \d: (\d+) cells", said)]
    assert len(found) == 2 and found[0] == found[1] and 0 < found[0] < cells
    assert f"stock webdataset: {sum(s.tokens for s in manifest.splits['train'])} values" in said
    half = sum(s.cells for s in manifest.splits["train"][::2])
    assert f"every second shard: {half} cells" in said


WATCH = """
import hashlib, json, os, sys
sys.path.insert(0, os.environ["EXAMPLES"])
log = open(os.environ["LOG"] + os.environ.get("LOCAL_RANK", "0"), "a")

def took(at, keys):
    if at == int(os.environ["STOP"]):
        os._exit(9)
    print(json.dumps([at, keys.tolist()]), file=log, flush=True)

def trained(model):
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    print(json.dumps(hashlib.sha256(weights).hexdigest()), file=log, flush=True)
"""

LOOP = """
import loop as example

class Watched(example.CellLoader):
    def __iter__(self):
        for batch in super().__iter__():
            took(self.state_dict()["position"], batch.key)
            yield batch

example.CellLoader = Watched
example.main()
"""

LIGHTNING = """
import lightning_training as example

class Watched(example.MaskedValues):
    def training_step(self, batch, i):
        took(self.global_step, batch.key)
        return super().training_step(batch, i)

    def on_train_end(self):
        trained(self)

example.MaskedValues = Watched
example.main()
"""

TRAINER = """
import hf_trainer as example

class Watched(example.CellTrainer):
    def training_step(self, model, inputs, *others):
        took(self.state.global_step, inputs["key"])
        return super().training_step(model, inputs, *others)

    def train(self, **options):
        done = super().train(**options)
        trained(self.model)
        return done

example.CellTrainer = Watched
example.main()
"""

GENEFORMER = """
import geneformer as example

class Watched(example.RankTrainer):
    def training_step(self, model, inputs, *others):
        took(self.state.global_step, inputs["input_ids"])
        return super().training_step(model, inputs, *others)

    def train(self, **options):
        done = super().train(**options)
        trained(self.model)
        return done

example.RankTrainer = Watched
example.main()
"""


def watched(folder: Path, script: str) -> Path:
    """An example that writes down what each of its processes takes, and stops where it is told to."""
    (folder / "watched.py").write_text(WATCH + script)
    return folder / "watched.py"


def read(folder: Path, name: str) -> list[list[Any]]:
    """What each process of an example wrote down."""
    logs = sorted(folder.glob(f"{name}?"))
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


def test_a_loop_of_ones_own_goes_on_with_other_processes(
    run: Run, shards: Path, tmp_path: Path
) -> None:
    """Two processes that crash, one that ends the epoch, two again."""
    cells, script = train_cells(shards), watched(tmp_path, LOOP)
    options = [shards, "-o", tmp_path / "run", "--batch-size", BATCH, "--save-every", 3]

    def told(name: str, stop: int = -1) -> dict[str, Any]:
        return {"EXAMPLES": EXAMPLES, "LOG": tmp_path / name, "STOP": stop}

    run(*torchrun(2), script, *options, fails=True, **told("a", 12 * BATCH))
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["step"], saved["stream"]["position"]) == (3, 6 * BATCH)
    said = run(*torchrun(1), script, *options, "--epochs", 1, **told("b"))
    steps = 3 + (cells - 6 * BATCH) // BATCH
    assert f"epoch 1, step {steps}: " in said
    first, rest = read(tmp_path, "a"), read(tmp_path, "b")
    assert len(first) == 2 and len(rest) == 1
    kept = [keys for log in first for at, keys in log if at <= 6 * BATCH]
    seen = [k for keys in kept + [keys for _, keys in rest[0]] for k in keys]
    assert len(seen) == len(set(seen)) == cells // BATCH * BATCH
    said = run(*torchrun(2), script, *options, **told("c"))
    assert f"epoch 2, step {steps + cells // (2 * BATCH)}: " in said
    seen = [k for log in read(tmp_path, "c") for _, keys in log for k in keys]
    assert len(seen) == len(set(seen)) == cells // (2 * BATCH) * 2 * BATCH


def assert_one_run(logs: list[list[Any]], resumed_at: int, cells: int, epochs: int) -> None:
    """Steps follow each other over the crash, each epoch has every cell but the dropped ones once, on one
    of the processes, and these end with one model."""
    steps = cells // (BATCH * len(logs))
    kept = []
    for log in logs:
        *lines, _ = log
        crash = next(i for i, (step, _) in enumerate(lines) if i and step <= lines[i - 1][0])
        assert lines[crash][0] == resumed_at < crash and resumed_at % steps
        kept.append(lines[:resumed_at] + lines[crash:])
        assert [step for step, _ in kept[-1]] == list(range(steps * epochs))
    for first in range(0, steps * epochs, steps):
        keys = [k for of_rank in kept for _, taken in of_rank[first : first + steps] for k in taken]
        assert len(set(keys)) == len(keys) == BATCH * steps * len(logs)
    assert len({log[-1] for log in logs}) == 1


PROCESSES = pytest.mark.parametrize("processes", [1, 2])


@needs("pytorch_lightning")
@PROCESSES
def test_lightning_goes_on_in_the_middle_of_an_epoch(
    run: Run, shards: Path, tmp_path: Path, processes: int
) -> None:
    told = {"EXAMPLES": EXAMPLES, "LOG": tmp_path / "log"}
    options = [shards, "-o", tmp_path / "run", "--epochs", 3, "--batch-size", BATCH]
    command = [watched(tmp_path, LIGHTNING), *options, "--devices", processes]
    run(*command, fails=True, **told, STOP=35)
    assert "epoch 3, step " in run(*command, **told, STOP=-1)
    logs = read(tmp_path, "log")
    assert len(logs) == processes
    assert_one_run(logs, 30, train_cells(shards), 3)


@needs("transformers", "accelerate")
@PROCESSES
def test_hugging_face_goes_on_in_the_middle_of_an_epoch(
    run: Run, shards: Path, tmp_path: Path, processes: int
) -> None:
    told = {"EXAMPLES": EXAMPLES, "LOG": tmp_path / "log"}
    steps = train_cells(shards) // (BATCH * processes) * 3
    options = [shards, "-o", tmp_path / "run", "--steps", steps, "--batch-size", BATCH]
    script = watched(tmp_path, TRAINER)
    command = [*(torchrun(processes) if processes > 1 else []), script, *options]
    run(*command, fails=True, **told, STOP=35)
    if processes > 1:
        said = run(script, *options, fails=True, **told, STOP=0)
        assert "checkpoint-30: go on with as many processes" in said
    assert f"step {steps}: " in run(*command, **told, STOP=-1)
    logs = read(tmp_path, "log")
    assert len(logs) == processes
    assert_one_run(logs, 30, train_cells(shards), 3)


@needs("transformers", "accelerate")
@PROCESSES
def test_a_geneformer_that_was_resumed_is_the_one_that_was_not(
    run: Run, shards: Path, tmp_path: Path, processes: int
) -> None:
    """Two runs of an epoch and a half, one of which stops in between: the same losses and weights."""
    medians = tmp_path / "medians.json"
    run("-m", "scshards", "genes", shards, "--medians", "-o", medians)
    script, steps = (
        watched(tmp_path, GENEFORMER),
        train_cells(shards) // (BATCH * processes) * 3 // 2,
    )
    start = [*(torchrun(processes) if processes > 1 else []), script, shards, medians]
    said, losses = {}, {}
    for name, stops in ("whole", [-1]), ("parts", [steps - 3, -1]):
        options = ["-o", tmp_path / name, "--steps", steps, "--batch-size", BATCH]
        told = {"EXAMPLES": EXAMPLES, "LOG": tmp_path / f"{name}-log"}
        for stop in stops:
            said[name] = run(*start, *options, fails=stop > 0, **told, STOP=stop)
        state = json.loads((tmp_path / name / f"checkpoint-{steps}/trainer_state.json").read_text())
        losses[name] = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert f"step {steps}: " in said["whole"]
    last = re.compile(rf"step {steps}: .*")
    assert last.findall(said["whole"]) == last.findall(said["parts"])
    assert len(losses["whole"]) == steps and losses["parts"] == losses["whole"]
    assert np.mean(losses["whole"][-5:]) < np.mean(losses["whole"][:5]) - 0.05
    for whole, parts in zip(read(tmp_path, "whole-log"), read(tmp_path, "parts-log"), strict=True):
        resumed_at = (steps - 3) // 10 * 10
        assert parts[steps - 3][0] == resumed_at
        assert parts[:resumed_at] + parts[steps - 3 :] == whole


def test_a_script_in_the_manner_of_scgpts_learns_in_memory_and_from_the_stream(
    run: Run, shards: Path
) -> None:
    cells = shards.parent / "cells.h5ad"
    said = run(EXAMPLES / "scgpt_script.py", cells, shards, "--celltype", "tissue", "--epochs", 4)
    losses = [float(line.rpartition(" ")[2]) for line in said.splitlines()]
    assert len(losses) == 8
    assert losses[3] < losses[0] and losses[7] < losses[4], losses


def test_a_perturbation_model_predicts_pairs_that_it_never_saw(run: Run, tmp_path: Path) -> None:
    said = run(EXAMPLES / "perturbation.py", "-o", tmp_path / "run", "--epochs", 8)
    assert "108 pairs to train on, 540 sets; 12 held out" in said
    found = {
        name: (float(r), float(error))
        for name, r, error in re.findall(r"^(m\D+): ([-.\d]+), ([.\d]+)$", said, re.MULTILINE)
    }
    model, baseline = found["model"], found["mean of the line's training perturbations"]
    assert model[0] > 0.6 > 0.3 > baseline[0], said
    assert model[1] < 0.6 * baseline[1], said


@needs("scvi", "skmisc")
def test_scvi_ends_where_it_ends_from_memory(run: Run, shards: Path) -> None:
    options = ["--batch", "donor", "--top", 50, "--epochs", 12, "--batch-size", 32, "--beside"]
    said = run(EXAMPLES / "scvi_model.py", shards, *options)
    losses = [float(x) for x in re.findall(r"held-out loss ([0-9.]+)", said)]
    valid = ShardSet(shards).manifest.cells("valid")
    assert f"latent space of the held-out cells: {valid} x 10" in said
    # Two trainings by other draws: the same loss, but for chance.
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=0.05)

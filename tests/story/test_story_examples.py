"""Story: the scripts of examples/ run as their headers say, and go on after a crash without losing a cell."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
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
        obs=pd.DataFrame({"tissue": [f"t{k}" for k in kind]}, index=[f"c{i}" for i in range(250)]),
        var=pd.DataFrame(index=genes),
    ).write_h5ad(folder / "cells.h5ad")
    options = PackOptions(obs=("tissue",), valid_fraction=0.2, cells_per_shard=40, workers=1)
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


def run(*command: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout


def train_cells(shards: Path) -> int:
    return ShardSet(shards).manifest.cells("train")


def test_torch_dataloader(shards: Path) -> None:
    said = run(EXAMPLES / "torch_dataloader.py", shards, "--batch-size", BATCH)
    cells = train_cells(shards)
    steps = cells // BATCH
    assert f"epoch 1: {steps} batches" in said
    assert f"{steps // 2} + {steps - steps // 2} batches" in said
    assert f"{steps * BATCH} cells, none twice" in said
    assert f"genes ({BATCH}, " in said


def test_webdataset_pipeline(shards: Path) -> None:
    manifest = ShardSet(shards).manifest
    cells = manifest.cells("train")
    said = run(EXAMPLES / "webdataset_pipeline.py", shards, "--where", "tissue != 't0'")
    found = [int(n) for n in re.findall(r"epoch \d: (\d+) cells", said)]
    assert len(found) == 2 and found[0] == found[1] and 0 < found[0] < cells
    assert f"stock webdataset: {sum(s.tokens for s in manifest.splits['train'])} values" in said
    half = sum(s.cells for s in manifest.splits["train"][::2])
    assert f"every second shard: {half} cells" in said


LOOP = """
import json, os, sys
sys.path.insert(0, sys.argv.pop(1))
log, stop = sys.argv.pop(1) + os.environ.get("RANK", "0"), int(sys.argv.pop(1))
import loop as example

class Watched(example.CellLoader):
    def __iter__(self):
        for step, batch in enumerate(super().__iter__(), 1):
            if step == stop:
                os._exit(9)
            state = self.state_dict()
            with open(log, "a") as file:
                print(json.dumps([self.epoch, state["position"], batch.key.tolist()]), file=file)
            yield batch

example.CellLoader = Watched
example.main()
"""


def test_a_loop_of_ones_own_goes_on_with_other_processes(shards: Path, tmp_path: Path) -> None:
    """Two processes that crash, one that ends the epoch, two again."""
    cells = train_cells(shards)
    (tmp_path / "loop.py").write_text(LOOP)
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    options = [shards, "-o", tmp_path / "run", "--batch-size", BATCH, "--save-every", 3]

    def log(name: str) -> list[list[Any]]:
        lines = [f.read_text().splitlines() for f in sorted(tmp_path.glob(f"{name}?"))]
        return [json.loads(line) for of_rank in lines for line in of_rank]

    def script(name: str, stop: int) -> list[Any]:
        return [tmp_path / "loop.py", EXAMPLES, tmp_path / name, stop]

    run(*many, *script("a", 6), *options, code=1)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["step"], saved["stream"]["position"]) == (3, 6 * BATCH)
    said = run(*script("b", -1), *options, "--epochs", 1)
    steps = 3 + (cells - 6 * BATCH) // BATCH
    assert f"epoch 1, step {steps}: " in said
    kept = [keys for _, at, keys in log("a") if at <= 6 * BATCH] + [k for *_, k in log("b")]
    seen = [k for keys in kept for k in keys]
    assert len(seen) == len(set(seen)) == cells // BATCH * BATCH
    said = run(*many, *script("c", -1), *options)
    assert f"epoch 2, step {steps + cells // (2 * BATCH)}: " in said
    seen = [k for *_, keys in log("c") for k in keys]
    assert len(seen) == len(set(seen)) == cells // (2 * BATCH) * 2 * BATCH


CRASH = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
log, stop = open(sys.argv.pop(1), "a"), int(sys.argv.pop(1))

def took(step, keys):
    if step == stop:
        sys.exit(9)
    print(json.dumps([step, keys.tolist()]), file=log, flush=True)
"""

LIGHTNING = (
    CRASH
    + """
import lightning_training as example

class Watched(example.MaskedValues):
    def training_step(self, batch, i):
        took(self.global_step, batch.key)
        return super().training_step(batch, i)

example.MaskedValues = Watched
example.main()
"""
)

TRAINER = (
    CRASH
    + """
import hf_trainer as example

as_inputs, keys = example.as_inputs, []

def watched(batch):
    keys[:] = [batch.key]
    return as_inputs(batch)

class Watched(example.CellTrainer):
    def training_step(self, *args, **options):
        took(self.state.global_step, keys[0])
        return super().training_step(*args, **options)

example.as_inputs, example.CellTrainer = watched, Watched
example.main()
"""
)


def assert_epochs(log: Path, resumed_at: int, cells: int, epochs: float) -> None:
    """Steps follow each other over the crash, and each epoch has every cell but the dropped ones once."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    crash = next(i for i, (step, _) in enumerate(lines) if i and step <= lines[i - 1][0])
    assert lines[crash][0] == resumed_at < crash
    kept = lines[:resumed_at] + lines[crash:]
    steps = cells // BATCH
    assert [step for step, _ in kept] == list(range(int(steps * epochs)))
    for first in range(0, len(kept), steps):
        keys = [k for _, of_step in kept[first : first + steps] for k in of_step]
        assert len(set(keys)) == len(keys) == BATCH * min(steps, len(kept) - first)


@needs("pytorch_lightning")
def test_lightning_goes_on_in_the_middle_of_an_epoch(shards: Path, tmp_path: Path) -> None:
    command = ["-c", LIGHTNING, EXAMPLES, tmp_path / "log"]
    options = [shards, "-o", tmp_path / "run", "--epochs", 3, "--batch-size", BATCH]
    run(*command, 35, *options, code=9)
    said = run(*command, -1, *options)
    assert "epoch 3, step " in said
    assert_epochs(tmp_path / "log", 30, train_cells(shards), 3)


@needs("transformers", "accelerate")
def test_hugging_face_goes_on_in_the_middle_of_an_epoch(shards: Path, tmp_path: Path) -> None:
    steps = train_cells(shards) // BATCH * 2
    command = ["-c", TRAINER, EXAMPLES, tmp_path / "log"]
    options = [shards, "-o", tmp_path / "run", "--steps", steps, "--batch-size", BATCH]
    run(*command, 35, *options, code=9)
    assert f"step {steps}: " in run(*command, -1, *options)
    assert_epochs(tmp_path / "log", 30, train_cells(shards), 2)

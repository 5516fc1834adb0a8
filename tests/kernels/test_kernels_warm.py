"""`scshards warm`: after it, nothing waits for the compiler, whatever a batch is made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shardsets import make_set

PROGRAM = """
import json, sys
from numba.core import event

compiled = []

class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(str(event.data["dispatcher"]))

    def on_end(self, event):
        pass

event.register("numba:compile", Listener())

import numpy as np
from scshards.shards.members import decode_cell
from scshards.shards.shardset import ShardSet
from scshards.streaming.collate.make import collator_of
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.loader import CellLoader
from scshards.streaming.read.source import CellBytes

counts, floats = sys.argv[1:]
for root in counts, floats:
    loader = CellLoader(root, batch_size=8)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    batches.close()
    loader = CellLoader(root, batch_size=8)
    loader.load_state_dict(state)
    next(iter(loader))

member = np.frombuffer(bytes.fromhex(
    "83a16e02a567656e6573c4020301a676616c756573c403018010".replace("8010", "8001")
), np.uint8)
more = [
    dict(), dict(objective="generate"), dict(objective="none"), dict(exact_mask=True),
    dict(values="counts"), dict(values="log1p", target_sum=10_000), dict(tie_break="random"),
    dict(include_zero_genes=3), dict(n_bins=7), dict(pad_value=-2, mask_value=-1, cls_value=0),
    dict(max_length=np.int32(20), target_sum=np.float32(3), values="counts"),
    dict(mask_ratio=[0.25, 0.5]), dict(objective="generate", pad_to=8), dict(objective="counts"),
    dict(objective="ranks", medians={"g1": 2.0, "g2": 3}), dict(objective="ranks", medians={"g1": 2}, mask_ratio=0),
]
vocab = ShardSet(counts).vocab
assert decode_cell(bytes(member)).values.tolist() == [1, 128]
for asked in more:
    for way in dict(), dict(device_collate=True), dict(tokens_per_batch=60):
        if way.get("tokens_per_batch") and (asked.get("objective") == "generate" or "pad_to" in asked):
            continue
        if way and asked.get("objective") in ("counts", "ranks"):
            continue
        collator = collator_of(CollateOptions(**asked, **way), vocab, "counts", 0)
        for data in member, member.copy():
            read = CellBytes(
                data, np.zeros(2, np.int64), np.array([len(member), 0]), np.array([7, -1]),
                np.zeros((2, 0), np.int64),
            )
            collator.collate(read, 0)
print(json.dumps(compiled))
"""


def run(*arguments: str, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"SCSHARDS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    cache = tmp_path_factory.mktemp("cache")
    return cache, json.loads(run("-m", "scshards", "warm", "--json", cache=cache))


def test_it_says_what_it_compiled_where(warmed: tuple[Path, dict[str, Any]]) -> None:
    cache, said = warmed
    assert "cells.read_cells" in said["compiled"] and "rows.pack_rows" in said["compiled"]
    assert len(said["compiled"]) == said["kernels"] and said["seconds"] > 0
    assert Path(said["folder"]).parent == cache / "kernels" and list(Path(said["folder"]).iterdir())
    again = json.loads(run("-m", "scshards", "warm", "--json", cache=cache))
    assert again["compiled"] == {} and again["kernels"] == said["kernels"]
    assert "already" in run("-m", "scshards", "warm", cache=cache)


def test_nothing_is_compiled_after_it(warmed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for kind in ("counts", "float"):
        make_set(tmp_path / kind, [30, 30], kind=kind)
    found = run("-c", PROGRAM, str(tmp_path / "counts"), str(tmp_path / "float"), cache=warmed[0])
    assert json.loads(found) == []


def test_it_loads_no_torch(warmed: tuple[Path, dict[str, Any]]) -> None:
    program = """
import sys
from scshards.kernels import warm
assert sum(1 for _ in warm.compile_all()) > 28
assert not {"torch", "anndata", "pyarrow"} & set(sys.modules), sys.modules
"""
    run("-c", program, cache=warmed[0])


def test_it_knows_every_kernel_of_a_batch_and_of_pack() -> None:
    """Those that it leaves out are of inputs that few have, and of weights."""
    from scshards.kernels import (
        bits,
        cells,
        counts,
        finish,
        members,
        order,
        ranks,
        rows,
        store,
    )
    from scshards.kernels.cache import _Kept
    from scshards.kernels.warm import TYPES

    listed = {line.split()[0] for line in TYPES.splitlines() if line and line[0] != " "}
    every = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in (bits, cells, counts, finish, members, order, ranks, rows, store)
        for name, kernel in vars(module).items()
        if isinstance(getattr(kernel, "_cache", None), _Kept)
        and kernel.py_func.__module__ == module.__name__
    }
    left_out = {
        "order.count_copies", "rows.count_rows", "rows.deal_to_rows", "store.pack",
    }  # fmt: skip
    assert every - listed == left_out and listed <= every

"""One rank that streams and dies when it is told to: a job for ranks of rank_host.py.

Writes the keys of each batch to OUT/keys-ATTEMPT-RANK.jsonl as it receives it. Like a training run, the
ranks meet in every step, and every few steps the first one saves the state, all of it or nothing.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from torch import distributed

from scshards import CellLoader, CollateOptions, ReadOptions

SAVE_EVERY = 3
BATCHES = {4: 4, 2: 6, 3: 5}
"""Cells in a batch of each rank, by world size."""


def main(root: str, folder: str, attempt: int, killed: int, step: int, point: str) -> None:
    out = Path(folder)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    loader = CellLoader(
        root,
        batch_size=BATCHES[world],
        collate=CollateOptions(max_length=10),
        read=ReadOptions(lanes=8, shuffle_buffer=64),
        epoch=2,
    )
    assert (loader.rank, loader.world_size) == (rank, world)
    state = out / "state.json"
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text())["loader"])
    if rank == 0:
        told = {"steps": loader.batches_left, "dropped": loader.dropped_cells}
        (out / f"told-{attempt}.json").write_text(json.dumps(told))

    def die_at(here: str) -> None:
        if (rank, done, here) == (killed, step, point):
            os.kill(os.getpid(), signal.SIGKILL)

    with (out / f"keys-{attempt}-{rank}.jsonl").open("w") as log:
        for done, batch in enumerate(loader, 1):
            die_at("received")
            print(json.dumps(batch.key.tolist()), file=log, flush=True)
            die_at("logged")
            distributed.all_reduce(torch.ones(1))  # the step of a training run
            if rank == 0 and done % SAVE_EVERY == 0:
                part = out / "state.part"
                saved = {"attempt": attempt, "batches": done, "loader": loader.state_dict()}
                part.write_text(json.dumps(saved))
                die_at("saving")
                part.replace(state)
            die_at("saved")
    distributed.barrier()

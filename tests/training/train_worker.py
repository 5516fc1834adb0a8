"""Runs of `train` on this rank, one after another in one process; started by test_training_ranks.py.

train_worker.py SHARDS '[["RUN", ["setting", ...]], ...]'
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from train_support import small_config

from scshards.training.loop import train


def main(shards: str, runs: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # once for all of them
    for run, settings in json.loads(runs):
        train(shards, run, small_config(*settings), shown=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

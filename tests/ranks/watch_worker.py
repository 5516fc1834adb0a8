"""One of two ranks of which the second fails, or the first is slow: a job for ranks of rank_host.py.

Functions below, one after another; each rank writes down what became of each.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from scshards.base.errors import ConfigError, ScshardsError
from scshards.ranks import watch
from scshards.ranks.ranks import Ranks, ranks

LIMIT = timedelta(seconds=2)
"""How long a wait is that nobody said anything of."""


def slow(here: Ranks) -> None:
    """The first rank works for longer than torch lets a collective wait."""
    here.first(lambda: time.sleep(2 * LIMIT.total_seconds()))
    here.gather("done")


def refused(here: Ranks) -> None:
    """What the first rank can't do is every rank's error."""

    def refuse() -> None:
        raise ConfigError("it can't be", advice="leave it")

    here.first(refuse)


def raises(here: Ranks) -> None:
    """The second rank raises while the first one waits for it, and its process ends."""
    if not here.is_main:
        raise ScshardsError("the disk is full", where="rank 1")
    here.total([1.0])


def stays(here: Ranks) -> None:
    """As before, but the second rank's process goes on: its sockets stay open."""
    raises(here)


def works(here: Ranks) -> None:
    """The second rank raises and stays, while the first one works and does not look at others."""
    if not here.is_main:
        raise ScshardsError("the disk is full", where="rank 1")
    while True:
        time.sleep(0.01)


def killed(here: Ranks, rank: int = 1) -> None:
    """A rank is killed while the other one waits for it."""
    if here.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    here.barrier()


def host_killed(here: Ranks) -> None:
    """As before; it is the one that has the store by which ranks meet."""
    killed(here, 0)


def main(folder: str, *whats: str) -> None:
    watch.LOOK_SECONDS = 0.1
    dist.distributed_c10d.default_pg_timeout = LIMIT  # of every group that is made without one
    for what in whats:
        watch.GRACE_SECONDS = 2.0 if what in ("stays", "works") else 30.0
        with Path(folder, os.environ["RANK"]).open("a") as out:
            try:
                with ranks("cpu") as here:
                    globals()[what](here)
                print("well", file=out)
            except Exception as e:
                print(f"{type(e).__name__}: {e}", file=out)
    if whats[-1] not in ("stays", "works"):
        os._exit(0)

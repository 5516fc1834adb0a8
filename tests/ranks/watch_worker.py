"""One of two ranks of which the second fails, or the first is slow; started by test_ranks_watch.py.

watch_worker.py WHAT...: functions below, one after another. Each rank prints what became of each.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from scshards.base.errors import ConfigError, ScshardsError
from scshards.ranks import watch
from scshards.ranks.ranks import Ranks, ranks

watch.LOOK_SECONDS = 0.1


def slow(here: Ranks) -> None:
    """The first rank works for longer than torch lets a collective wait."""
    here.first(lambda: time.sleep(12))
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
    """As before, but the second rank's process goes on with something else: its sockets stay open."""
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


def main(*whats: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    for what in whats:
        stays_on = what in ("stays", "works")
        watch.GRACE_SECONDS = 2.0 if stays_on else 30.0
        try:
            with ranks("cpu") as here:
                globals()[what](here)
            print("well", flush=True)
        except Exception as e:
            print(f"{type(e).__name__}: {e}", flush=True)
            if stays_on and os.environ["RANK"] == "1":
                time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])

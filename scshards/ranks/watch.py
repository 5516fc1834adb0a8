"""What becomes of all ranks when one fails: they end soon, and its error is said once.

    the rank that fails   leaves its error in the store by which ranks meet, and raises it
    each other one        looks there every second, in a thread, and is interrupted; or its process is
                          ended, as nothing else ends a wait for a GPU

So a wait for another rank needs no end of its own (NO_END): a first rank may copy an atlas for hours.
A rank that is killed leaves no error; gloo then tells the others that it is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from scshards.base.errors import RankError, ScshardsError

NO_END = timedelta(days=365)
"""How long ranks wait for one another: torch wants a number."""

LOOK_SECONDS = 1.0
"""How often a rank looks whether another one has failed."""

GRACE_SECONDS = 10.0
"""How long a rank has to end by itself, and then again when it was interrupted."""

_GONE = (
    *("onnection closed by peer", "onnection reset by peer", "roken pipe", "onnection refused"),
    *("onnection was likely closed", "remote process exited"),
)
"""What gloo, the store and NCCL say of a rank that is gone."""

_FAILED, _SEEN = "failed", "seen"


class Watch:
    """Looks, in a thread, whether another rank has failed, until it is closed.

    Parameters
    ----------
    name
        The same on every rank, and new for every watch.
    others
        How many other ranks look.
    """

    def __init__(self, name: str, others: int) -> None:
        self._store = _meeting(name)
        self._others = others
        self._error: str | None = None
        self._is_over = threading.Event()
        self._is_in_main = threading.current_thread() is threading.main_thread()
        if self._store is not None:
            threading.Thread(target=self._look, name="scshards-watch", daemon=True).start()

    def close(self) -> None:
        """Look no longer."""
        self._is_over.set()

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others that this rank fails by `error`; what is raised here.

        That is `error` itself, unless another rank failed first and this is what came of it.
        """
        self.close()
        lost = is_lost(error)
        # Who raised has told so before it went; who was killed has not.
        other = self._other(LOOK_SECONDS if lost else 0)
        if other is None and lost:
            error = ScshardsError(
                "another rank has ended, and did not say why",
                where=f"rank {os.environ.get('RANK', '?')} waited for it",
                advice="look for what killed it: memory (dmesg), the scheduler, its machine",
            )
        store = self._store
        if other is None and store is not None:
            with contextlib.suppress(RuntimeError):  # its host is gone: nobody is left to be told
                if store.add("failures", 1) == 1:
                    store.set(_FAILED, str(error) or type(error).__name__)
                    _wait_until(lambda: store.add(_SEEN, 0) >= self._others, 3 * LOOK_SECONDS)
        if other is not None and (lost or isinstance(error, KeyboardInterrupt)):
            return RankError(f"another rank failed: {other}")
        return error

    def _look(self) -> None:
        while self._error is None and self._store is not None:
            if self._is_over.wait(LOOK_SECONDS):
                return
            self._other()
        if self._error is not None and not self._is_over.wait(GRACE_SECONDS):
            # Waits of Python's own, and loops, end by that; those in torch don't.
            if self._is_in_main:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if not self._is_over.wait(GRACE_SECONDS):
                print("this rank ends, as another one failed", file=sys.stderr, flush=True)
                os._exit(1)

    def _other(self, seconds: float = 0.0) -> str | None:
        """The error of the rank that failed first, if one did or does so in `seconds`; it is told so."""
        store = self._store
        try:
            if (
                self._error is None
                and store is not None
                and _wait_until(lambda: store.check([_FAILED]), seconds)
            ):
                self._error = store.get(_FAILED).decode()
                store.add(_SEEN, 1)
        except RuntimeError:  # its host has ended: whoever waits for that rank is told by gloo
            self._store = None
        return self._error


def is_lost(error: BaseException) -> bool:
    """Whether all that torch says is that another rank is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE)


@contextlib.contextmanager
def telling() -> Iterator[bool]:
    """Around what ends a command: whether it is said here, not by one of those started with this.

    Who does not say it waits until it is said, as torchrun ends all others when one has ended.
    """
    store = _meeting(f"told-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")
    try:
        is_first = store is None or store.add("telling", 1) == 1
        if store is not None and not is_first:
            _wait_until(lambda: store.check(["told"]), 5 * LOOK_SECONDS)
    except RuntimeError:  # the store's host has ended
        is_first = True
    yield is_first
    if store is not None and is_first:
        with contextlib.suppress(RuntimeError):
            store.set("told", "")


def _meeting(name: str) -> dist.Store | None:  # type: ignore[name-defined]
    """A part of the store by which these processes meet; None where there is none."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    # torchrun has a store; without it the first rank makes one when the group is made.
    is_there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or dist.is_initialized()
    if os.environ.get("WORLD_SIZE", "1") == "1" or not is_there or not host or not port.isdecimal():
        return None
    try:
        # A connection of its own: others wait in theirs.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
        )
    except RuntimeError:
        return None
    return dist.PrefixStore(  # type: ignore[attr-defined]
        f"scshards/{name}", store
    )


def _wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (so := is_so()) and time.monotonic() < end:
        time.sleep(0.05)
    return so

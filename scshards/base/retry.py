"""When something remote is tried again: how often, after what waits, for how long, and who is told.

Waits grow and are jittered by the operating system's randomness, so that many readers of a store do not
come back all at once; nothing about the order of cells depends on them. Called by base.ranges.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass

from scshards.base.errors import ConfigError, StorageError

LINE_EVERY_S = 10.0
"""A log line on retries is written at most this often for each storage."""

_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How a remote read that fails is tried again.

    Attributes
    ----------
    retries
        How often one read is tried again; 0 never does.
    timeout
        Seconds without an answer, or without the answer's next bytes, after which a request has failed.
    deadline
        Seconds after which a read is not tried again, whatever is left of its retries.
    first_wait, longest_wait
        Seconds: before the i-th retry comes a wait drawn from [0, min(longest_wait, first_wait * 2^i)).
    """

    retries: int = 5
    timeout: float = 30.0
    deadline: float = 300.0
    first_wait: float = 0.1
    longest_wait: float = 20.0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigError(f"retries is at least 0, not {self.retries}")
        for name in ("timeout", "deadline", "first_wait", "longest_wait"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name} is above 0 (seconds), not {value}")


class Stopped(Exception):
    """A read was given up because nobody waits for it any more. No user sees it."""


class Tally:
    """How many reads of one storage were tried again, and a line about them now and then.

    Parameters
    ----------
    where
        The storage, without credentials.
    """

    def __init__(self, where: str) -> None:
        self.retried = 0
        self._where = where
        self._untold = 0
        self._told_at = -LINE_EVERY_S
        self._lock = threading.Lock()

    def count(self, problem: str, where: str) -> None:
        """One more retry, of a read at `where`, because of `problem`."""
        with self._lock:
            self.retried += 1
            self._untold += 1
            now = time.monotonic()
            if now - self._told_at < LINE_EVERY_S:
                return
            untold, self._untold, self._told_at = self._untold, 0, now
            total = self.retried
        reads = "1 read is" if untold == 1 else f"{untold} reads are"
        _log.warning(
            "%s: %s tried again (%d so far); the last one, of %s: %s",
            self._where, reads, total, where, problem,
        )  # fmt: skip


class Tries:
    """The tries of one read.

    Parameters
    ----------
    retry
        How often and how long.
    tally
        Where retries are counted.
    where
        What is read, for messages.
    stop
        Set when the read is to be given up.
    """

    def __init__(
        self, retry: Retry, tally: Tally, where: str, stop: threading.Event | None
    ) -> None:
        self._retry, self._tally, self._where = retry, tally, where
        self.stop = stop
        self._done = 0
        self._until = time.monotonic() + retry.deadline

    @property
    def seconds_left(self) -> float:
        """Until the deadline; a little when it has passed."""
        return max(0.001, self._until - time.monotonic())

    def again(self, problem: str) -> None:
        """Wait for the next try after `problem`.

        Raises
        ------
        StorageError
            When there is none: it was the last, or the deadline would pass.
        Stopped
            When nobody waits for the read any more.
        """
        wait = min(self._retry.longest_wait, self._retry.first_wait * 2**self._done)
        wait *= _jitter.random()
        self._done += 1
        if self._done > self._retry.retries or wait >= self.seconds_left:
            tries = "1 try" if self._done == 1 else f"{self._done} tries"
            raise StorageError(
                f"{problem} ({tries})",
                where=self._where,
                advice="check the address, the network and the store's state; more retries and a "
                "longer timeout make a reader more patient",
            )
        self._tally.count(problem, self._where)
        if self.stop is None:
            time.sleep(wait)
        elif self.stop.wait(wait):
            raise Stopped

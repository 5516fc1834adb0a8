"""When something remote is tried again: how often, after what waits, for how long, and who is told.

One rule for every request to a store or a web server, reads and writes. Waits grow and are jittered by
the operating system's randomness, so that many readers of a store do not come back all at once; nothing
about the order of cells depends on them.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass
from functools import cached_property

from scshards.base.errors import ConfigError, StorageError

LINE_EVERY_S = 10.0
"""A log line on retries is written at most this often for each storage."""

_MOST = 10_000
_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How a remote request that fails is tried again.

    Attributes
    ----------
    retries
        How often one request is tried again; 0 never does. The waits before 14 retries take about a
        minute.
    timeout
        Seconds without an answer, or without the answer's next bytes, after which a request has failed.
    deadline
        Seconds since its last bytes after which a request is not tried again, whatever is left of its
        retries. None: as long as the waits of its retries take, and two timeouts at least.
    first_wait, longest_wait
        Seconds: before the i-th retry comes a wait drawn from the upper half of
        [0, min(longest_wait, first_wait * 2^i)).
    """

    retries: int = 14
    timeout: float = 30.0
    deadline: float | None = None
    first_wait: float = 0.1
    longest_wait: float = 10.0

    def __post_init__(self) -> None:
        if type(self.retries) is not int or not 0 <= self.retries <= _MOST:
            raise ConfigError(
                f"retries is a whole number from 0 to {_MOST:,}, not {self.retries!r}"
            )
        for name in ("timeout", "deadline", "first_wait", "longest_wait"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is above 0 (seconds), not {value}")

    def wait(self, done: int) -> float:
        """The longest wait after a number of tries that failed."""
        return min(self.longest_wait, self.first_wait * 2.0 ** min(done, 99))

    @cached_property
    def patience(self) -> float:
        """Seconds since its last bytes after which a request is not tried again."""
        if self.deadline is not None:
            return self.deadline
        return max(sum(map(self.wait, range(self.retries))), 2 * self.timeout)


class Stopped(Exception):
    """A read was given up because nobody waits for it any more. No user sees it."""


class Tally:
    """How many requests of one storage were tried again, and a line about them now and then.

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
        """One more retry, of a request at `where`, because of `problem`."""
        with self._lock:
            self.retried += 1
            self._untold += 1
            now = time.monotonic()
            if now - self._told_at < LINE_EVERY_S:
                return
            untold, self._untold, self._told_at = self._untold, 0, now
            total = self.retried
        requests = "1 request is" if untold == 1 else f"{untold} requests are"
        _log.warning(
            "%s: %s tried again (%d so far); the last one, of %s: %s",
            self._where, requests, total, where, problem,
        )  # fmt: skip


class Tries:
    """The tries of one request.

    Parameters
    ----------
    retry
        How often and how long.
    tally
        Where retries are counted.
    where
        What is asked for, for messages.
    stop
        Set when the request is to be given up.
    """

    def __init__(
        self, retry: Retry, tally: Tally, where: str, stop: threading.Event | None = None
    ) -> None:
        self._retry, self._tally, self._where = retry, tally, where
        self.stop = stop
        self._done = 0
        self._began = time.monotonic()
        self.got_on()

    def got_on(self) -> None:
        """Bytes have come: the store is patient with us, and we are with it."""
        self._until = time.monotonic() + self._retry.patience

    @property
    def seconds_left(self) -> float:
        """Until it is too late for another try; a little when it is."""
        return max(0.001, self._until - time.monotonic())

    def again(self, problem: str) -> None:
        """Wait for the next try after `problem`.

        Raises
        ------
        StorageError
            When there is none: it was the last, or it would come too late.
        Stopped
            When nobody waits for the read any more.
        """
        wait = self._retry.wait(self._done) * (0.5 + 0.5 * _jitter.random())
        self._done += 1
        if self._done > self._retry.retries or wait >= self.seconds_left:
            seconds = time.monotonic() - self._began
            tries = "1 try" if self._done == 1 else f"{self._done} tries in {seconds:.0f} s"
            raise StorageError(
                f"{problem} ({tries})",
                where=self._where,
                advice="check the address, the network and the state of the server; --retries and "
                f"--timeout ({self._retry.retries} and {self._retry.timeout:g} s here) make scshards "
                "more patient",
            )
        self._tally.count(problem, self._where)
        if self.stop is None:
            time.sleep(wait)
        elif self.stop.wait(wait):
            raise Stopped

"""When something remote is tried again: how often, after what waits, for how long, and who is told.

One rule for every request to a store or a web server, reads and writes. Waits grow and are jittered by
the operating system's randomness, so that many readers of a store do not come back all at once; nothing
about the order of cells depends on them.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from scshards.base.errors import ConfigError, StorageError
from scshards.base.progress import counted
from scshards.base.remote import temporary
from scshards.base.threads import Stop, Stopped

Got = TypeVar("Got")

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
    first_wait, longest_wait
        Seconds: before the i-th retry comes a wait drawn from the upper half of
        [0, min(longest_wait, first_wait * 2^i)).
    """

    retries: int = 14
    timeout: float = 30.0
    first_wait: float = 0.1
    longest_wait: float = 10.0

    def __post_init__(self) -> None:
        if type(self.retries) is not int or not 0 <= self.retries <= _MOST:
            raise ConfigError(
                f"retries is a whole number from 0 to {_MOST:,}, not {self.retries!r}"
            )
        for name in ("timeout", "first_wait", "longest_wait"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is above 0 (seconds), not {getattr(self, name)}")

    def wait(self, done: int) -> float:
        """The longest wait after a number of tries that failed."""
        return min(self.longest_wait, self.first_wait * 2.0 ** min(done, 99))

    @cached_property
    def patience(self) -> float:
        """Seconds since its last bytes after which a request is not tried again: as long as the waits
        of its retries take, and two timeouts at least.
        """
        return max(sum(map(self.wait, range(self.retries))), 2 * self.timeout)


class Limit:
    """Until when one request is tried again."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.got_on()

    def got_on(self) -> None:
        """Bytes have come: the store is patient with us, and we are with it."""
        self._until = time.monotonic() + self._patience

    @property
    def seconds_left(self) -> float:
        """Until it is too late for another try; a little when it is."""
        return max(0.001, self._until - time.monotonic())


class Requests:
    """Asks one storage, and asks again; a line of the log tells of that now and then.

    Parameters
    ----------
    retry
        How often and how long.
    where
        The storage, without credentials.

    Attributes
    ----------
    retried
        How many requests were tried again.
    """

    def __init__(self, retry: Retry, where: str) -> None:
        self.retry, self.retried = retry, 0
        self._where = where
        self._told_at = -LINE_EVERY_S
        self._lock = threading.Lock()

    def ask(self, where: str, call: Callable[[Limit], Got], stop: Stop | None = None) -> Got:
        """What `call` returns, which is given the limit of this request, and may be called again.

        Parameters
        ----------
        where
            What is asked for, for messages.
        call
            One try.
        stop
            Set when the request is to be given up.

        Raises
        ------
        StorageError
            When there is no other try: it was the last, or it would come too late.
        Stopped
            When nobody waits for the answer any more.
        """
        began, limit = time.monotonic(), Limit(self.retry.patience)
        for done in itertools.count(1):
            try:
                return call(limit)
            except Exception as e:
                problem = temporary(e)
                if problem is None:
                    raise
            wait = self.retry.wait(done - 1) * (0.5 + 0.5 * _jitter.random())
            if done > self.retry.retries or wait >= limit.seconds_left:
                break
            self._count(problem, where)
            if stop is None:
                time.sleep(wait)
            elif stop.wait(wait):
                raise Stopped
        tries = "1 try" if done == 1 else f"{done} tries in {time.monotonic() - began:.0f} s"
        raise StorageError(
            f"{problem} ({tries})",
            where=where,
            advice="check the address, the network and the state of the server; --retries and "
            f"--timeout ({self.retry.retries} and {self.retry.timeout:g} s here) make scshards "
            "more patient",
        )

    def _count(self, problem: str, where: str) -> None:
        with self._lock:
            self.retried += 1
            now = time.monotonic()
            if now - self._told_at < LINE_EVERY_S:
                return
            self._told_at = now
        _log.warning(
            f"{self._where}: {counted(self.retried, 'requests')} tried again so far; "
            f"the last one, of {where}: {problem}"
        )

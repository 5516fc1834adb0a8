"""Blocks -> batches on several threads, in order, a bounded number ahead of whoever takes them.

    for batch in Batches(blocks, make, threads=2, ahead=16): ...

Each thread takes the next block, one thread at a time, and makes its batches while another deals the
block after it. `make` has all batches of a block before it, and may make several of them at once.

    user --holds--> Batches --holds--> _Line (blocks, batches that wait, what each thread is at)
                                         ^ a thread has it only while it works, and waits without it

So whoever drops the iterator, in a cycle or not, leaves nothing that holds it: its finalizer raises a
flag, and threads look for that several times a second. Called by streaming.blockstream.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from scshards.base.text import size_of
from scshards.base.threads import LOOK_S, Stop
from scshards.streaming.mix.blocks import Block

Made = TypeVar("Made")

AHEAD, AHEAD_BYTES = 16, "64 MB"

_END_S = 1.0
"""How long who closes an iterator waits for its threads at most."""


class Batches(Iterator[Made]):
    """What make(block, batches) gives for the batches of each block, in order.

    Its threads end when it is at its end, closed, or dropped.

    Parameters
    ----------
    blocks
        Asked for the next block by one thread at a time.
    make
        Gives one thing for each of these batches of the block. Called by several threads at once.
    threads
        How many; they begin at once.
    ahead
        Batches that are made before they are asked for; or, as a text such as "64 MB", about how many
        bytes of them, counted by the largest one so far. One is made in any case. None: AHEAD batches,
        or fewer where they have more than AHEAD_BYTES.
    first, step
        Only the batches first, first + step, ... of all are made; first is less than step. `make` is
        asked for those of a block, by their numbers in it.
    stop
        Set when nobody takes batches any more: `blocks` is to wait for nothing from then on.

    Raises
    ------
    Whatever `blocks` or `make` raises, in place of the batch where it happened; nothing comes after it.
    """

    def __init__(
        self,
        blocks: Iterator[Block],
        make: Callable[[Block, range], Iterator[Made]],
        *,
        threads: int,
        ahead: int | str | None,
        first: int = 0,
        step: int = 1,
        stop: Stop | None = None,
    ) -> None:
        assert 0 <= first < step
        self._line = line = _Line(blocks, make, threads, ahead, first, step, stop or Stop())
        weakref.finalize(self, line.stop.set)
        for i in range(threads):
            line.stop.start(
                f"scshards-stream-{i}", _run, weakref.ref(line), i, line.stop, line.changed
            )

    def __next__(self) -> Made:
        try:
            return self._line.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads, without waiting for a store that hangs; there is no next batch then."""
        self._line.stop.set()
        with self._line.changed:
            self._line.changed.notify_all()
        self._line.stop.join(_END_S)
        self._line.let_go()


@dataclass(frozen=True, slots=True)
class _Fault:
    error: BaseException


class _Line(Generic[Made]):
    """What the threads share: blocks still to be dealt, and batches that wait to be taken."""

    def __init__(
        self,
        blocks: Iterator[Block],
        make: Callable[[Block, range], Iterator[Made]],
        threads: int,
        ahead: int | str | None,
        first: int,
        step: int,
        stop: Stop,
    ) -> None:
        self._blocks, self._make = blocks, make
        most = AHEAD_BYTES if ahead is None else ahead
        self._ahead_bytes = size_of(most) if isinstance(most, str) else 0
        self._ahead = AHEAD if ahead is None else ahead if isinstance(ahead, int) else None
        # Of the next block's batches, those before the first one that is wanted.
        self._skipped, self._step = first, step
        self._dealing = threading.Lock()
        self.changed, self.stop = threading.Condition(), stop
        self._made: dict[int, Made | _Fault] = {}
        self._largest = 1  # bytes of a batch
        self._dealt = 0  # wanted batches of all blocks so far
        self._next = 0  # the one of them that is taken next
        self._is_over = False
        self._broken: BaseException | None = None
        # What each thread does: it yields the number of a batch that there is no room for yet.
        self.work: list[Iterator[int] | None] = [self._work() for _ in range(threads)]

    def _work(self) -> Iterator[int]:
        while True:
            with self._dealing:
                if self._is_over or self.stop.is_set():
                    return
                try:
                    block = next(self._blocks, None)
                except BaseException as e:
                    self._put(self._dealt, _Fault(e))
                    block = None
                if block is None:
                    self._is_over = True
                    with self.changed:
                        self.changed.notify_all()
                    return
                first, wanted = self._dealt, range(self._skipped, block.batches, self._step)
                self._dealt += len(wanted)
                self._skipped = (self._skipped - block.batches) % self._step
            yield from self._make_all(block, wanted, first)
            block.free()

    def _make_all(self, block: Block, wanted: range, first: int) -> Iterator[int]:
        """Put the wanted batches of a block, the first of which is batch `first`."""
        making = self._make(block, wanted)
        for number in range(first, first + len(wanted)):
            while not self.has_room(number):
                yield number
            if self.stop.is_set():
                break
            try:
                made: Made | _Fault = next(making)
            except BaseException as e:
                self._put(number, _Fault(e))
                break  # nobody takes what comes after it
            self._put(number, made)

    def take(self) -> Made:
        """The next batch; StopIteration behind the last one, and when all is to end."""
        with self.changed:
            while self._next not in self._made or self.stop.is_set():
                if self._broken is not None:
                    raise self._broken
                if self.stop.is_set() or (self._is_over and self._next >= self._dealt):
                    raise StopIteration
                self.changed.wait(LOOK_S)
            made = self._made.pop(self._next)
            self._next += 1
            self.changed.notify_all()
        if isinstance(made, _Fault):
            raise made.error
        return made

    def has_room(self, number: int) -> bool:
        """Whether this batch may be made; the one that is taken next always may."""
        room = self._ahead
        if self._ahead_bytes:
            by_bytes = max(1, self._ahead_bytes // self._largest)
            room = by_bytes if room is None else min(room, by_bytes)
        assert room is not None
        return number < self._next + room

    def let_go(self) -> None:
        """Free what was read and made: who has closed an iterator may hold it for long."""
        with self.changed:
            self._blocks = iter(())
            self._made.clear()

    def break_off(self, error: BaseException) -> None:
        """A thread has ended: nobody else would hear of it, and the taker would wait for ever."""
        with self.changed:
            self._broken = error
            self.changed.notify_all()

    def _put(self, number: int, made: Made | _Fault) -> None:
        size = _size(made) if self._ahead_bytes else 0
        with self.changed:
            self._made[number] = made
            self._largest = max(self._largest, size)
            if number == self._next:
                self.changed.notify_all()


def _run(
    whole: weakref.ref[_Line[Any]], number: int, stop: Stop, changed: threading.Condition
) -> None:
    """What a thread does: its work, as long as there is room for batches, somebody, and more of it."""
    while (line := whole()) is not None:
        work = line.work[number]
        assert work is not None
        try:
            index = None if stop.is_set() else next(work, None)
        except BaseException as e:
            index = None
            line.break_off(e)
        if index is None:
            # Closed here and let go, so that what it holds does not wait for the garbage collector.
            line.work[number] = None
            return
        del work, line
        with changed:
            line = whole()
            if line is not None and not line.has_room(index):
                line = None
                changed.wait(LOOK_S)


def _size(made: Any) -> int:
    """Bytes of the tensors and arrays in it."""
    if hasattr(made, "nbytes"):
        return int(made.nbytes)
    if isinstance(made, Mapping):
        return sum(map(_size, made.values()))
    if isinstance(made, list | tuple):
        return sum(map(_size, made))
    if dataclasses.is_dataclass(made):
        return sum(_size(getattr(made, field.name)) for field in dataclasses.fields(made))
    return 0

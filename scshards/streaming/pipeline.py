"""Blocks -> batches on several threads, in order, a bounded number ahead of whoever takes them.

    for batch in in_order(blocks, make, threads=2, ahead=16): ...

Each thread takes the next block, one thread at a time, and makes its batches while another deals the
block after it. `make` has all batches of a block before it, and may make several of them at once. Called
by streaming.blockstream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from scshards.streaming.mix.blocks import Block

Made = TypeVar("Made")


def in_order(
    blocks: Iterator[Block],
    make: Callable[[Block, range], Iterator[Made]],
    *,
    threads: int,
    ahead: int,
    first: int = 0,
    step: int = 1,
    closing: Callable[[], None] = lambda: None,
) -> Generator[Made, None, None]:
    """What make(block, batches) gives for the batches of each block, in order.

    Parameters
    ----------
    blocks
        Asked for the next block by one thread at a time.
    make
        Gives one thing for each of these batches of the block. Called by several threads at once.
    threads
        How many.
    ahead
        Batches that are made before they are asked for.
    first, step
        Only the batches first, first + step, ... of all are made; first is less than step. `make` is
        asked for those of a block, by their numbers in it.
    closing
        Called when nobody takes batches any more, so that `blocks` waits for nothing from then on.

    Raises
    ------
    Whatever `blocks` or `make` raises, in place of the batch where it happened; nothing comes after it.
    """
    line: _Line[Made] = _Line(blocks, make, ahead, first, step)
    workers = [
        threading.Thread(target=line.work, name=f"scshards-stream-{i}", daemon=True)
        for i in range(threads)
    ]
    for worker in workers:
        worker.start()
    try:
        yield from line.take()
    finally:
        line.stop()
        closing()
        for worker in workers:
            worker.join()


@dataclass(frozen=True, slots=True)
class _Fault:
    error: BaseException


class _Line(Generic[Made]):
    """What the threads share: blocks still to be dealt, and batches that wait to be taken."""

    def __init__(
        self,
        blocks: Iterator[Block],
        make: Callable[[Block, range], Iterator[Made]],
        ahead: int,
        first: int,
        step: int,
    ) -> None:
        assert 0 <= first < step
        self._blocks, self._make, self._ahead = blocks, make, ahead * step
        self._first, self._step = first, step
        self._dealing = threading.Lock()
        self._changed = threading.Condition()
        self._made: dict[int, Made | _Fault] = {}
        self._dealt = 0  # batches of all blocks so far
        self._next = first  # the batch that is taken next
        self._is_over = self._is_stopped = False
        self._broken: BaseException | None = None

    def work(self) -> None:
        """What each thread does."""
        try:
            self._work()
        except BaseException as e:
            # Nobody else would hear of it, and the taker would wait for ever.
            with self._changed:
                self._broken = e
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._dealing:
                if self._is_over or self._is_stopped:
                    return
                first = self._dealt
                try:
                    block = next(self._blocks, None)
                except BaseException as e:
                    self._put(self._wanted(first), _Fault(e))
                    block = None
                if block is None:
                    self._is_over = True
                    with self._changed:
                        self._changed.notify_all()
                    return
                self._dealt += block.batches
            if not self._make_all(block, first):
                return
            block.free()

    def _make_all(self, block: Block, first: int) -> bool:
        """Put the batches of a block, the first of which is batch `first`; False when stopped."""
        wanted = range(self._wanted(first) - first, block.batches, self._step)
        making = self._make(block, wanted)
        for i in wanted:
            if not self._wait_for_room(first + i):
                return False
            try:
                made: Made | _Fault = next(making)
            except BaseException as e:
                self._put(first + i, _Fault(e))
                break  # nobody takes what comes after it
            self._put(first + i, made)
        return True

    def take(self) -> Iterator[Made]:
        """The batches in order."""
        while True:
            with self._changed:
                while self._next not in self._made:
                    if self._broken is not None:
                        raise self._broken
                    if self._is_over and self._next >= self._dealt:
                        return
                    self._changed.wait()
                made = self._made.pop(self._next)
                self._next += self._step
                self._changed.notify_all()
            if isinstance(made, _Fault):
                raise made.error
            yield made

    def stop(self) -> None:
        """Let all threads end after what they are at."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _wanted(self, index: int) -> int:
        """The first batch from `index` on that is to be made."""
        return index + (self._first - index) % self._step

    def _wait_for_room(self, index: int) -> bool:
        with self._changed:
            # The batch that is taken next has room always, so that nobody waits for ever.
            while index >= self._next + self._ahead and not self._is_stopped:
                self._changed.wait()
            return not self._is_stopped

    def _put(self, index: int, made: Made | _Fault) -> None:
        with self._changed:
            self._made[index] = made
            if index == self._next:
                self._changed.notify_all()

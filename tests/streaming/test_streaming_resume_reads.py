"""What a resumed epoch reads before its first batch: what that batch needs, and in that order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from loaders import loader_of
from shardsets import Known, make_set

from scshards.streaming.loader import CellLoader
from scshards.streaming.mix.blocks import Block


class OnDemand:
    """An executor whose jobs run when somebody asks for their result."""

    jobs: ClassVar[list[OnDemand.Job]] = []
    asked_first: ClassVar[int] = 0  # jobs that there were when the first result was asked for

    class Job:
        def __init__(self, run: Callable[[], Any]) -> None:
            self.run, self.done, self.made = run, False, None

        def result(self) -> Any:
            if not any(job.done for job in OnDemand.jobs):
                OnDemand.asked_first = len(OnDemand.jobs)
            if not self.done:
                self.done, self.made = True, self.run()
            return self.made

    def __init__(self, *args: object) -> None:
        OnDemand.jobs = []

    def submit(self, f: Callable[..., Any], *args: Any) -> OnDemand.Job:
        self.jobs.append(OnDemand.Job(lambda: f(*args)))
        return self.jobs[-1]

    def shutdown(self, **options: Any) -> None:
        """Nothing runs by itself."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("sets") / "a", [10] * 80)


def resumed(known: Known, position: int, **options: Any) -> CellLoader:
    one = loader_of(known.root, batch_size=8, lanes=4, shuffle_buffer=160, threads=1, **options)
    one.load_state_dict(one.state_dict() | {"position": position})
    return one


@pytest.mark.parametrize("position", [400, 648, 784])
def test_the_first_batch_waits_for_its_own_cells(
    known: Known, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [b.key.tolist() for b in resumed(known, position)]
    monkeypatch.setattr("scshards.streaming.blockstream.Jobs", OnDemand)
    one = resumed(known, position)
    read: list[int] = []

    def make(block: Block, wanted: range) -> Iterator[list[int]]:
        for batch in one.collate(block, wanted):
            # On the only thread: nothing was dealt after this block.
            read.append(sum(job.done for job in OnDemand.jobs))
            yield list(batch.key.tolist())

    stream = one.stream(make)
    found = [next(stream)]
    # 8 cells of 4 lanes: 2 of each lane, and the input that takes their places.
    assert read[0] <= 3 * 4
    found += stream
    assert found == expected
    if position == 400:
        assert read[-1] > 40


def test_reads_are_asked_for_in_the_order_of_need(
    known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scshards.streaming.blockstream.Jobs", OnDemand)
    one = loader_of(known.root, batch_size=1, lanes=1, shuffle_buffer=160, threads=1)
    one.load_state_dict(one.state_dict() | {"position": 400})
    done: list[list[int]] = []

    def make(block: Block, wanted: range) -> Iterator[int]:
        for i in wanted:
            first = OnDemand.jobs[: OnDemand.asked_first]
            done.append([n for n, job in enumerate(first) if job.done])
            yield i

    list(one.stream(make))
    assert all(each == list(range(len(each))) for each in done)
    assert len(done[0]) <= 2 < 10 < len(done[-1])

"""Ranks that stay for many tests: whatever a job does to them, the next one finds ranks that work."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from rank_host import RankFailed

from scshards.ranks.ranks import ranks


def total(*values: float) -> list[float]:
    with ranks("cpu") as here:
        return here.total([v * (here.rank + 1) for v in values])


def process() -> int:
    return os.getpid()


def raises(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        raise ValueError("as it was told")


def ends(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        os._exit(3)


def hangs() -> None:
    time.sleep(600)


def test_a_job_is_done_by_all_of_the_same_processes(two_ranks):
    before = two_ranks.run(f"{__name__}:process")
    assert len({os.getpid(), *before}) == 3
    for _ in range(3):
        assert two_ranks.run(f"{__name__}:total", 1, 2.5) == [[3, 7.5], [3, 7.5]]
    assert two_ranks.run(f"{__name__}:process") == before


@pytest.mark.parametrize(
    ("job", "said", "codes"),
    [
        (("raises", 1), "rank 0: well\nrank 1: Traceback", [None, None]),
        (("ends", 0), "rank 0: it has ended", [3, None]),
        (("hangs",), "rank 1: not done after 2 s", [None, None]),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_what_fails_is_told_and_the_next_job_gets_fresh_ranks(two_ranks, job, said, codes):
    before = two_ranks.run(f"{__name__}:process")
    with pytest.raises(RankFailed) as e:
        two_ranks.run(f"{__name__}:{job[0]}", *job[1:], seconds=2)
    assert said in str(e.value) and e.value.codes == codes
    assert ("as it was told" in str(e.value)) == (job[0] == "raises")
    after = two_ranks.run(f"{__name__}:process")
    assert not {*before} & {*after}
    assert two_ranks.run(f"{__name__}:total", 1) == [[3], [3]]
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)

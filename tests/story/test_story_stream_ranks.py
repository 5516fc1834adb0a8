"""Story: ranks die at random steps, others go on, and an epoch is exact all the same.

What counts of an attempt is what it had received when it saved the state that the next one resumed from;
the rest, a crash loses and the next attempt streams again.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from rank_host import RankFailed, RankHost
from shardsets import Known, make_set
from stream_rank import BATCHES, SAVE_EVERY

SIZES = [120, 7, 63, 201, 1, 90]
CELLS = sum(SIZES)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), SIZES)


def received(out: Path, attempt: int, batches: int | None) -> list[int]:
    """The keys that all ranks of an attempt got in their first batches, or in all."""
    keys = []
    for log in sorted(out.glob(f"keys-{attempt}-*.jsonl")):
        lines = log.read_text().splitlines()
        assert batches is None or len(lines) >= batches
        keys += [k for line in lines[:batches] for k in json.loads(line)]
    return keys


def state(out: Path) -> dict[str, Any] | None:
    """What was saved last."""
    file = out / "state.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_killed_ranks_and_other_worlds_lose_and_repeat_no_cell(
    known: Known, tmp_path: Path, rank_host: RankHost
) -> None:
    rng = random.Random(2)
    worlds = (4, 2, 3)
    seen: list[int] = []
    for attempt, ranks in enumerate(worlds):
        is_last = attempt == len(worlds) - 1
        # Late enough that something was saved, early enough that something is left to do.
        killed = (
            rng.randrange(ranks),
            rng.randint(SAVE_EVERY + 1, 10),
            rng.choice(["received", "logged", "saved"]),
        )
        if rng.random() < 0.3:
            killed = (0, SAVE_EVERY * rng.randint(2, 3), "saving")
        before = state(tmp_path)
        job = ("stream_rank:main", str(known.root), str(tmp_path), attempt)
        with rank_host.team(ranks) as team:
            if is_last:
                team.run(*job, -1, 0, "")
                seen += received(tmp_path, attempt, None)
                continue
            with pytest.raises(RankFailed) as e:
                team.run(*job, *killed, grace=0.5)
        assert e.value.codes[killed[0]] == -9, e.value
        after = state(tmp_path)
        assert after is not None and after != before
        assert after["attempt"] == attempt and after["loader"]["epoch"] == 2
        seen += received(tmp_path, attempt, after["batches"])
    told = json.loads((tmp_path / f"told-{len(worlds) - 1}.json").read_text())
    assert len(seen) == len(set(seen)) == CELLS - told["dropped"]
    last_batch = worlds[-1] * BATCHES[worlds[-1]]
    assert 0 <= told["dropped"] < last_batch and set(seen) <= set(range(CELLS))
    last = received(tmp_path, len(worlds) - 1, None)
    assert len(last) == told["steps"] * last_batch > 0

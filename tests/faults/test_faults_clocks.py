"""A clock that jumps back and forth by an hour at each look: nothing that waits, tries again or holds a lock cares.

`time.time` is spoiled, as a machine's clock is that is set anew; the one that only goes forward is not.
"""

from __future__ import annotations

import datetime
import io
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from loaders import loader_of
from pack_support import counts, quiet_pack, quiet_reshard, tree_sums, vocab_of, write
from shardsets import make_set
from test_faults_kills import told
from train_support import small_config

from scshards.base.errors import OutputExistsError, StorageError
from scshards.base.locks import Lease
from scshards.base.progress import Progress
from scshards.base.retry import Retry
from scshards.base.storage import Storage
from scshards.training.loop import train

HOUR = 3600.0


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock; what it has said."""
    real, said = time.time, list[float]()
    jumps = itertools.cycle([HOUR, -HOUR, 0.0, -2 * HOUR, 24 * HOUR])

    def jump() -> float:
        said.append(real() + next(jumps))
        return said[-1]

    monkeypatch.setattr(time, "time", jump)
    monkeypatch.setattr(time, "time_ns", lambda: int(jump() * 1e9))
    return said


def test_packs_are_the_same_bytes(tmp_path: Path, jumping: list[float]) -> None:
    paths = [write(tmp_path / f"{i}.h5ad", counts(40, 6, seed=i)) for i in range(2)]
    options = {"cells_per_shard": 9, "valid_fraction": 0.3}
    for name in ("a", "b"):
        quiet_pack(paths, tmp_path / name, vocab_of(6), **options)
        assert time.time() and jumping
    assert tree_sums(tmp_path / "a") == tree_sums(tmp_path / "b")
    quiet_reshard(tmp_path / "a", tmp_path / "c", cells_per_shard=9)
    quiet_pack(paths, tmp_path / "a", vocab_of(6), **options)  # it is complete


def test_a_run_is_the_same_run(shards: str, tmp_path: Path, jumping: list[float]) -> None:
    for name in ("a", "b"):
        # The second is cut in two, and goes on.
        for steps in (4,) if name == "a" else (2, 4):
            settings = (
                f"run.steps={steps}",
                "run.save_every=2",
                "run.eval_every=2",
                "run.log_every=1",
            )
            settings += ("optim.schedule=constant",)
            train(shards, tmp_path / name, small_config(*settings), shown=False)
    found = [told(tmp_path / name) for name in ("a", "b")]
    for each in found:
        for line in each["metrics.jsonl"]:
            assert all(v is None or v >= 0 for k, v in line.items() if k in ("epoch", "lr"))
    weights = [{n: s for n, s in each.items() if n.endswith((".bin", ".pt"))} for each in found]
    assert weights[0] == weights[1] and len(weights[0]) >= 2


def test_requests_are_tried_again_and_given_up_by_what_goes_forward(
    s3: Any, tmp_path: Path, jumping: list[float]
) -> None:
    known = make_set(tmp_path / "set", [60])
    here, there = Storage(tmp_path / "set"), Storage(f"{s3.url}/set")
    for name in here.list():
        there.write(name, here.read(name))
    with FaultProxy(s3.options["endpoint_url"], share=0.3, seed=2, kinds=("503", "reset")) as proxy:
        options = s3.options | {"endpoint_url": proxy.url}
        reading = loader_of(f"{s3.url}/set", batch_size=8, lanes=2, storage_options=options)
        whole = loader_of(known.root, batch_size=8, lanes=2)
        assert [b.key.tolist() for b in reading] == [b.key.tolist() for b in whole]
        assert sum(proxy.faults.values()) > 0
        proxy.share = lambda path: "503"
        began = time.monotonic()
        with pytest.raises(StorageError, match="503"):
            loader_of(f"{s3.url}/set", retries=2, timeout=1.0, storage_options=options)
        assert time.monotonic() - began < 60
    assert Retry(retries=2).patience > 0


def test_a_lease_is_held_and_taken_over_by_beats(
    tmp_path: Path, jumping: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scshards.base.locks.BEAT_S", 0.2)
    monkeypatch.setattr("scshards.base.locks.WATCH_S", 2.0)
    monkeypatch.setattr("scshards.base.locks._host", lambda: "elsewhere" if odd() else "here")
    storage = Storage(tmp_path)
    with (
        Lease(storage, "leases") as first,
        pytest.raises(OutputExistsError, match="another process"),
    ):
        first.check()
        with Lease(storage, "leases"):
            pytest.fail("two hold it")
    # One that beats no more is taken over.
    storage.write("leases/dead.json", b'{"host": "gone", "holder": "process 1 on gone", "beat": 7}')
    with Lease(storage, "leases") as second:
        second.check()


_odd = itertools.cycle([False, True])


def odd() -> bool:
    """Whoever looks is on another host than whoever wrote."""
    return next(_odd)


def test_progress_and_dates(jumping: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    with Progress("pack", 10, "cells", shown=True) as bar:
        for _ in range(10):
            bar.add(1)
            assert 0 <= bar.seconds < 60
    assert "-" not in out.getvalue() and "in 0.0 s" in out.getvalue()
    assert datetime.datetime.now(datetime.UTC).year > 2000

"""Batches for other models than scGPT's, wherever they are read: on two real ranks, and from a store.

Counts, ranks, tokens of a user's own and sets, each with arrays beside the genes: the same global batches
as one process makes of a disk, every cell or set of an epoch once, and an exact rest from any batch on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arrays_support import N_GENES, packed
from fault_proxy import FaultProxy
from loaders import loader_of
from rank_host import RankTeam
from s3_start import S3

from scshards import SetBatch
from scshards.base.storage import Storage
from scshards.cells.batch import CellBatch, SparseArray
from scshards.shards import tar

CELLS, BATCH = 150, 12
ARRAYS = ["X_pca", "spots"]
Row = list[Any]
"""Of a cell its key and a digest of all that a batch has of it; of a set its group and such cells."""


def tokenize(genes, counts, key, tokens, values):  # type: ignore[no-untyped-def]
    n = min(len(genes), len(tokens))
    for i in range(n):
        tokens[i], values[i] = genes[i], counts[i] + (key >> np.uint64(60))
    return n


WAYS: dict[str, dict[str, Any]] = {
    "counts": {"objective": "counts"},
    "ranks": {"objective": "ranks", "medians": {f"G{i:03d}": 1.0 + i % 5 for i in range(N_GENES)}},
    "own": {"objective": "own", "tokenize": tokenize, "max_length": 6},
    "sets": {
        "objective": "counts", "by": ["donor"], "control": "a", "size": 3, "small": "repeat",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of several chunks each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "CHUNK_BYTES", 8_192)
        root, _ = packed(tmp_path_factory.mktemp("set"), CELLS, cells_per_shard=40)
    return root


def loader(root: Any, way: str, batch: int, **more: Any) -> Any:
    return loader_of(
        root, batch_size=batch, lanes=4, shuffle_buffer=24, seed=3, drop_last=False, arrays=ARRAYS,
        **WAYS[way], **more,
    )  # fmt: skip


def told(batch: Any) -> list[Row]:
    """A batch row by row, without its padding."""
    if isinstance(batch, SetBatch):
        own, beside = (
            [rows[i : i + batch.size] for i in range(0, len(rows), batch.size)]
            for rows in (told(batch.cells), told(batch.controls))
        )
        groups = batch.groups["donor"].tolist()
        return [list(row) for row in zip(groups, batch.weight.tolist(), own, beside, strict=True)]
    assert isinstance(batch, CellBatch)
    arrays = [x.dense() if isinstance(x, SparseArray) else x for x in batch.arrays.values()]
    rows = []
    for i, key in enumerate(batch.key.tolist()):
        of = [batch.weight[i], batch.labels["donor"][i], *(x[i] for x in arrays)]
        if hasattr(batch, "indptr"):
            at = slice(int(batch.indptr[i]), int(batch.indptr[i + 1]))
            of += [batch.genes[at].long(), batch.counts[at].long(), batch.library[i]]
        else:
            names = ("genes", "targets") if hasattr(batch, "targets") else ("tokens", "values")
            of += [getattr(batch, name)[i][~batch.is_pad[i]] for name in names]
        text = b"|".join(
            np.ascontiguousarray(x.numpy()).tobytes() for x in map(torch.as_tensor, of)
        )
        rows.append([key, hashlib.sha1(text).hexdigest()])
    return rows


def streamed(root: str, way: str, at: int, state: Any) -> dict[str, Any]:
    """A job for each of two ranks: its batches, and the state after `at` of them, which it goes on from."""
    with loader(root, way, BATCH // 2) as reading:
        assert reading.world_size == 2
        if state is not None:
            reading.load_state_dict(state)
        said = {"steps": reading.batches_left, "batches": []}
        for n, batch in enumerate(reading, 1):
            said["batches"].append(told(batch))
            if n == at:
                said["state"] = reading.state_dict()
    return said


def together(ranks: list[dict[str, Any]]) -> list[list[Row]]:
    """The global batches of two ranks: rank r has every second position from r on."""
    assert ranks[0]["steps"] == ranks[1]["steps"] == len(ranks[0]["batches"])
    both = zip(*(rank["batches"] for rank in ranks), strict=True)
    return [[row for pair in zip(*each, strict=True) for row in pair] for each in both]


def key_of(row: Row) -> tuple[int, ...]:
    return (row[0],) if isinstance(row[1], str) else tuple(key for key, _ in row[2])


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_stream_what_one_process_does(root: Path, two_ranks: RankTeam, way: str) -> None:
    reading = loader(root, way, BATCH, rank=0, world_size=1)
    whole = json.loads(json.dumps([told(batch) for batch in reading]))
    seen = Counter(key_of(row) for batch in whole for row in batch)
    del seen[(-1,)], seen[(-1,) * 3]
    assert set(seen.values()) == {1}
    assert len(seen) == (CELLS if way != "sets" else reading.sets.sets)
    at = len(whole) // 2
    ranks = two_ranks.run(f"{__name__}:streamed", str(root), way, at, None)
    assert together(ranks) == whole
    state = ranks[0]["state"]
    assert state == ranks[1]["state"]
    # Broken off there, the rest is the same on one and on two.
    assert together(two_ranks.run(f"{__name__}:streamed", str(root), way, 0, state)) == whole[at:]
    one = loader(root, way, BATCH, rank=0, world_size=1)
    one.load_state_dict(state)
    assert [told(batch) for batch in one] == whole[at:]


def test_a_store_gives_what_a_disk_does_in_few_requests(root: Path, s3: S3) -> None:
    here, there = Storage(root), Storage(f"{s3.url}/set")
    for name in here.list():
        there.write(name, here.read(name))
    with FaultProxy(s3.options["endpoint_url"], share=0.0) as proxy:
        options = s3.options | {"endpoint_url": proxy.url}
        for way in WAYS:
            disk = loader(root, way, BATCH, rank=0, world_size=1)
            of_disk = [told(batch) for batch in disk]
            reading = loader(
                f"{s3.url}/set", way, BATCH, rank=0, world_size=1, storage_options=options
            )
            proxy.requests.clear()
            with reading:
                assert [told(batch) for batch in reading] == of_disk
            # Chunks that follow each other come in one request, those of sets too.
            tars = [r for r in proxy.requests if ".tar" in r.path]
            assert 2 * len(tars) < reading.stages().reads

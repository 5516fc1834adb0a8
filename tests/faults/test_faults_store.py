"""Story: an epoch from an S3 server that fails one request in ten, in every way there is.

It answers 500 and 503, cuts connections before and amid answers, stalls, and sends bodies that are
shorter than they should be or than they say. The epoch delivers every cell exactly once all the same, to
two ranks, with a cache that they share and without, and nobody is told a secret.
"""

from __future__ import annotations

import logging
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_proxy import FAULTS, FLIP, FaultProxy
from loaders import loader_of
from shardsets import Known, make_set

from scshards.base.errors import ScshardsError
from scshards.base.storage import Storage
from scshards.shards import tar
from scshards.streaming.read.cache import LEAST_BYTES

PATIENCE = {"retries": 20, "timeout": 1.0}


def made(folder: Path, url: str, cells: int, shards: int, compression: str) -> Known:
    """A set of very many small chunks, at `url`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "CHUNK_BYTES", 1024)
        known = make_set(
            folder, [cells // shards] * shards, longest=30, compression=compression, seed=1
        )
    here, there = Storage(folder), Storage(url)
    for name in here.list():
        there.write(name, here.read(name))
    return known


def epoch_of(known: Known, rank: int, root: Path | str, **options: object) -> list:
    return list(
        loader_of(
            root, batch_size=16, lanes=4, shuffle_buffer=128, drop_last=False, rank=rank,
            world_size=2, n_bins=0, mask_ratio=0.0, max_length=64, **options,
        )
    )  # fmt: skip


def soak(known: Known, proxy: FaultProxy, s3, **options: object) -> None:
    """An epoch on two ranks at the same time: every cell once, with its own values."""
    storage = {"storage_options": s3.options | {"endpoint_url": proxy.url}}
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(epoch_of, known, rank, f"{s3.url}/set", **PATIENCE, **storage, **options)
            for rank in range(2)
        ]
        ranks = [job.result() for job in jobs]
    plain = [epoch_of(known, rank, known.root) for rank in range(2)]
    seen: list[int] = []
    for batches, wanted in zip(ranks, plain, strict=True):
        assert [b.key.tolist() for b in batches] == [b.key.tolist() for b in wanted]
        for batch in batches:
            for i, key in enumerate(batch.key.tolist()):
                if key >= 0:
                    seen.append(key)
                    is_gene = ~batch.is_pad[i]
                    assert batch.genes[i][is_gene][1:].tolist() == known.genes[key].tolist()
                    assert batch.targets[i][is_gene][1:].tolist() == known.values[key].tolist()
    assert sorted(seen) == sorted(known.genes)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_an_epoch_through_faults(s3, tmp_path: Path, caplog, compression: str) -> None:
    known = made(tmp_path / "set", f"{s3.url}/set", 2400, 6, compression)
    kinds = (*FAULTS, FLIP)
    with FaultProxy(s3.options["endpoint_url"], share=0.1, seed=4, kinds=kinds) as proxy:
        with caplog.at_level(logging.DEBUG, "scshards"):
            soak(known, proxy, s3)
        assert sum(proxy.faults.values()) > 15 and len(proxy.requests) > 200
        once = len(proxy.requests)
        cache = {"cache_dir": tmp_path / "cache", "cache_size": LEAST_BYTES}
        soak(known, proxy, s3, **cache)
        proxy.requests.clear()
        soak(known, proxy, s3, **cache)
        assert len(proxy.requests) < once // 10, "the manifest and the vocabulary only"
    lines = [r.getMessage() for r in caplog.records]
    assert any("tried again" in line for line in lines) and len(lines) < 40
    for secret in (s3.options["secret"], s3.options["key"], "Signature", "AWS4"):
        assert secret not in "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_hour_of_faults_in_minutes(s3, tmp_path: Path) -> None:
    """Many thousand requests: epoch after epoch, other requests failing each time."""
    known = made(tmp_path / "set", f"{s3.url}/set", 9600, 12, "none")
    requests, faults = 0, 0
    for seed in range(12):
        with FaultProxy(s3.options["endpoint_url"], share=0.1, seed=seed) as proxy:
            soak(known, proxy, s3)
            requests += len(proxy.requests)
            faults += sum(proxy.faults.values())
            assert set(proxy.faults) == set(FAULTS)
    assert requests > 10_000 and faults > 900


def test_errors_hold_no_secrets(s3, tmp_path: Path, caplog) -> None:
    """Whatever a store does, neither an error, its traceback, the log nor a state has a secret in it."""
    known = made(tmp_path / "set", f"{s3.url}/set", 64, 1, "none")
    secrets = (s3.options["secret"], s3.options["key"], "Signature=", "AWS4", "hunter2")
    texts: list[str] = []
    with caplog.at_level(logging.DEBUG, "scshards"):
        for kind in (*FAULTS, FLIP, "wrong secret", "wrong key"):
            share = 0.0 if kind.startswith("wrong") else 1.0
            options = s3.options | {
                "wrong secret": {"secret": "hunter2"},
                "wrong key": {"key": "hunter2:x"},
            }.get(kind, {})
            with FaultProxy(s3.options["endpoint_url"], share=0.0, kinds=[kind]) as proxy:
                options["endpoint_url"] = proxy.url
                with pytest.raises(ScshardsError) as caught:
                    if share:
                        loader = loader_of(
                            f"{s3.url}/set", batch_size=8, retries=1, timeout=1.0,
                            storage_options=options, lanes=2,
                        )  # fmt: skip
                        texts.append(str(loader.state_dict()))
                        proxy.share = lambda path, kind=kind: kind if "train/" in path else None
                        list(loader)
                    else:
                        loader_of(f"{s3.url}/set", retries=1, storage_options=options)
            error = caught.value
            texts += [str(error), repr(error), "".join(traceback.format_exception(error))]
    assert len(known.genes) == 64 and len(texts) > 20
    for secret in secrets:
        assert secret not in "\n".join(texts) + caplog.text

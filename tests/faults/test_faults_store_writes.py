"""A store that fails one write in ten, and one read, too: what is written there is what was to be written.

PUT, POST and DELETE are answered with 500 and 503, cut off before, or done without an answer, so that the same
write comes twice. Packs, additions, checkpoints and exports through that are the same bytes as without.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import LOST, WRITE_FAULTS, FaultProxy
from pack_support import counts, quiet_pack, tree_sums, vocab_of, write
from train_support import read_tensors, small_config

from scshards import verify
from scshards.base.access import Access
from scshards.base.errors import StorageError
from scshards.base.retry import Retry
from scshards.base.storage import Storage
from scshards.exporting.export import export
from scshards.exporting.options import ExportOptions
from scshards.packing.pack import append
from scshards.training.loop import train
from scshards.training.save.checkpoint import complete

GENES = 8


@contextlib.contextmanager
def spoiled(
    s3: Any, monkeypatch: pytest.MonkeyPatch, seed: int, share: Any = 0.1
) -> Iterator[FaultProxy]:
    """The environment leads to the store through a proxy that spoils reads and writes."""
    import s3fs

    kinds = ("500", "503", "refuse", "reset")
    with FaultProxy(
        s3.options["endpoint_url"], share=share, seed=seed, kinds=kinds, writes=True
    ) as proxy:
        with monkeypatch.context() as m:
            m.setenv("AWS_ENDPOINT_URL", proxy.url)
            m.setenv("AWS_MAX_ATTEMPTS", "1")  # what is tried again is up to us
            s3fs.S3FileSystem.clear_instance_cache()
            yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


def inputs(folder: Path) -> list[Path]:
    return [
        write(
            folder / f"{i}.h5ad",
            counts(40, GENES, seed=i),
            obs={"donor": [f"d{j % 4}" for j in range(40)]},
        )
        for i in range(2)
    ]


def sums(store: Storage, folder: Path) -> dict[str, str]:
    """SHA-256 of all that is in a store, by way of a folder."""
    here = Storage(folder)
    for name in store.list():
        here.write(name, store.read(name))
    return tree_sums(folder)


QUICK = Access(retry=Retry(retries=30, first_wait=0.01, longest_wait=0.1))


def test_packs_and_additions_are_the_same_bytes(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = inputs(tmp_path)
    options = {"cells_per_shard": 6, "obs": ("donor",), "valid_fraction": 0.3}
    quiet_pack([first], tmp_path / "set", vocab_of(GENES), **options)
    append([second], tmp_path / "set", {"workers": 1}, progress=False)
    scratch = {"scratch": str(tmp_path / "scratch"), "storage_options": QUICK}
    with caplog.at_level(logging.DEBUG, "scshards"), spoiled(s3, monkeypatch, 3) as proxy:
        quiet_pack([first], f"{s3.url}/set", vocab_of(GENES), **options, **scratch)
        append([second], f"{s3.url}/set", {"workers": 1, **scratch}, progress=False)
        done = proxy.faults
        assert done[LOST] and sum(done[kind] for kind in WRITE_FAULTS) > 5
        assert verify(f"{s3.url}/set", QUICK, progress=False).ok
    assert sums(Storage(f"{s3.url}/set"), tmp_path / "found") == tree_sums(tmp_path / "set")
    for secret in (s3.options["secret"], s3.options["key"], "Signature"):
        assert secret not in caplog.text


def test_checkpoints_and_exports_are_the_same(
    s3: Any, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("run.steps=4", "run.save_every=1", "run.eval_every=4", "run.keep_last=2")
    train(shards, tmp_path / "straight", small_config(*settings), shown=False)
    wanted = ExportOptions(to="parquet", max_cells=50, scratch=str(tmp_path))
    export(shards, tmp_path / "cells", wanted, progress=False)
    with spoiled(s3, monkeypatch, 5, 0.1) as proxy:
        # Checkpoints are asked for with the patience of the default.
        place = f"run.checkpoints={s3.url}/run"
        train(shards, tmp_path / "run", small_config(*settings, place), shown=False)
        assert complete(f"{s3.url}/run") == ["step-00000003", "step-00000004"]
        export(shards, f"{s3.url}/cells", wanted, progress=False)
        assert sum(proxy.faults[kind] for kind in WRITE_FAULTS) > 1
    for kind in ("model", "optimizer"):
        mine = read_tensors(f"{s3.url}/run/step-00000004", kind)
        theirs = read_tensors(tmp_path / "straight" / "checkpoints" / "step-00000004", kind)
        assert mine.keys() == theirs.keys() and all(t.equal(theirs[n]) for n, t in mine.items())
    found, cells = (
        sums(Storage(f"{s3.url}/cells"), tmp_path / "found"),
        tree_sums(tmp_path / "cells"),
    )
    # That names the output.
    assert found.keys() == cells.keys()
    assert {n: s for n, s in found.items() if n != "export.json"} == {n: s for n, s in cells.items() if n != "export.json"}  # fmt: skip


def test_a_store_that_takes_no_writes_is_told(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, _) = inputs(tmp_path)
    quick = Access(retry=Retry(retries=2, first_wait=0.01, timeout=60.0))
    options = {"scratch": str(tmp_path / "scratch"), "storage_options": quick}
    with spoiled(s3, monkeypatch, 0, share=lambda path: "503" if "train/" in path else None):
        with pytest.raises(StorageError, match="503") as caught:
            quiet_pack([path], f"{s3.url}/set", vocab_of(GENES), **options)
        assert "train/" in str(caught.value) and caught.value.advice
        text = "".join(traceback.format_exception(caught.value))
        assert not any(s in text for s in (s3.options["secret"], s3.options["key"], "Signature"))
    with pytest.raises(StorageError, match="no complete shard set"):
        verify(f"{s3.url}/set", progress=False)
    options["storage_options"] = QUICK
    quiet_pack([path], f"{s3.url}/set", vocab_of(GENES), **options)
    quiet_pack([path], tmp_path / "set", vocab_of(GENES))
    assert sums(Storage(f"{s3.url}/set"), tmp_path / "found") == tree_sums(tmp_path / "set")


def test_a_store_that_never_answers_a_write_is_given_up(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even that it is ready for the body: no time limit of a client looks at that."""
    impatient = Access(retry=Retry(retries=1, first_wait=0.01, timeout=0.5))
    with spoiled(s3, monkeypatch, 0, share=0.0) as proxy:
        patient, storage = Storage(f"{s3.url}/set"), Storage(f"{s3.url}/set", impatient)
        patient.write("a", b"before")
        proxy.hangs = True
        for write_it in (lambda: storage.write("a", b"x"), lambda: storage.remove("a")):
            with pytest.raises(StorageError, match="no answer in time"):
                write_it()
        proxy.hangs = False
        assert patient.read("a") == b"before"

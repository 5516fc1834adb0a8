"""Inputs on a web server: one that serves parts of files, one that does not, and refusals."""

from __future__ import annotations

import asyncio
import gc
import http.server
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import h5py
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from pack_support import adata, assert_holds, counts, expected, key, quiet_pack, vocab_of, write

from scshards.base import memory, ranges
from scshards.base.access import Access
from scshards.base.errors import ConfigError, SourceError, StorageError
from scshards.base.retry import Retry
from scshards.base.storage import Storage
from scshards.sources.inputs import expand
from scshards.sources.open import input_identity, open_source

pytestmark = pytest.mark.filterwarnings(
    "ignore:zarr v3 autosharding", "ignore:Consolidated metadata"
)


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of a folder; `mode`: "ranges", "whole" (ranges ignored), "none" (and says so), or a status."""

    folder: Path
    mode: str
    fails = False
    sent = 0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        status = int(self.mode) if self.mode.isdigit() else 200 if path.is_file() else 404
        status = 503 if Handler.fails else status
        body = path.read_bytes() if status == 200 else b"no"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        total = len(body)
        if asked and self.mode == "ranges" and status == 200:
            start, end = int(asked[1]), int(asked[2] or total - 1)
            status, body = 206, body[start : end + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        if self.mode != "whole":
            self.send_header("Accept-Ranges", "none" if self.mode == "none" else "bytes")
        self.send_header("Content-Length", str(len(body)))
        if status < 400:
            self.send_header("ETag", '"abc"')
        self.end_headers()
        if with_body:
            Handler.sent += len(body)
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing is said."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """A reader that hangs up is no fault."""


@contextmanager
def serving(folder: Path, mode: str) -> Iterator[str]:
    handler = type("H", (Handler,), {"folder": folder, "mode": mode})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_pack_of_files_on_a_web_server(tmp_path: Path) -> None:
    folder = tmp_path / "www"
    folder.mkdir()
    xs = [counts(30, 6, seed=i) for i in range(3)]
    write(folder / "a.h5ad", xs[0])
    write(folder / "b.h5ad", xs[1], form="csc")
    with anndata.settings.override(zarr_write_format=3):
        adata(sp.csr_matrix(xs[2])).write_zarr(folder / "c.zarr")
    (folder / "l.txt").write_text("b.h5ad\tsecond\nc.zarr/\n")
    with serving(folder, "ranges") as url:
        manifest = quiet_pack(
            [f"{url}/a.h5ad?token=hush", f"{url}/l.txt"], tmp_path / "out", vocab_of(6)
        )
        for name, file in (("a.h5ad", "a.h5ad"), ("c.zarr", "c.zarr/zarr.json")):
            identity = {"size": (folder / file).stat().st_size, "etag": '"abc"'}
            assert input_identity(f"{url}/{name}") == identity
    assert [s.name for s in manifest.sources] == [f"{url}/a.h5ad", "second", f"{url}/c.zarr"]
    genes = [f"G{i:03d}" for i in range(6)]
    want = {
        key(s, i): cell
        for s, x in enumerate(xs)
        for i, cell in enumerate(expected(x, genes, vocab_of(6)))
    }
    assert_holds(tmp_path / "out", want)


def test_a_table_of_token_ids_on_a_web_server(tmp_path: Path) -> None:
    columns = {"genes": [[1, 2], [0]], "expressions": [[3.0, 4.0], [5.0]]}
    for name in ("www/a", "www/b"):
        (tmp_path / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), tmp_path / name / "t.parquet")
    ids = tmp_path / "www/a/gene_vocab.json"
    ids.write_text('{"G000": 0, "G001": 1, "G002": 2}')
    with serving(tmp_path / "www", "ranges") as url:
        quiet_pack(f"{url}/a/t.parquet?token=hush", tmp_path / "a", vocab_of(3))
        with pytest.raises(SourceError, match="nothing says which genes"):
            open_source(f"{url}/b/t.parquet")
        quiet_pack(f"{url}/b/t.parquet", tmp_path / "b", vocab_of(3), ids_vocab=str(ids))
    for name in ("a", "b"):
        assert_holds(tmp_path / name, {key(0, 0): {1: 3, 2: 4}, key(0, 1): {0: 5}})


QUICK = Access(retry=Retry(retries=2, first_wait=0.01))


@pytest.mark.parametrize("mode", ["whole", "none"])
def test_a_server_without_ranges(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 4096)
    write(tmp_path / "a.h5ad", counts(3000, 50))
    with serving(tmp_path, mode) as url, pytest.raises(StorageError) as refused:
        open_source(f"{url}/a.h5ad")
    assert "does not serve parts of files" in str(refused.value)
    assert f"{url}/a.h5ad" in str(refused.value) and "download" in str(refused.value)


def test_addresses_that_fail(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").write_bytes(b"none")
    with serving(tmp_path, "ranges") as url:
        with pytest.raises(StorageError, match="no such file"):
            open_source(f"{url}/none.h5ad")
        with pytest.raises(SourceError, match="not a readable h5ad"):
            open_source(f"{url}/a.h5ad")
        with pytest.raises(SourceError, match="not a readable zarr"):
            open_source(f"{url}/a.zarr")
        for given in (f"{url}/d/", f"{url}/*.h5ad"):
            with pytest.raises(ConfigError, match="can't be listed"):
                expand(given)
    with serving(tmp_path, "403") as url, pytest.raises(StorageError, match=r"denied.* 403"):
        open_source(f"{url}/a.h5ad")
    with pytest.raises(StorageError):
        open_source(f"{url}/a.h5ad", storage_options=QUICK)  # nobody listens any more


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_server_that_fails_midway(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 4096)
    x = counts(2000, 60)
    if kind == "h5ad":
        write(tmp_path / "a.h5ad", x)
    else:
        with anndata.settings.override(zarr_write_format=3):
            adata(x).write_zarr(tmp_path / "a.zarr", chunks=(100, 60))
    with (
        serving(tmp_path, "ranges") as url,
        open_source(f"{url}/a.{kind}", storage_options=QUICK) as source,
    ):
        blocks = source.blocks(max_rows=100, max_values=1000)
        next(blocks)
        Handler.fails = True
        try:
            with pytest.raises(StorageError) as refused:
                list(blocks)
        finally:
            Handler.fails = False
    assert "503" in str(refused.value) and f"{url}/a.{kind}" in str(refused.value)


def test_garbage_of_hdf5_is_collected_while_a_file_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """h5py holds its lock while it waits for bytes, and its objects take it when they go.

    The thread that fetches the bytes met such an object when it collected garbage: both waited for ever.
    """
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(memory, "COLLECT_EVERY_S", 0.01)
    x = counts(500, 60)
    path = write(tmp_path / "a.h5ad", x)
    with h5py.File(path) as local, serving(tmp_path, "ranges") as url:
        gone = threading.Event()

        class Node:
            """Garbage that only a collection finds, and that h5py's lock is needed for."""

        def litter() -> None:
            node = Node()
            node.me, node.dataset = node, local["X/data"]  # type: ignore[attr-defined]
            weakref.finalize(node, gone.set)

        fetched = asyncio.get_running_loop

        def get_running_loop() -> asyncio.AbstractEventLoop:
            gc.collect() if gc.isenabled() else None
            return fetched()

        litter()
        # Each step of a download asks for its loop: there, any allocation may begin a collection.
        monkeypatch.setattr(ranges.asyncio, "get_running_loop", get_running_loop)
        with open_source(f"{url}/a.h5ad", storage_options=QUICK) as source:
            litter()
            gone.clear()
            total = sum(b.data.sum() for b in source.blocks(max_rows=100, max_values=1000))
            assert gone.wait(60), "nobody has collected the garbage"
        assert gc.isenabled()
    assert total == x.sum()


def test_what_was_fetched_goes_with_its_file(tmp_path: Path) -> None:
    """At once, and not when garbage is collected: an atlas has thousands of files."""
    (tmp_path / "a.h5ad").write_bytes(bytes(100))
    with serving(tmp_path, "ranges") as url:
        gc.disable()
        try:
            with Storage(f"{url}/a.h5ad").open() as f:
                assert f.read() == bytes(100)
                gone = weakref.ref(f.raw)
            del f
            assert gone() is None
        finally:
            gc.enable()


def test_a_file_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 reads indices and data in turn; neither may push the other out."""
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 1 << 16)
    x = counts(4000, 200)
    path = write(tmp_path / "a.h5ad", x)
    Handler.sent = 0
    with serving(tmp_path, "ranges") as url, open_source(f"{url}/a.h5ad") as source:
        total = sum(b.data.sum() for b in source.blocks(max_rows=100, max_values=10_000))
    assert total == x.sum()
    assert path.stat().st_size > 8 * ranges.BLOCK_BYTES
    assert Handler.sent < 1.5 * path.stat().st_size

"""Remote reads through a proxy that spoils answers: what is tried again, from where, and what is not."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import FAULTS, MIXED, FaultProxy

from scshards.base.access import Access
from scshards.base.errors import ConfigError, MissingDataError, StorageError
from scshards.base.ranges import Ranges
from scshards.base.retry import Requests, Retry, Stopped
from scshards.base.storage import Storage

SIZE = 400_001
QUICK = Retry(retries=6, timeout=20, first_wait=0.01, longest_wait=0.05)


@pytest.fixture
def data() -> bytes:
    return np.random.default_rng(1).bytes(SIZE)


@pytest.fixture
def proxy(s3, data: bytes) -> Iterator[FaultProxy]:
    """A proxy that spoils nothing yet, before a store with the object `x`."""
    Storage(f"{s3.url}/p").write("x", data)
    with FaultProxy(s3.options["endpoint_url"], share=0.0) as made:
        yield made


def through(proxy: FaultProxy, s3, retry: Retry = QUICK, **options: object) -> Storage:
    return Storage(
        f"{s3.url}/p",
        Access(options=s3.options | {"endpoint_url": proxy.url} | options, retry=retry),
    )


def first(n: int, fault: str):
    """Spoil the first n requests."""
    left = [n]

    def share(path: str) -> str | None:
        left[0] -= 1
        return fault if left[0] >= 0 else None

    return share


@pytest.mark.parametrize("fault", [*FAULTS, MIXED])
def test_each_fault_is_mended(proxy: FaultProxy, s3, data: bytes, fault: str) -> None:
    patient = replace(QUICK, retries=600, timeout=1)
    storage = through(proxy, s3, patient if fault == "stall" else QUICK)
    out = bytearray(SIZE - 1000)
    for read in range(3):
        proxy.share = first(2, fault)
        if read == 0:
            storage.read_into("x", 1000, [memoryview(out)[:7], memoryview(out)[7:]])
            assert out == data[1000:]
        elif read == 1:
            assert storage.read("x") == data
        else:
            assert storage.read("x", 3, SIZE - 3) == data[3:-3]
        assert proxy.faults[fault] == 2 * (read + 1)
        # The HTTP client asks once more by itself where a kept connection was closed.
        assert storage.retried == 2 * (read + 1) or (fault in ("refuse", "stall"))
    if fault in ("reset", "short", "cut"):
        # What was received is not asked for again. A reset may lose what was under way.
        starts = [r.start for r in proxy.requests[:3]]
        assert starts[0] == 1000 and starts[0] <= starts[1] <= starts[2]
        assert fault == "reset" or starts[0] < starts[1] < starts[2]


def test_many_reads_with_many_faults(proxy: FaultProxy, s3, data: bytes) -> None:
    storage = through(proxy, s3, Retry(retries=999, timeout=1, first_wait=0.01, longest_wait=0.05))
    proxy.share, proxy.seed = 0.3, 7
    rng = np.random.default_rng(0)
    ranges = [sorted(rng.integers(0, SIZE, 2).tolist()) for _ in range(120)]

    def read(bounds: list[int]) -> bool:
        start, end = bounds
        out = bytearray(end - start)
        storage.read_into("x", start, [memoryview(out)])
        return out == data[start:end]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, ranges))
    assert storage.retried > 20
    assert set(proxy.faults) == set(FAULTS)


def test_no_more_tries_than_said(proxy: FaultProxy, s3) -> None:
    for retries in (0, 3):
        proxy.requests.clear()
        proxy.share = lambda path: "503"
        storage = through(proxy, s3, Retry(retries=retries, timeout=5, first_wait=0.01))
        with pytest.raises(StorageError) as caught:
            storage.read("x", 0, 10)
        tries = r"1 try" if retries == 0 else rf"{retries + 1} tries in \d s"
        assert caught.match(rf"answered 503 \(Service Unavailable, SlowDown\) \({tries}\)")
        assert f"--retries and --timeout ({retries} and 5 s here)" in str(caught.value)
        assert len(proxy.requests) == retries + 1
        assert f"{s3.url}/p/x" in str(caught.value)


def test_answers_that_stall_are_given_up(proxy: FaultProxy, s3) -> None:
    proxy.share = lambda path: "stall"
    with pytest.raises(StorageError, match=r"no answer in time .*5 tries"):
        through(proxy, s3, Retry(retries=4, timeout=0.2, first_wait=0.01)).read("x")
    # On a busy machine a try may be given up before its request has left.
    assert len(proxy.requests) <= 5


def test_what_trying_again_cannot_mend_is_raised_at_once(
    proxy: FaultProxy, s3, data: bytes
) -> None:
    patient = Retry(retries=50, timeout=200)
    with pytest.raises(MissingDataError, match="no such file"):
        through(proxy, s3, patient).read("none")
    with pytest.raises(StorageError, match="access denied"):
        through(proxy, s3, patient, secret="wr0ng").read("x")
    with pytest.raises(MissingDataError, match="ends early: 1 bytes instead of 5"):
        through(proxy, s3, patient).read_into("x", SIZE - 1, [memoryview(bytearray(5))])
    with pytest.raises(MissingDataError, match="ends early: 0 bytes instead of 5"):
        through(proxy, s3, patient).read("x", SIZE + 10, SIZE + 15)
    assert through(proxy, s3, patient).read_if_there("x", SIZE - 2, SIZE + 5) == data[-2:]
    assert len(proxy.requests) == 5


def test_an_object_that_is_replaced_meanwhile_is_read_again(proxy, s3, data: bytes) -> None:
    other = bytes(reversed(data))

    def share(path: str) -> str | None:
        if len(proxy.requests) == 0:
            return "cut"
        if len(proxy.requests) == 1:
            Storage(f"{s3.url}/p").write("x", other)
        return None

    proxy.share = share
    assert through(proxy, s3).read("x") == other
    assert [r.start > 0 for r in proxy.requests] == [False, True, False]


def test_a_read_that_nobody_waits_for_ends(proxy: FaultProxy, s3) -> None:
    hours = {"timeout": 1e5, "first_wait": 1e4, "longest_wait": 1e5}
    storage = through(proxy, s3, Retry(retries=1000, **hours))
    for fault in ("stall", "503"):
        proxy.requests.clear()
        proxy.share = lambda path, fault=fault: fault
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(storage.read_into, "x", 0, [memoryview(bytearray(SIZE))], stop)
            while not proxy.requests:
                time.sleep(0.02)
            time.sleep(0.3)  # most often it waits by now; it must end in either case
            stop.set()
            with pytest.raises(Stopped):
                job.result(timeout=600)


def test_an_endpoint_where_nobody_listens(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    options = s3.options | {"endpoint_url": "http://127.0.0.1:9"}
    connected = []
    loop, connect = asyncio.SelectorEventLoop, asyncio.SelectorEventLoop.sock_connect

    async def counted(self, sock, address):
        connected.append(address)
        return await connect(self, sock, address)

    monkeypatch.setattr(loop, "sock_connect", counted)
    with pytest.raises(StorageError, match=r"connection failed: \w+ \(4 tries in \d s\)"):
        Storage(s3.url, Access(options=options, retry=Retry(retries=3, first_wait=0.01))).read("x")
    assert connected == [("127.0.0.1", 9)] * 4, "nobody below tries again by himself"


def test_one_line_tells_of_retries_and_no_secret_is_in_it(
    proxy: FaultProxy, s3, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.share, proxy.seed = 0.6, 3
    options = s3.options | {"endpoint_url": proxy.url}
    storage = Storage(
        f"{s3.url}/p",
        Access(options=options, retry=replace(QUICK, retries=500, timeout=0.5)),
    )
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: storage.read("x", i, i + 100), range(12)))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("scshards")]
    assert storage.retried > 5 and len(lines) == 1 and "tried again" in lines[0]
    assert s3.options["secret"] not in caplog.text
    assert "Signature" not in caplog.text


@pytest.mark.parametrize("fault", ["503", "refuse", "cut", "short", "reset", MIXED])
def test_a_web_server_is_read_in_the_same_way(proxy, s3, data: bytes, fault: str) -> None:
    import s3fs

    # An address that was signed is the address of a file on a web server.
    signed = s3fs.S3FileSystem(**s3.options | {"endpoint_url": proxy.url}).sign(f"{s3.url}/p/x")
    storage = Storage(signed, Access(retry=QUICK))
    proxy.share = first(2, fault)
    assert storage.read("") == data
    proxy.share = first(2, fault)
    out = bytearray(SIZE - 7)
    storage.read_into("", 7, [memoryview(out)])
    assert out == data[7:] and sum(proxy.faults.values()) == 4 and 2 <= storage.retried <= 4
    proxy.share = lambda path: "500"
    with pytest.raises(StorageError, match="answered 500") as caught:
        Storage(signed, Access(retry=replace(QUICK, retries=1))).read("", 5, 9)
    assert "Signature" not in str(caught.value)
    proxy.share = 0.0
    with pytest.raises(StorageError, match="answered 403"):
        Storage(signed.replace("/p/x", "/p/none"), Access(retry=QUICK)).read("")


def test_other_file_systems(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    for storage in (Storage("memory://ranges"), Storage(tmp_path)):
        storage.write("x", data)
        assert storage.read("x") == data and storage.read("x", 5, 5) == b""
        out = bytearray(100)
        parts = memoryview(out)
        storage.read_into("x", 50, [parts[:0], parts[:30], parts[30:]])
        assert out == data[50:150]
        with pytest.raises(MissingDataError, match="ends early: 1 bytes"):
            storage.read_into("x", len(data) - 1, [parts])
        assert storage.retried == 0


class Failing:
    """An asynchronous file system that answers every other time."""

    protocol, async_impl = "other", True

    def __init__(self, data: bytes, error: Exception | None) -> None:
        import fsspec.asyn

        self.data, self.error, self.asked = data, error, 0
        self.loop = fsspec.asyn.get_loop()

    async def _cat_file(self, path: str, start: int, end: int | None) -> bytes:
        self.asked += 1
        if self.asked % 2 and self.error is None:
            await asyncio.sleep(60)
        elif self.asked % 2:
            raise self.error
        return self.data[start:end]


@pytest.mark.parametrize(
    ("error", "mended"),
    [
        (ConnectionResetError(), True),
        (OSError(errno.EIO, "I/O"), True),
        (None, True),
        (OSError(errno.ENOSPC, "no space"), False),
        (PermissionError(), False),
    ],
)
def test_an_asynchronous_file_system(error: Exception | None, mended: bool) -> None:
    fs = Failing(b"0123456789", error)
    requests = Requests(replace(QUICK, timeout=1), "other://")
    ranges = Ranges(fs, requests)
    if mended:
        assert ranges.read("x", "other://x", 3, 6).data == b"345"
        assert ranges.read("x", "other://x", 3, None).data == b"3456789"
        assert requests.retried == 2
    else:
        with pytest.raises(OSError):
            ranges.read("x", "other://x", 3, 6)
        assert fs.asked == 1


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"timeout": 0}, {"first_wait": 0}])
def test_options_are_checked(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Retry(**wrong)


def test_nothing_is_collected_on_the_thread_that_fetches(
    proxy: FaultProxy, s3, data: bytes
) -> None:
    """Objects of h5py in a cycle, collected on the loop's thread, would wait for the one who waits."""
    seen: list[bool] = []

    def note(path: str) -> str | None:
        seen.append(gc.isenabled())
        return None

    with through(proxy, s3).open("x") as file:
        proxy.share = note
        assert file.read(1000) == data[:1000]
    assert seen == [False] and gc.isenabled()

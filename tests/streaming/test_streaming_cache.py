"""NodeCache: what is put in comes out, the size is kept, and neither kills nor others do harm."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from scshards.base.errors import ConfigError
from scshards.streaming.read.cache import NodeCache, open_cache

BLOCK = 4096


def a_cache(folder: Path, blocks: int = 100) -> NodeCache:
    with mock.patch("scshards.streaming.read.cache.LEAST_BYTES", BLOCK):
        return NodeCache(folder, blocks * BLOCK)


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def put(cache: NodeCache, name: str, size: int = BLOCK) -> None:
    cache.put(name, memoryview(content(name, size)))


def has(cache: NodeCache, name: str, size: int = BLOCK) -> bool:
    out = bytearray(size)
    found = cache.read_into(name, memoryview(out))
    assert not found or out == content(name, size), name
    return found


def files(cache: NodeCache) -> list[Path]:
    return [p for p in cache.folder.rglob("*") if p.is_file() and p.name != "used"]


def blocks(cache: NodeCache) -> int:
    return sum(-(-p.stat().st_size // BLOCK) for p in files(cache))


def counted(cache: NodeCache) -> int:
    """Blocks in use, by the cache's own count."""
    return int.from_bytes((cache.folder / "used").read_bytes()[:8], "little") // BLOCK


def test_what_is_put_in_comes_out(tmp_path: Path) -> None:
    cache = a_cache(tmp_path)
    sizes = {"aa1": 1, "aa2": BLOCK, "bb1": BLOCK + 1, "cc1": 10_000}
    for name, size in sizes.items():
        assert not has(cache, name, size)
        put(cache, name, size)
        put(cache, name, size)
        assert has(cache, name, size)
    # Another process, or the next run.
    again = a_cache(tmp_path)
    assert all(has(again, name, size) for name, size in sizes.items())
    assert blocks(cache) == counted(cache) == 1 + 1 + 2 + 3
    again.drop("cc1", 10_000)
    again.drop("cc1", 10_000)
    assert not has(cache, "cc1", 10_000) and counted(cache) == blocks(cache) == 4


@pytest.mark.parametrize("is_read_first", [True, False])
@pytest.mark.parametrize("left", [0, 100, 9_999, 20_000])
def test_a_file_of_another_size_is_mended(tmp_path: Path, left: int, is_read_first: bool) -> None:
    """Cut by a crash, or by a hand: a name is a checksum, so another size is not what was put there."""
    cache = a_cache(tmp_path)
    put(cache, "aa", 10_000)
    os.truncate(cache.folder / "aa" / "aa", left)
    if is_read_first:
        assert not has(cache, "aa", 10_000)
        assert not files(cache)
    put(cache, "aa", 10_000)
    assert has(cache, "aa", 10_000) and len(files(cache)) == 1
    # Room that is counted too much is found when room is made.
    assert counted(cache) >= blocks(cache)


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "zero", "random"])
def test_a_count_that_is_lost_is_made_anew(tmp_path: Path, damage: str) -> None:
    cache = a_cache(tmp_path, blocks=20)
    for i in range(15):
        put(cache, f"{i:02d}")
    used = cache.folder / "used"
    if damage == "missing":
        used.unlink()
    else:
        size = {"empty": 0, "short": 5}.get(damage, 16)
        used.write_bytes(bytes(size) if damage == "zero" else content("used", size))
    for i in range(30):
        put(cache, f"x{i:02d}")
        assert blocks(cache) <= 20 and counted(cache) == blocks(cache)
    assert has(cache, "x29")


def of_another_user(monkeypatch: pytest.MonkeyPatch, theirs: set[str], does: str) -> None:
    """Deny what is done to some files, or in some folders, as a kernel does to who is not root."""
    denied = PermissionError(errno.EACCES, "Permission denied")

    def wrapped(real: Callable[..., object], is_last: bool) -> Callable[..., object]:
        def call(*names: object, **more: object) -> object:
            path = Path(str(names[-1 if is_last else 0]))
            if theirs & {path.name, path.parent.name}:
                raise denied
            return real(*names, **more)

        return call

    if does == "read":
        monkeypatch.setattr(Path, "open", wrapped(Path.open, False))
    else:
        monkeypatch.setattr(Path, "unlink", wrapped(Path.unlink, False))
        monkeypatch.setattr(Path, "rename", wrapped(Path.rename, True))
        real = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path).name not in theirs and real(path, mode)
        )
        monkeypatch.setattr(os, "utime", lambda *names, **more: (_ for _ in ()).throw(denied))


def test_what_another_user_alone_may_read_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = a_cache(tmp_path)
    for name in ("aa1", "aa2", "bb"):
        put(cache, name)
    of_another_user(monkeypatch, {"aa1", "aa2"}, "read")
    assert not has(cache, "aa1") and not has(cache, "aa2") and has(cache, "bb")
    put(cache, "cc")
    assert has(cache, "cc"), "the disk is well"
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert str(cache.folder / "aa" / "aa1") in line and "another user" in line


def test_what_another_user_alone_may_write_is_read_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = a_cache(tmp_path, blocks=10)
    for i in range(5):
        put(cache, f"aa{i}")
    of_another_user(monkeypatch, {"aa", *(f"aa{i}" for i in range(6))}, "write")
    assert has(cache, "aa1"), "that it was used can't be noted, and it is right"
    put(cache, "aa5")
    assert not has(cache, "aa5") and not list((cache.folder / "new").iterdir())
    for i in range(20):
        put(cache, f"bb{i:02d}")
        assert has(cache, f"bb{i:02d}") and blocks(cache) <= 10
    assert all(has(cache, f"aa{i}") for i in range(5))
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "another user" in line


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = a_cache(tmp_path, blocks=20)
    for i in range(20):
        put(cache, f"{i:02d}")
        os.utime(cache.folder / f"{i:02d}" / f"{i:02d}", ns=(i, i))
    assert blocks(cache) == 20
    assert all(has(cache, f"{i:02d}") for i in (0, 3, 7))
    put(cache, "new")
    left = {p.name for p in files(cache)}
    assert "new" in left and {"00", "03", "07"} <= left
    gone = sorted({f"{i:02d}" for i in range(20)} - left)
    assert gone == ["01", "02", "04"][: len(gone)] and gone
    assert counted(cache) == blocks(cache) <= 20


def test_a_cache_never_holds_more_than_its_size(tmp_path: Path) -> None:
    cache = a_cache(tmp_path, blocks=13)
    rng = np.random.default_rng(0)
    for i in range(300):
        put(cache, f"{i:04d}", int(rng.integers(1, 5 * BLOCK)))
        assert blocks(cache) <= 13 and counted(cache) == blocks(cache)
    put(cache, "huge", 14 * BLOCK)
    assert not has(cache, "huge", 14 * BLOCK)


def test_who_reads_what_is_evicted_reads_on(tmp_path: Path) -> None:
    cache = a_cache(tmp_path, blocks=4)
    put(cache, "aa", 4 * BLOCK)
    with (cache.folder / "aa" / "aa").open("rb") as f:
        put(cache, "bb", 4 * BLOCK)
        assert not has(cache, "aa", 4 * BLOCK) and has(cache, "bb", 4 * BLOCK)
        assert f.read() == content("aa", 4 * BLOCK)


PROGRAM = """
    import random, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_streaming_cache import BLOCK, a_cache, has, put
    cache = a_cache(Path({folder!r}), blocks=60)
    rng = random.Random(int(sys.argv[1]))
    print("ready", flush=True)
    for _ in range(int(sys.argv[2])):
        i = rng.randrange(40)
        name, size = f"{{i:02d}}", 1 + i * 500
        if not has(cache, name, size):
            put(cache, name, size)
"""


def child(tmp_path: Path, seed: int, rounds: int) -> subprocess.Popen[bytes]:
    program = textwrap.dedent(
        PROGRAM.format(folder=str(tmp_path), tests=str(Path(__file__).parent))
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(seed), str(rounds)], stdout=subprocess.PIPE
    )


def test_processes_share_a_cache_and_may_be_killed(tmp_path: Path) -> None:
    """Each reader checks every byte; the size holds at all times; what the dead left is cleaned up."""
    cache = a_cache(tmp_path, blocks=60)
    steady = [child(tmp_path, seed, 1500) for seed in range(2)]
    rng = random.Random(0)
    doomed = [child(tmp_path, 100 + i, 10**9) for i in range(3)]
    for process in doomed:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        until = time.monotonic() + rng.uniform(0.05, 0.3)
        while time.monotonic() < until:
            total = 0
            for path in files(cache):
                try:
                    total += -(-path.stat().st_size // BLOCK)
                except FileNotFoundError:
                    continue
            # Files that were moved while they were counted are counted twice.
            assert total <= 60 + 10
        process.send_signal(signal.SIGKILL)
    assert [p.wait(timeout=600) for p in steady] == [0, 0]
    for process in (*steady, *doomed):
        process.wait()
        process.stdout.close()
    # Whatever the dead had reserved is found when room is made.
    for i in range(60):
        put(cache, f"x{i:02d}")
    assert counted(cache) == blocks(cache) <= 60
    a_cache(tmp_path, blocks=60)
    assert not list((cache.folder / "new").iterdir())


def test_a_killed_write_is_no_file_and_is_removed(tmp_path: Path) -> None:
    program = f"""
        import os, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_streaming_cache import NodeCache, a_cache, put
        def stop(*names):
            print("ready", flush=True)
            time.sleep(600)
        NodeCache._publish = stop
        put(a_cache(Path({str(tmp_path)!r})), "aa", 10_000)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    cache = a_cache(tmp_path)
    assert len(list((cache.folder / "new").iterdir())) == 1, "its writer lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not has(cache, "aa", 10_000)
    assert not list((a_cache(tmp_path).folder / "new").iterdir())
    assert counted(cache) == 3, "reserved until room is made"
    for i in range(100):
        put(cache, f"{i:03d}")
    assert counted(cache) == blocks(cache) >= 90


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = a_cache(tmp_path, blocks=30)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(200):
                name = f"{rng.randrange(50):02d}"
                if not has(cache, name):
                    put(cache, name)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert counted(cache) == blocks(cache) <= 30


def test_a_full_disk_is_told_once_and_nothing_more_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = a_cache(tmp_path)
    put(cache, "aa")

    def full(*names: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        for name in ("bb", "cc", "dd"):
            put(cache, name)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1 and "the disk is full" in lines[0] and str(tmp_path) in lines[0]
    assert has(cache, "aa") and not has(cache, "bb")
    assert counted(cache) == blocks(cache) == 1 and len(files(cache)) == 1
    put(cache, "bb")
    assert not has(cache, "bb")
    cache.begin()
    put(cache, "bb")
    assert has(cache, "bb") and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [(10**9, 10**9), ("1GB", 10**9), ("1.5 TB", 15 * 10**11), (" 300 mb ", 3 * 10**8), ("400000000", 4 * 10**8)],
)  # fmt: skip
def test_sizes(tmp_path: Path, size: int | str, bytes_: int) -> None:
    cache = open_cache(tmp_path, size)
    assert cache is not None and cache.size == bytes_


@pytest.mark.parametrize("size", ["", "lots", "-1GB", "1 GiB", 1000, -5, "100MB"])
def test_sizes_that_are_none(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ConfigError, match="size"):
        open_cache(tmp_path, size)


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="can't be used") as caught:
        open_cache(tmp_path / "file", "1 GB")
    assert str(tmp_path / "file") in str(caught.value)
    with pytest.raises(ConfigError, match="together"):
        open_cache(tmp_path, None)
    with pytest.raises(ConfigError, match="together"):
        open_cache(None, 10**9)
    assert open_cache(None, None) is None

"""One behaviour on disk, in memory and on S3; atomic writes; no secret in any message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from scshards.base.errors import ConfigError, MissingDataError, OutputExistsError, StorageError
from scshards.base.storage import Storage, is_local, redact


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(tmp_path / "root")
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}/root")
    return Storage(request.getfixturevalue("s3").url + "/some/root")


def message(call: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    return str(caught.value)


def test_write_read_list_remove(store: Storage) -> None:
    assert store.list() == []
    store.write("b/one", b"0123456789")
    store.write("a.json", memoryview(b"{}"))
    store.write("b/c/two", b"")
    assert store.list() == ["a.json", "b/c/two", "b/one"]
    assert store.list("b") == ["b/c/two", "b/one"]
    assert store.list("absent") == []
    assert store.size("b/one") == 10 and store.size("b/c/two") == 0
    assert store.read("b/one") == b"0123456789" and store.read("b/c/two") == b""
    assert store.exists("a.json") and store.exists("b/one") and not store.exists("a")
    store.write("b/one", b"new")
    assert store.read("b/one") == b"new"
    store.remove("b/one")
    store.remove("b/one")
    assert not store.exists("b/one")
    assert store.list() == ["a.json", "b/c/two"]
    store.remove_tree("b")
    assert store.list() == ["a.json"]


def test_ranges(store: Storage) -> None:
    store.write("f", b"0123456789")
    assert store.read("f", 2, 5) == b"234"
    assert store.read("f", 0, 1) == b"0"
    assert store.read("f", 9, 10) == b"9"
    assert store.read("f", 7) == b"789"
    assert store.read("f", 0, 10) == store.read("f")
    assert store.read("f", 0, 0) == store.read("f", 5, 5) == store.read("f", 10) == b""


@pytest.mark.parametrize(
    ("start", "end", "got"), [(5, 20, 5), (10, 20, 0), (15, 20, 0), (0, 11, 10)]
)
def test_a_file_that_ends_early(store: Storage, start: int, end: int, got: int) -> None:
    store.write("d/f", b"0123456789")
    text = message(lambda: store.read("d/f", start, end))
    assert f"ends early: {got} bytes instead of {end - start} from byte {start}" in text
    assert store.at("d/f") in text


def test_what_is_absent(store: Storage) -> None:
    for call in (
        lambda: store.read("no/file"),
        lambda: store.read("no/file", 3, 5),
        lambda: store.size("no/file"),
        lambda: store.open("no/file").read(),
    ):
        text = message(call)
        assert text.startswith("no such file\n") and store.at("no/file") in text


def test_open_seeks(store: Storage) -> None:
    store.write("f", bytes(range(256)) * 100)
    with store.open("f") as f:
        f.seek(1000)
        assert f.read(4) == bytes([232, 233, 234, 235])
        assert f.seek(0, os.SEEK_END) == 25600


def test_deeper_roots_and_other_openings_see_each_other(store: Storage) -> None:
    child = Storage(f"{store.url}/train", store.options)
    assert child.list() == []
    store.write("train/x", b"1")
    assert child.list() == ["x"] and child.read("x") == b"1"
    # Another process would open the store anew: no listing may have been kept from before.
    other = Storage(store.url)
    assert other.list() == ["train/x"]
    child.write("y", b"2")
    assert other.list() == ["train/x", "train/y"] and other.exists("train/y")


def test_local_addresses(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", str(tmp_path) + "/"):
        store = Storage(url)
        store.write("f", b"1")
        assert store.is_local and (tmp_path / "f").read_bytes() == b"1"
    assert Storage(tmp_path).at("a/b") == f"{tmp_path}/a/b"
    assert oct((tmp_path / "f").stat().st_mode & 0o777) == "0o644"


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    store = Storage(tmp_path)
    store.write("d/x", b"1")
    assert "directory" in message(lambda: store.read("d")).lower()
    assert "File exists" in message(lambda: store.write("d/x/y", b"1"))
    assert "no such file" in message(lambda: store.remove_tree("absent"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "access denied" in message(lambda: Storage(tmp_path).write("locked/x", b"1"))


def test_a_read_that_brings_little_at_a_time_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = Storage(tmp_path), bytes(range(200))
    store.write("f", data)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, out, at: whole(f, [out[0][:3]], at))
    out = memoryview(bytearray(100))
    store.read_into("f", 7, [out[:10], out[10:]])
    assert out == data[7:107]
    with pytest.raises(MissingDataError, match="99 bytes instead of 100"):
        store.read_into("f", 101, [out])


# --- atomic writes ---------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Storage(tmp_path)
    store.write("f", b"old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space left on device" in message(lambda: store.write("f", b"new" * 1000))
    assert store.read("f") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_that_another_begins_meanwhile_is_no_file(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first file is written between the two requests of one listing."""
    import s3fs

    store = Storage(f"{s3.url}/begun", s3.options)
    listed, lists = s3fs.S3FileSystem._lsdir, []

    async def early(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        lists.append(path)
        return await listed(self, path, *args, **kwargs) if len(lists) > 1 else []

    store.write("a.json", b"{}")
    monkeypatch.setattr(s3fs.S3FileSystem, "_lsdir", early)
    assert (store.list(), store.list()) == ([], ["a.json"])


def test_a_killed_write_leaves_the_old_file_and_is_not_listed(tmp_path: Path) -> None:
    store = Storage(tmp_path)
    store.write("f", b"old")
    # The child is killed when its new bytes are on disk and only the renaming is left.
    program = f"""
        import os, time
        from scshards.base.storage import Storage
        def stop(*names):
            print("ready", flush=True)
            time.sleep(600)
        os.replace = stop
        Storage({str(tmp_path)!r}).write("f", b"new" * 1000)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(list(tmp_path.iterdir())) == 2, "the temporary file is there"
    assert store.list() == ["f"] and store.read("f") == b"old"


def test_readers_see_whole_files_only(tmp_path: Path) -> None:
    store = Storage(tmp_path)
    store.write("f", b"\0" * 300_000)
    program = f"""
        from scshards.base.storage import Storage
        for i in range(200):
            Storage({str(tmp_path)!r}).write("f", bytes([i]) * 300_000)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    reads = 0
    while child.poll() is None:
        data = store.read("f")
        assert len(data) == 300_000 and data == data[:1] * 300_000
        reads += 1
    assert child.wait() == 0 and reads > 10


# --- messages --------------------------------------------------------------------------------

SECRETS = [
    ("s3://key:hunter2@bucket/p", "s3://bucket/p"),
    ("s3://AKIA:hunt/er2+x=@bucket/p", "s3://bucket/p"),
    ("s3://key:p@hunter2@bucket/p", "s3://bucket/p"),
    ("https://host:8080/p?X-Amz-Signature=hunter2", "https://host:8080/p"),
    ("https://u:hunter2@host:8080/a@b", "https://host:8080/a@b"),
    ("simplecache::s3://key:hunter2@bucket/p", "simplecache::s3://bucket/p"),
    ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
    ("https://host:8080/a@b", "https://host:8080/a@b"),
    ("/data/user@host:x?y", "/data/user@host:x?y"),
]


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_redact(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_an_unknown_scheme_says_so_without_the_secret() -> None:
    text = message(lambda: Storage("nosuch://key:hunter2@bucket/p"))
    assert "nosuch://bucket/p" in text and "hunter2" not in text


def test_memory_addresses_never_show_what_is_redacted() -> None:
    store = Storage("memory://user:hunter2@place/p?token=hunter2")
    for call in (lambda: store.read("x"), lambda: store.size("x")):
        assert "hunter2" not in message(call)
    assert store.at("x") == "memory://place/p/x"


def test_wrong_credentials_on_s3(s3) -> None:
    for change in ({"secret": "hunter2"}, {"key": "nobody:x"}):
        store = Storage(s3.url + "/p", s3.options | change)
        for call in (
            lambda store=store: store.exists("x"),
            lambda store=store: store.read("x"),
            lambda store=store: store.list(),
            lambda store=store: store.write("x", b"1"),
        ):
            text = message(call)
            assert "access denied" in text and "credentials" in text
            for secret in ("hunter2", "nobody", s3.options["secret"]):
                assert secret not in text


def test_absent_bucket_on_s3(s3) -> None:
    store = Storage("s3://no-such-bucket/p")
    for call in (
        lambda: store.write("x", b"1"),
        lambda: store.read("x"),
        lambda: store.open("x"),
        lambda: store.list(),
        lambda: store.folder(),
        lambda: store.identity(),
    ):
        assert message(call).startswith("there is no such bucket\n")
    assert not store.exists("x")


def test_no_credentials_for_s3(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    text = message(lambda: Storage(s3.url).exists("x"))
    assert "no credentials for this store" in text and "AWS_" in text and "each worker" in text


def test_a_storage_option_that_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        Storage("s3://bucket/p", {"sekret": "hunter2"}).exists("x")
    assert "no option 'sekret'" in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["a::b", "x/zip::y.bin", "::", "s3::x"])
def test_keys_with_colons(s3, key: str) -> None:
    store = Storage(f"{s3.url}/a::b")
    store.write(key, b"1")
    assert store.read(key) == b"1" and store.list() == [key]
    assert Storage(f"{s3.url}/a::b/{key}").identity()["size"] == 1
    assert Storage(s3.url).list() == [f"a::b/{key}"]


@pytest.mark.parametrize(
    ("url", "local"),
    [("/a/b", True), ("a:b", True), ("file:///a", True), ("s3://b/p", False), ("memory://x", False), ("simplecache::s3://b", False)],
)  # fmt: skip
def test_is_local(url: str, local: bool) -> None:
    assert is_local(url) is local


def test_replaced_only_where_it_is_what_was_seen(store: Storage) -> None:
    store.replace("m", None, b"one")
    with pytest.raises(OutputExistsError, match="somebody else"):
        store.replace("m", None, b"two")
    with pytest.raises(OutputExistsError, match="somebody else"):
        store.replace("m", b"another", b"two")
    assert store.read("m") == b"one"
    store.replace("m", b"one", b"two")
    assert store.read("m") == b"two"
    store.remove("m")
    with pytest.raises(OutputExistsError, match="somebody else"):
        store.replace("m", b"two", b"three")
    assert not store.exists("m")


@pytest.mark.parametrize("status", [412, 409])
@pytest.mark.parametrize("old", [None, b"old"])
def test_who_comes_between_looking_and_writing_wins(
    s3, monkeypatch: pytest.MonkeyPatch, old: bytes | None, status: int
) -> None:
    """As Ceph and S3 answer; Swift knows no If-Match, and its If-None-Match is not atomic."""
    from botocore.exceptions import ClientError

    store = Storage(s3.url)
    if old is not None:
        store.write("m", old)
    asked: list[dict[str, object]] = []

    def between(self: object, method: str, **values: object) -> None:
        asked.append(values)
        Storage(s3.url).write("m", b"theirs")
        error = OSError(22, "refused")
        answer = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": "x"}}
        raise error from ClientError(answer, "PutObject")

    monkeypatch.setattr("s3fs.S3FileSystem.call_s3", between)
    with pytest.raises(OutputExistsError, match="somebody else"):
        store.replace("m", old, b"ours")
    assert len(asked) == 1 and ("IfMatch" if old else "IfNoneMatch") in asked[0]
    assert store.read("m") == b"theirs"


def test_file_systems_of_other_code_stay_as_they_are(s3, tmp_path: Path) -> None:
    others = fsspec.filesystem("s3", **s3.options)
    root = s3.url.removeprefix("s3://")
    others.pipe_file(f"{root}/a", b"1")
    others.ls(root)
    before, listed = dict(vars(others)), dict(others.dircache)
    assert listed
    store = Storage(s3.url, s3.options)
    store.write("b", b"2")
    assert store.list() == ["a", "b"] and store.read("b") == b"2" and store.size("a") == 1
    assert fsspec.filesystem("s3", **s3.options) is others
    assert dict(vars(others)) == before and dict(others.dircache) == listed
    # Connections are used again all the same.
    again = Storage(f"{s3.url}/deeper", s3.options)
    assert again._fs is store._fs and again._ranges.fs is store._ranges.fs
    memory = fsspec.filesystem("memory")
    before = dict(vars(memory))
    Storage("memory://x/y").write("a", b"1")
    assert fsspec.filesystem("memory") is memory and dict(vars(memory)) == before

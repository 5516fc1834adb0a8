"""Storage beside whole files: folders, identities, files that may be absent, remote files that fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from scshards.base.errors import ConfigError, StorageError
from scshards.base.remote import Refused, code_in, temporary, translated, version
from scshards.base.storage import Storage


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A root with a.bin, d/b.bin and d/e/c.bin."""
    if request.param == "local":
        made = Storage(tmp_path)
    elif request.param == "memory":
        made = Storage(f"memory://{tmp_path.name}")
    else:
        made = Storage(f"{request.getfixturevalue('s3').url}/root")
    for path in ("a.bin", "d/b.bin", "d/e/c.bin"):
        made.write(path, path.encode())
    return made


def test_one_level_of_a_folder(storage: Storage) -> None:
    assert storage.folder() == (["d"], ["a.bin"])
    assert storage.folder("d") == (["e"], ["b.bin"])
    assert storage.folder("d/e") == ([], ["c.bin"])
    storage.write("d/new.bin", b"")
    assert storage.folder("d") == (["e"], ["b.bin", "new.bin"])


def test_a_folder_that_is_absent(storage: Storage) -> None:
    if storage.is_local:
        with pytest.raises(StorageError, match="no such"):
            storage.folder("none")
    else:
        assert storage.folder("none") == ([], [])


def test_a_file_that_may_be_absent(storage: Storage) -> None:
    assert storage.read_if_there("d/b.bin") == b"d/b.bin"
    assert storage.read_if_there("d/b.bin", 2) == b"b.bin"
    assert storage.read_if_there("d/b.bin", 2, 5) == b"b.b"
    assert storage.read_if_there("d/b.bin", 2, 500) == b"b.bin"
    assert storage.read_if_there("none") is None
    assert storage.read_if_there("none", 3, 9) is None
    assert storage.read_if_there("a.bin/none") is None


def test_an_identity_changes_with_the_file(storage: Storage) -> None:
    file = Storage(f"{storage.url}/a.bin")
    before, folder = file.identity(), storage.identity()
    assert before["size"] == 5 and folder["files"] == 3 and folder["size"] == 5 + 7 + 9
    assert (file.identity(), storage.identity()) == (before, folder)
    storage.write("a.bin", b"12345")
    if storage.is_local:
        os.utime(Path(storage.url) / "a.bin", ns=(1, 1))
    assert file.identity() != before
    storage.write("d/more.bin", b"")
    assert storage.identity()["files"] == 4
    with pytest.raises(StorageError, match="no such"):
        Storage(f"{storage.url}/none").identity()


def test_an_open_file_is_read_anywhere(storage: Storage) -> None:
    with storage.open("d/e/c.bin") as f:
        assert f.read(3) == b"d/e" and f.tell() == 3
        assert f.seek(-3, os.SEEK_END) == 6 and f.read() == b"bin"
        buffer = bytearray(4)
        f.seek(1)
        assert f.readinto(buffer) == 4 and bytes(buffer) == b"/e/c"  # type: ignore[attr-defined]


def test_what_file_systems_call_a_version() -> None:
    assert version({"ETag": '"a"', "LastModified": 3, "size": 1}) == {
        "etag": '"a"',
        "modified": "3",
    }
    assert version({"Last-Modified": "Monday", "etag": ""}) == {"modified": "Monday"}
    assert version({}) == {}


def _named(module: str, **attributes: Any) -> Exception:
    made = type("ClientError", (Exception,), {"__module__": module})("secret")
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def _s3(status: int, code: str) -> Exception:
    response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}
    return _named("botocore.exceptions", response=response)


def _by_s3fs(error: Exception, status: int, code: str) -> Exception:
    error.__cause__ = _s3(status, code)
    return error


TOLD = [
    (FileNotFoundError("x"), "no such file", False),
    (_by_s3fs(FileNotFoundError("x"), 404, "NoSuchBucket"), "there is no such bucket", False),
    (_by_s3fs(FileNotFoundError("x"), 404, "NoSuchKey"), "no such file", False),
    (PermissionError("x"), "access denied", False),
    (_by_s3fs(PermissionError("x"), 403, "InvalidAccessKeyId"), "denied: .* 403 .*InvalidAccessKeyId", False),
    (_by_s3fs(PermissionError("x"), 403, "ExpiredToken"), "have expired", False),
    (Refused(403, "Expired"), "have expired.* 403", False),
    (Refused(401), r"denied: the server answered 401 \(Unauthorized\)", False),
    (Refused(404), "no such file", False),
    (Refused(503), r"answered 503 \(Service Unavailable\)", True),
    (Refused(429), r"answered 429 \(Too Many Requests\)", True),
    (Refused(501), "answered 501", False),
    (_s3(503, "SlowDown"), "answered 503 .*SlowDown", True),
    (_s3(400, "RequestTimeout"), "answered 400 .*RequestTimeout", True),
    (_s3(400, "InvalidArgument"), "answered 400 .*InvalidArgument", False),
    (TimeoutError(), "TimeoutError", True),
    (_named("aiohttp.client"), "no answer: ClientError", False),
    (_named("botocore.exceptions"), "object store failed \\(ClientError", False),
]  # fmt: skip


@pytest.mark.parametrize(("error", "said", "passes"), TOLD)
def test_what_is_told_of_an_error(error: Exception, said: str, passes: bool) -> None:
    with pytest.raises(StorageError, match=said) as refused, translated("s3://b/x"):
        raise error
    assert refused.value.where == "s3://b/x" and "secret" not in str(refused.value)
    assert (temporary(error) is not None) is passes


def test_the_codes_in_the_bodies_of_answers() -> None:
    assert code_in(b"<Error><Code>AccessDenied</Code><Key>k</Key></Error>") == "AccessDenied"
    expired = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    assert code_in(expired) == "Expired"
    azure = b"<Code>AuthenticationFailed</Code>Signature not valid in the specified time frame"
    assert code_in(azure) == "Expired"
    assert code_in(b"<html>no</html>") is None and code_in(b"") is None


def test_other_errors_are_bugs_and_stay() -> None:
    with pytest.raises(ZeroDivisionError), translated("here"):
        raise ZeroDivisionError
    with pytest.raises(ConfigError, match="no option 'colour'"), translated("here"):
        raise TypeError("f() got an unexpected keyword argument 'colour'")

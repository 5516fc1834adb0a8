"""What file systems, stores and web servers answer, in scshards' words: what passes and what does not.

Their messages may hold credentials: all that is told of them is a status, a code, a class name.
"""

from __future__ import annotations

import contextlib
import errno
import http
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from scshards.base.errors import ConfigError, MissingDataError, StorageError


class Refused(Exception):
    """A web server's answer that is not what was asked for: its status, and its body's code, if any."""

    def __init__(self, status: int, code: str | None = None) -> None:
        self.status, self.code = status, code
        super().__init__(f"{status} {code or ''}")


class Spoiled(Exception):
    """An answer that is not whole, in words: another may be."""


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what file systems raise into a StorageError; `where` has no credentials in it."""
    try:
        yield
    except StorageError:
        raise
    except Exception as e:
        told = _told(e, where)
        if told is None:
            raise
        raise told from (e if isinstance(e, OSError) and not answer_of(e)[0] else None)


def _told(error: Exception, where: str) -> Exception | None:
    """What a user is told of an error; None when it is a bug."""
    status, code = answer_of(error)
    if code == "NoSuchBucket":
        return MissingDataError(
            "there is no such bucket", where=where, advice="check the address and the endpoint"
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
        return MissingDataError("no such file", where=where, advice="check the address")
    if isinstance(error, PermissionError) or status in (401, 403):
        return _denied(status, code, where)
    if isinstance(error, TypeError):
        # File systems connect late, so that an option they do not know comes out here.
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        return unknown and ConfigError(
            f"the storage knows no option {unknown[1]!r}",
            where=where,
            advice="correct --storage-options; options that are not for all addresses stand in a "
            'table named by how theirs begin: {"s3://": {...}}',
        )
    name, library = type(error).__name__, type(error).__module__.partition(".")[0]
    advice: str | None = _CHECK
    if status is not None:
        what = answered(status, code)
    elif _host_is_unknown(error):
        what = "there is no such host"
    elif isinstance(error, OSError):
        what, advice = f"the storage failed: {error.strerror or name}", advised(error)
    elif library == "aiohttp":
        what = f"no answer: {name}"
    elif library in ("botocore", "aiobotocore"):
        lacks = name in ("NoCredentialsError", "PartialCredentialsError")
        what = "there are no credentials for this store" if lacks else "the object store failed"
        what, advice = f"{what} ({name})", _CREDENTIALS
    else:
        return None
    return StorageError(what, where=where, advice=advice)


_CHECK = "check the address, and that it can be read from here"
_CREDENTIALS = (
    "check endpoint, region and credentials: AWS_* variables or a profile where scshards runs, on each "
    "worker too, or --storage-options @FILE"
)


def advised(error: OSError) -> str:
    """What to do about a disk that fails, or is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there, then run the same command again"
    return "check the disk and its permissions, then run the same command again"


def _denied(status: int | None, code: str | None, where: str) -> StorageError:
    if status is None and "://" not in where:
        return StorageError("access denied", where=where, advice="check the permissions")
    said = f": {answered(status, code)}" if status else f" ({code})" if code else ""
    if code and "expired" in code.lower():
        return StorageError(
            f"access denied, as the credentials or the signed address have expired{said}",
            where=where,
            advice="get new credentials, or have the address signed again",
        )
    return StorageError(f"access denied{said}", where=where, advice=_CREDENTIALS)


def answered(status: int, code: str | None = None) -> str:
    """A status in words: the server answered 503 (Service Unavailable)."""
    try:
        words = http.HTTPStatus(status).phrase
    except ValueError:
        words = ""
    # S3 says a bare status for its code where an answer has no body.
    if code and not code.isdigit() and code.lower() != words.replace(" ", "").lower():
        words = f"{words}, {code}" if words else code
    return f"the server answered {status}{f' ({words})' if words else ''}"


def answer_of(error: BaseException | None) -> tuple[int | None, str | None]:
    """The HTTP status that an error stands for, and a word for it such as NoSuchBucket, if any."""
    status: Any = None
    code: Any = None
    while error is not None:
        said = getattr(error, "response", None)
        if isinstance(said, Mapping):
            here = said.get("ResponseMetadata", {}).get("HTTPStatusCode")
            word = said.get("Error", {}).get("Code")
        else:
            # aiohttp and gcsfs, and azure's client
            names = ("status", "code", "status_code")
            here = next((getattr(error, n) for n in names if hasattr(error, n)), None)
            word = getattr(error, "code", None)
        if status is None and isinstance(here, int) and 100 <= here < 600:
            status = here
        if code is None and isinstance(word, str) and re.fullmatch(r"[\w.]{1,60}", word):
            code = word
        error = error.__cause__
    return status, code


def code_in(body: bytes) -> str | None:
    """The code in an answer's body: of S3, GCS and Azure in XML; that of what has expired first."""
    found = re.search(rb"<Code>([\w.]{1,60})</Code>", body)
    if re.search(rb"(?i)\bexpired\b|specified time ?frame", body):
        return "Expired"
    return found[1].decode() if found else None


def temporary(error: Exception) -> str | None:
    """What went wrong, in a few words without credentials, when trying again may mend it; else None."""
    if isinstance(error, StorageError | FileNotFoundError | PermissionError | FileExistsError):
        return None
    if isinstance(error, Spoiled):
        return str(error)
    names = {c.__name__ for c in type(error).__mro__}
    if names & _NOT_MENDED:
        return None
    if isinstance(error, TimeoutError) or names & {"ReadTimeoutError", "ConnectTimeoutError"}:
        return "no answer in time"
    if _host_is_unknown(error):
        return None
    if isinstance(error, ConnectionError | EOFError) or names & _CUT:
        return f"the connection failed: {type(error).__name__}"
    status, code = answer_of(error)
    if status is not None:
        is_passing = status in _PASSING or (status >= 500 and status not in _LASTING)
        return answered(status, code) if is_passing or code in _PASSING_CODES else None
    if isinstance(error, OSError) and error.errno in _CUT_ERRNOS:
        return f"the connection failed: {error.strerror}"
    return None


# Too slow, too early, too many; and answers of 500 and above that stay what they are.
_PASSING, _LASTING = (408, 425, 429), (501, 505)
_PASSING_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}

# Of aiohttp and botocore, which base does not import.
_CUT = {
    "ClientConnectionError", "ClientPayloadError", "EndpointConnectionError", "HTTPClientError",
    "IncompleteReadError", "ProxyConnectionError", "ResponseParserError",
    "CredentialRetrievalError", "MetadataRetrievalError",
}  # fmt: skip
_NOT_MENDED = {"SSLError", "ClientSSLError"}
_CUT_ERRNOS = {
    errno.EIO, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EBUSY, errno.EAGAIN
}  # fmt: skip


def _host_is_unknown(error: BaseException) -> bool:
    """Whether a name server was asked and knows no such host: of aiohttp, alone or within botocore's."""
    inner = getattr(error, "kwargs", {}).get("error", error)
    cause = getattr(inner, "os_error", None)
    return isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME


def no_ranges(where: str) -> StorageError:
    """The error for a server that sends whole files only."""
    return StorageError(
        "the server does not serve parts of files (HTTP range requests)",
        where=where,
        advice="download the file and name the copy",
    )


def version(info: Mapping[str, Any]) -> dict[str, str]:
    """What a file system says of an object's version, under whatever names it has for that."""
    names = {
        "etag": ("ETag", "etag"),
        "modified": ("LastModified", "Last-Modified", "last_modified", "mtime", "created"),
    }
    found = {
        key: next((info[n] for n in known if info.get(n)), None) for key, known in names.items()
    }
    return {key: str(value) for key, value in found.items() if value is not None}

"""What fsspec's file systems raise and say, in scshards' words. Called by base.storage, base.ranges."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from scshards.base.errors import ConfigError, MissingDataError, StorageError


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what file systems raise into a StorageError; `where` has no credentials in it."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError:
        raise MissingDataError(
            "no such file or bucket", where=where, advice="check the address"
        ) from None
    except PermissionError:
        raise StorageError(
            "access denied",
            where=where,
            advice="check the permissions, or the AWS credentials and endpoint in the environment",
        ) from None
    except OSError as e:
        raise StorageError(
            f"the storage failed: {e.strerror or type(e).__name__}", where=where
        ) from e
    except TypeError as e:
        # File systems connect late, so that an option they do not know comes out here.
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(e))
        if unknown is None:
            raise
        raise ConfigError(
            f"the storage knows no option {unknown[1]!r}",
            where=where,
            advice="correct --storage-options",
        ) from None
    except Exception as e:
        # botocore's and aiohttp's errors are not OSErrors; their class name is all that is
        # certain to be free of credentials.
        if type(e).__module__.split(".")[0] == "aiohttp":
            status = getattr(e, "status", None)
            raise StorageError(
                f"the server answered {status}" if status else f"no answer: {type(e).__name__}",
                where=where,
                advice="check the address, and that it can be read from here",
            ) from None
        if type(e).__module__.split(".")[0] in ("botocore", "aiobotocore"):
            raise StorageError(
                f"the object store failed: {type(e).__name__}",
                where=where,
                advice="check endpoint, region and credentials (AWS_* variables or a profile)",
            ) from None
        raise


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error stands for, if any."""
    while error is not None:
        said = getattr(error, "response", None)
        if isinstance(said, Mapping):
            status = said.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            # aiohttp and gcsfs, and azure's client
            names = ("status", "code", "status_code")
            status = next((getattr(error, n) for n in names if hasattr(error, n)), None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
        error = error.__cause__
    return None


def temporary(error: Exception) -> str | None:
    """What went wrong, in a few words without credentials, when trying again may mend it; else None."""
    if isinstance(error, StorageError | FileNotFoundError | PermissionError | FileExistsError):
        return None
    names = {c.__name__ for c in type(error).__mro__}
    if names & _NOT_MENDED:
        return None
    if isinstance(error, TimeoutError) or names & {"ReadTimeoutError", "ConnectTimeoutError"}:
        return "no answer in time"
    if isinstance(error, ConnectionError | EOFError) or names & _CUT:
        return f"the connection failed: {type(error).__name__}"
    status = status_of(error)
    if status is not None:
        is_passing = status in _PASSING or (status >= 500 and status not in _LASTING)
        return f"the server answered {status}" if is_passing else None
    if isinstance(error, OSError) and error.errno in _CUT_ERRNOS:
        return f"the connection failed: {error.strerror}"
    return None


# Too slow, too early, too many; and answers of 500 and above that stay what they are.
_PASSING, _LASTING = (408, 425, 429), (501, 505)

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


class RemoteFile(io.RawIOBase):
    """A remote file whose errors are StorageErrors."""

    def __init__(self, stream: Any, where: str) -> None:
        self._stream, self._where = stream, where

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        with translated(self._where):
            try:
                data = self._stream.read(len(buffer))
            except ValueError:
                # fsspec's word for an answer that is not the part that was asked for.
                raise no_ranges(self._where) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


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

"""What fsspec's file systems raise and say, in scshards' words. Called by base.storage."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from scshards.base.errors import ConfigError, StorageError


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what file systems raise into a StorageError; `where` has no credentials in it."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError:
        raise StorageError(
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

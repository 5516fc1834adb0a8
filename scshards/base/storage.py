"""Files and objects behind one face: local paths and any fsspec URL (s3://, ...).

A `Storage` is a root; every path given to it is relative to that root. Writes are atomic: a reader
sees the whole file or none. Errors come out as StorageError and never carry credentials. This is
the only module that knows fsspec. Called by shards, pack, stream and train.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from scshards.base.errors import ConfigError, MissingDataError, StorageError
from scshards.base.ranges import Ranges
from scshards.base.remote import RemoteFile, no_ranges, translated, version
from scshards.base.retry import Retry

BLOCK_BYTES, BLOCKS = 1 << 22, 8
"""Remote files are read in blocks of so many bytes, of which each open file keeps so many."""

_TEMPORARY = ".tmp"
_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*(::|://)")


class Storage:
    """A root folder on disk or a prefix in an object store.

    Parameters
    ----------
    url
        A local path or an fsspec URL such as ``s3://bucket/prefix``.
    options
        What the fsspec file system is made with. For S3, endpoint, region and credentials come from
        the usual AWS environment variables and profiles when they are not given here.
    retry
        How remote reads that fail are tried again.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        options: Mapping[str, Any] | None = None,
        *,
        retry: Retry | None = None,
    ):
        self.url = os.fspath(url)
        self._shown = redact(self.url).rstrip("/")
        self.options = dict(options or {})
        self.is_local = is_local(self.url)
        self._fs: Any
        self._ranges: Ranges | None
        if self.is_local:
            self._root = str(path_of(self.url).absolute())
            self._fs = self._ranges = None
        else:
            import fsspec

            with translated(redact(self.url)):
                try:
                    self._fs, self._root = fsspec.core.url_to_fs(self.url, **self.options)
                except (ValueError, ImportError, TypeError) as e:
                    raise StorageError(
                        f"no file system for this address: {e}",
                        where=redact(self.url),
                        advice="give a local path or an fsspec URL such as s3://bucket/prefix",
                    ) from None
                # A listing that was cached before somebody else wrote would hide new files.
                self._fs.use_listings_cache = False
                self._ranges = Ranges(self._fs, retry or Retry(), redact(self.url))
        self._root = self._root.rstrip("/") or "/"

    def at(self, path: str) -> str:
        """The full address of a relative path, without credentials, for messages."""
        return f"{self._shown}/{path}" if path else self._shown

    @property
    def local_path(self) -> Path | None:
        """Where the root is on this machine, absolute; None when it is in a store."""
        return Path(self._root) if self.is_local else None

    @property
    def retried(self) -> int:
        """Remote reads that were tried again so far."""
        return self._ranges.tally.retried if self._ranges is not None else 0

    def exists(self, path: str) -> bool:
        with translated(self.at(path)):
            if self.is_local:
                return Path(self._full(path)).exists()
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._full(path)))

    def list(self, path: str = "") -> list[str]:
        """Relative paths of all files below `path`, sorted; empty when there is none.

        What a write that was killed has left behind is not among them.
        """
        full = self._full(path)
        with translated(self.at(path)):
            if self.is_local:
                root = Path(self._root)
                found = (p for p in Path(full).rglob("*") if p.is_file())
                return sorted(p.relative_to(root).as_posix() for p in found if not _is_temporary(p))
            self._fs.invalidate_cache()
            try:
                names = self._fs.find(full)
            except FileNotFoundError:
                return []
            return sorted(n[len(self._root) :].lstrip("/") for n in names)

    def folder(self, path: str = "") -> tuple[Sequence[str], Sequence[str]]:
        """The names of the folders and of the files right in a folder, sorted."""
        full = self._full(path)
        with translated(self.at(path)):
            if self.is_local:
                entries = [(p.name, p.is_dir()) for p in Path(full).iterdir()]
            else:
                self._fs.invalidate_cache()
                try:
                    found = self._fs.ls(full, detail=True)
                except FileNotFoundError:
                    found = []
                # Some stores list the folder itself, as an object without a name.
                entries = [
                    (e["name"].rstrip("/").rpartition("/")[2], e["type"] == "directory")
                    for e in found
                    if e["name"].strip("/") != full.strip("/")
                ]
        return (
            sorted({name for name, is_folder in entries if is_folder}),
            sorted(name for name, is_folder in entries if not is_folder),
        )

    def identity(self) -> dict[str, Any]:
        """What tells one state of the root from another without reading it, ready for JSON.

        A local file: size and mtime_ns. An object: size, and what its store says of its version (an
        ETag or the time of the last change). A folder: files, their size, and the newest time.
        """
        with translated(self.at("")):
            if self.is_local:
                root = Path(self._root)
                if not root.is_dir():
                    stat = root.stat()
                    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
                stats = [p.stat() for p in root.rglob("*") if p.is_file()]
                return {
                    "files": len(stats),
                    "size": sum(s.st_size for s in stats),
                    "mtime_ns": max((s.st_mtime_ns for s in stats), default=0),
                }
            self._fs.invalidate_cache()
            info = self._fs.info(self._root)
            if info["type"] != "directory":
                return {"size": info.get("size"), **version(info)}
            infos = list(self._fs.find(self._root, detail=True).values())
            times = [version(i).get("modified", "") for i in infos]
            return {
                "files": len(infos),
                "size": sum(i.get("size") or 0 for i in infos),
                "modified": max(times, default=""),
            }

    def size(self, path: str) -> int:
        with translated(self.at(path)):
            if self.is_local:
                return Path(self._full(path)).stat().st_size
            return int(self._fs.size(self._full(path)))

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file; MissingDataError when fewer are there."""
        data = self._read(path, start, end)
        if end is not None and len(data) != end - start:
            raise self._ends_early(path, start, len(data), end - start)
        return data

    def read_if_there(self, path: str, start: int = 0, end: int | None = None) -> bytes | None:
        """As `read`, but fewer bytes when the file ends early, and None when there is no such file."""
        with contextlib.suppress(MissingDataError):
            return self._read(path, start, end)
        return None

    def read_into(
        self,
        path: str,
        start: int,
        parts: Sequence[memoryview],
        stop: threading.Event | None = None,
    ) -> None:
        """Fill buffers (bytes, writable), one after another, from byte `start` of a file.

        Raises
        ------
        MissingDataError
            When there is no such file, or it ends before.
        Stopped
            When `stop` was set while a remote read was waiting.
        """
        wanted = sum(len(p) for p in parts)
        with translated(self.at(path)):
            if self._ranges is not None:
                done = self._ranges.read_into(self._full(path), self.at(path), start, parts, stop)
            else:
                done = _pread(self._full(path), start, parts)
        if done < wanted:
            raise self._ends_early(path, start, done, wanted)

    def open(self, path: str = "") -> BinaryIO:
        """A seekable binary file for reading; remote files are read in ranges as needed."""
        with translated(self.at(path)):
            if self.is_local:
                file = Path(self._full(path))
                # Opening a pipe would wait for whoever writes there, and it can't be sought in.
                if stat.S_IFMT(file.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                    raise StorageError(
                        "this is not a file but a pipe, a socket or a device",
                        where=self.at(path),
                        advice="write it to a file first, and name that",
                    )
                return file.open("rb")
            # HDF5 reads here and there in turn: what is ahead of one place must not push out another's.
            stream = self._fs.open(
                self._full(path),
                "rb",
                block_size=BLOCK_BYTES,
                cache_type="blockcache",
                cache_options={"maxblocks": BLOCKS},
            )
            try:
                stream.seek(0, os.SEEK_END)
                stream.seek(0)
            except ValueError:
                raise no_ranges(self.at(path)) from None
        return io.BufferedReader(RemoteFile(stream, self.at(path)))

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Publish `data` at `path`: all of it or nothing, replacing what was there."""
        full = self._full(path)
        with translated(self.at(path)):
            if not self.is_local:
                self._fs.pipe_file(full, bytes(data))
                return
            target = Path(full)
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(
                prefix=f".{target.name}.", suffix=_TEMPORARY, dir=target.parent
            )
            try:
                with os.fdopen(handle, "wb") as f:
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())
                Path(temporary).chmod(0o644)  # mkstemp makes it 0600
                os.replace(temporary, target)  # noqa: PTH105
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def upload(self, path: str, file: Path) -> None:
        """Publish a local file at `path` in a store, read in parts: all of it or nothing."""
        with translated(self.at(path)):
            self._fs.put_file(str(file), self._full(path))

    def remove(self, path: str) -> None:
        """Delete a file; nothing happens when it is not there."""
        with translated(self.at(path)):
            if self.is_local:
                Path(self._full(path)).unlink(missing_ok=True)
            elif self._fs.exists(self._full(path)):
                self._fs.rm_file(self._full(path))

    def remove_tree(self, path: str) -> None:
        """Delete everything below `path`, folders too."""
        with translated(self.at(path)):
            if self.is_local:
                shutil.rmtree(self._full(path), ignore_errors=False)
            else:
                self._fs.rm(self._full(path), recursive=True)

    def remove_temporaries(self) -> None:
        """Delete what local writes that were killed have left; nobody may write there meanwhile."""
        if self.is_local:
            with translated(self.at("")):
                for path in Path(self._root).rglob(f".*{_TEMPORARY}"):
                    path.unlink(missing_ok=True)

    def _read(self, path: str, start: int, end: int | None) -> bytes:
        with translated(self.at(path)):
            if self._ranges is not None:
                return self._ranges.read(self._full(path), self.at(path), start, end)
            try:
                with Path(self._full(path)).open("rb") as f:
                    f.seek(start)
                    return f.read() if end is None else f.read(end - start)
            except NotADirectoryError:
                raise FileNotFoundError from None

    def _ends_early(self, path: str, start: int, found: int, wanted: int) -> MissingDataError:
        return MissingDataError(
            f"the file ends early: {found} bytes instead of {wanted} from byte {start}",
            where=self.at(path),
            advice="it is truncated or was overwritten; run scshards verify on its shard set",
        )

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}" if path else self._root


def is_local(url: str) -> bool:
    """Whether an address is a plain path (or file://) and not a URL of some store."""
    return url.startswith("file://") or not _SCHEME.match(url)


def path_of(url: str) -> Path:
    """The path of a local address; `~` is a home directory where there is one of that name."""
    if not url:
        # An unset variable of a shell would mean the current folder.
        raise StorageError("a path is empty", advice="name a file or folder; . is this one")
    if "\0" in url:
        raise StorageError("no file can have such a name", where=repr(url))
    path = Path(url.removeprefix("file://"))
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def is_web(url: str) -> bool:
    """Whether an address is a web server's, which lists no folders."""
    return url.startswith(("http://", "https://"))


def redact(url: str) -> str:
    """The address without a user and password in it and without query parameters."""
    url = re.sub(r"(://)[^/]*@", r"\1", url)
    # A secret may hold slashes. `user:` at the front gives it away, unless a port stands there.
    url = re.sub(r"(://)[^/@:]+:(?!\d+/)[^@]*@", r"\1", url)
    return url if is_local(url) else url.partition("?")[0]


def parse_options(text: str | None) -> dict[str, Any]:
    """`--storage-options JSON` as a dict."""
    if not text:
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as e:
        # The text may hold a secret: say where it breaks, not what it says.
        raise ConfigError(
            f"--storage-options is not valid JSON (at character {e.pos})",
            advice="for example --storage-options '{\"anon\": true}'",
        ) from None
    if not isinstance(options, dict):
        raise ConfigError("--storage-options takes a JSON object")
    return options


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == _TEMPORARY


def _pread(path: str, start: int, parts: Sequence[memoryview]) -> int:
    """Fill buffers from a local file; how many bytes it had. A read may bring fewer than asked for."""
    done = 0
    # Not Path.open: for a chunk of a shard, its object and checks take as long as the system calls.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for part in parts:
            at = 0
            while at < len(part):
                n = os.preadv(file, [part[at:]], start + done)
                if n == 0:
                    return done
                at += n
                done += n
    finally:
        os.close(file)
    return done

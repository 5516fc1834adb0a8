"""Files and objects behind one face: local paths and any fsspec URL (s3://, ...).

A `Storage` is a root; every path given to it is relative to that root. Writes are atomic: a reader
sees the whole file or none. Errors come out as StorageError and never carry credentials. What is
asked of a store or a web server is asked again by one rule (base.retry).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from scshards.base.access import Access
from scshards.base.errors import MissingDataError, OutputExistsError, StorageError
from scshards.base.files import TEMPORARY, publish
from scshards.base.remote import answer_of, translated, version
from scshards.base.retry import Requests
from scshards.base.threads import Stop

if TYPE_CHECKING:
    from scshards.base.ranges import Ranges

Got = TypeVar("Got")

_CONFLICT, _PRECONDITION_FAILED, _NO_CONDITIONS = 409, 412, (400, 405, 501)
"""What an S3 store answers to a conditional PUT: another writes, or has written; it knows none."""

_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*(::|://)")


class Storage:
    """A root folder on disk or a prefix in an object store.

    Parameters
    ----------
    url
        A local path or an fsspec URL such as ``s3://bucket/prefix``.
    options
        What the fsspec file system is made with, for all addresses or by how they begin; or an Access,
        which says how patiently it is asked, too. For S3, endpoint, region and credentials come from the
        usual AWS environment variables and profiles when they are not given here.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        options: Mapping[str, Any] | None = None,
    ):
        self.url = os.fspath(url)
        self._shown = redact(self.url).rstrip("/")
        self.options = Access.of(options)
        self.is_local = is_local(self.url)
        self._fs: Any = None
        self._ranges: Ranges | None = None
        self._requests = Requests(self.options.retry, self._shown)
        if self.is_local:
            self._root = str(path_of(self.url).absolute())
        else:
            from scshards.base.ranges import Ranges  # who reads local files does not wait for it

            with translated(self._shown):
                self._fs, self._root = _file_system(self.url, self.options.options_for(self.url))
                self._ranges = Ranges(self._fs, self._requests)
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
        """Requests that were tried again so far."""
        return self._requests.retried

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder of that name."""
        try:
            self._info(path)
        except MissingDataError:
            return False
        return True

    def list(self, path: str = "") -> list[str]:
        """Relative paths of all files below `path`, sorted; empty when there is none.

        What a write that was killed has left behind is not among them.
        """
        return sorted(self.sizes(path))

    def sizes(self, path: str = "") -> dict[str, int | None]:
        """{relative path: bytes} of all files that `list` names; None where a store does not list it."""
        return {name: info["size"] for name, info in self._found(path).items()}

    def folder(self, path: str = "") -> tuple[Sequence[str], Sequence[str]]:
        """The names of the folders and of the files right in a folder, sorted."""
        full = self._full(path)
        with translated(self.at(path)):
            if self._ranges is None:
                entries = [(p.name, p.is_dir()) for p in Path(full).iterdir()]
            else:
                # Some stores list the folder itself, as an object without a name.
                entries = [
                    (e["name"].rstrip("/").rpartition("/")[2], e["type"] == "directory")
                    for e in self._listed(path, lambda fs: fs.ls(full, detail=True))
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
        info = self._info("")
        if info["type"] != "directory":
            return _state(info)
        states = [_state(i) for i in self._found("").values()]
        when, never = ("mtime_ns", 0) if self.is_local else ("modified", "")
        return {
            "files": len(states),
            "size": sum(s["size"] or 0 for s in states),
            when: max((s.get(when, never) for s in states), default=never),
        }

    def size(self, path: str) -> int:
        """The bytes of a file."""
        return int(self._info(path)["size"])

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
        stop: Stop | None = None,
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
                end, full, at = start + wanted, self._full(path), self.at(path)
                done = self._ranges.read(full, at, start, end, parts, stop=stop).got
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
            from scshards.base.ranges import RemoteFile

            assert self._ranges is not None
            return io.BufferedReader(RemoteFile(self._ranges, self._full(path), self.at(path)))

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Publish `data` at `path`: all of it or nothing, replacing what was there."""
        full = self._full(path)
        if not self.is_local:
            self._ask(path, lambda: self._change("pipe_file", full, bytes(data), size=len(data)))
            return
        with translated(self.at(path)):
            Path(full).parent.mkdir(parents=True, exist_ok=True)
            publish(Path(full), data)

    def replace(self, path: str, old: bytes | None, data: bytes) -> None:
        """Publish `data` at `path` where `old` is now; None: where nothing is.

        S3's conditional PUT compares for itself, so that of two writers one wins. Elsewhere, and in
        stores that do not know it, this looks first and writes then: who calls it holds a lock or lease.

        Raises
        ------
        OutputExistsError
            When something else is there.
        """
        conditions: list[dict[str, str]] = []
        if self._ranges is not None and "s3" in self._fs.protocol:
            if old is None:
                conditions = [{"IfNoneMatch": "*"}]
            else:
                # Ceph compares without the quotes that the header has by its standard.
                try:
                    tag = self._info(path)["ETag"]
                except MissingDataError:
                    raise self._has_changed(path) from None
                conditions = [{"IfMatch": tag}, {"IfMatch": tag.strip('"')}]
        if self.read_if_there(path) != old:
            raise self._has_changed(path)
        bucket, key, _ = self._fs.split_path(self._full(path)) if conditions else ("", "", None)
        for condition in conditions:
            with translated(self.at(path)):
                try:
                    self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
                    return
                except OSError as e:
                    status, _ = answer_of(e)
                    if status in _NO_CONDITIONS:
                        break
                    if status not in (_CONFLICT, _PRECONDITION_FAILED):
                        raise
            now = self.read_if_there(path)
            if now == data:
                return  # an answer that was lost on its way was to this very request
            if now != old:
                raise self._has_changed(path)
        self.write(path, data)

    def _has_changed(self, path: str) -> OutputExistsError:
        return OutputExistsError(
            "somebody else has written it meanwhile",
            where=self.at(path),
            advice="run the same command again",
        )

    def upload(self, path: str, file: Path) -> None:
        """Publish a local file at `path` in a store, read in parts: all of it or nothing."""
        full, size = self._full(path), file.stat().st_size
        self._ask(path, lambda: self._change("put_file", str(file), full, size=size))

    def remove(self, path: str) -> None:
        """Delete a file; nothing happens when it is not there."""
        full = self._full(path)
        if self.is_local:
            with translated(self.at(path)):
                Path(full).unlink(missing_ok=True)
        elif self.exists(path):
            # It is gone when an answer was lost and it is asked again.
            with contextlib.suppress(MissingDataError):
                self._ask(path, lambda: self._change("rm_file", full))

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
                for path in Path(self._root).rglob(f".*{TEMPORARY}"):
                    path.unlink(missing_ok=True)

    def _ask(self, path: str, call: Callable[[], Got]) -> Got:
        """What a store answers."""
        with translated(self.at(path)):
            return self._requests.ask(self.at(path), lambda _: call())

    def _change(self, name: str, *args: Any, size: int = 0) -> None:
        """Write or remove so many bytes; it has an end where the file system would wait for ever."""
        work = getattr(self._fs, f"_{name}", None)
        if work is None or self._ranges is None or not getattr(self._fs, "async_impl", False):
            getattr(self._fs, name)(*args)
        else:
            self._ranges.within(work(*args), size)

    def _info(self, path: str) -> dict[str, Any]:
        """Size, type and version of a file or a folder."""
        with translated(self.at(path)):
            if self._ranges is None:
                return _info_of(Path(self._full(path)))
            self._ranges.fs.invalidate_cache()
            return self._ranges.info(self._full(path), self.at(path))

    def _found(self, path: str) -> dict[str, dict[str, Any]]:
        """{relative path: what `_info` says} of all files below; none when there is no such folder."""
        full = self._full(path)
        if self.is_local:
            with translated(self.at(path)):
                paths = (p for p in Path(full).rglob("*") if p.is_file() and not _is_temporary(p))
                return {p.relative_to(self._root).as_posix(): _info_of(p) for p in paths}
        infos = self._listed(path, lambda fs: fs.find(full, detail=True).items())
        # s3fs names the folder itself where its first file comes right after an empty listing.
        files = ((name, info) for name, info in infos if info["type"] != "directory")
        return {name[len(self._root) :].lstrip("/"): info for name, info in files}

    def _listed(self, path: str, call: Callable[[Any], Got]) -> Got | Sequence[Any]:
        """What a store lists; nothing when there is nothing, an error when there is no bucket."""
        assert self._ranges is not None
        fs = self._ranges.fs
        fs.invalidate_cache()

        def listed() -> Got | Sequence[Any]:
            try:
                return call(fs)
            except FileNotFoundError as e:
                if answer_of(e)[1] == "NoSuchBucket":
                    raise
                return ()

        return self._ask(path, listed)

    def _read(self, path: str, start: int, end: int | None) -> bytes:
        with translated(self.at(path)):
            if self._ranges is not None:
                return bytes(self._ranges.read(self._full(path), self.at(path), start, end).data)
            with Path(self._full(path)).open("rb") as f:
                f.seek(start)
                return f.read() if end is None else f.read(end - start)

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


def name_of(url: str) -> str:
    """What may be told of an address: a local file's name alone, of a URL what `redact` leaves."""
    plain = redact(url)
    return plain.rstrip("/").rpartition("/")[2] if is_local(plain) else plain


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The fsspec file system of an address, and the address within it.

    It is none that other code of the process has, whose listings and options stay its own; of those that
    hold connections, our storages with the same options share one.
    """
    import fsspec

    protocol, _, rest = url.partition("://")
    try:
        if "::" in protocol or any("://" in part for part in rest.split("::")[1:]):
            fs, root = fsspec.core.url_to_fs(url, **{**options, "skip_instance_cache": True})
        else:
            # Not url_to_fs: it would take a key with :: in it for a chain of file systems.
            cls = fsspec.get_filesystem_class(protocol)
            # A listing that was cached before somebody else wrote would hide new files. fsspec keeps
            # the file systems of an event loop by their options.
            shared = getattr(cls, "async_impl", False)
            own = {"use_listings_cache": False} if shared else {"skip_instance_cache": True}
            fs = cls(**(cls._get_kwargs_from_urls(url) | dict(options) | own))
            root = cls._strip_protocol(url)
    except (ValueError, ImportError, TypeError) as e:
        raise StorageError(
            f"no file system for this address: {e}",
            where=redact(url),
            advice="give a local path or an fsspec URL such as s3://bucket/prefix",
        ) from None
    return fs, root


def _info_of(file: Path) -> dict[str, Any]:
    said = file.stat()
    kind = "directory" if stat.S_ISDIR(said.st_mode) else "file"
    return {"type": kind, "size": said.st_size, "mtime_ns": said.st_mtime_ns}


def _state(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file's info tells one state of it from another."""
    when = {"mtime_ns": info["mtime_ns"]} if "mtime_ns" in info else version(info)
    return {"size": info.get("size"), **when}


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == TEMPORARY


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

"""Reads of parts of objects, which go on from where an answer broke off.

    thread --Read--> a request on the file system's event loop --pieces--> the caller's memory
              ^                                                  |
              +--- what is missing is asked for again (base.retry) <-- 5xx, reset, stall, short body

The file system's own retries, and those of the client below it, are switched off for reads, or they
would multiply. Bytes that were received are not asked for again. On S3 and on web servers an answer is
copied into the caller's memory as it comes in; other file systems give whole answers. Used by
base.storage, from any number of threads.

Own code beside fsspec and not obstore, which is faster but reads no AWS profiles without boto3, takes an
answer that is too short for whole, and would stand beside fsspec, which all else is reached by.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from fsspec.spec import AbstractBufferedFile

from scshards.base.errors import StorageError
from scshards.base.memory import collected_apart
from scshards.base.remote import (
    Refused,
    Spoiled,
    answer_of,
    code_in,
    no_ranges,
    translated,
    version,
)
from scshards.base.retry import Limit, Requests, Retry
from scshards.base.threads import LOOK_S, Stop, Stopped

SLOWEST = 50_000
"""Bytes a second: what a store takes more slowly, it does not take."""

CONNECTIONS = 64
"""Connections to a store that a process keeps at most, unless its options say otherwise."""

BLOCK_BYTES, BLOCKS = 1 << 22, 8
"""An open file is read in blocks of so many bytes, of which it keeps so many."""

_PIECE, _HEAD = 1 << 20, 1 << 12

_NOT_FROM_THERE = 416
"""HTTP's answer to a range that begins after the end."""


class RemoteFile(AbstractBufferedFile):
    """An object as a seekable file; its errors are StorageErrors.

    HDF5 reads here and there in turn: the blocks that were used last are kept, wherever they lie. While
    it is open, garbage is collected apart: whoever reads it may hold a lock that destructors take.
    """

    def __init__(self, ranges: Ranges, path: str, where: str) -> None:
        self._ranges, self._path, self._where = ranges, path, where
        info = ranges.info(path, where)
        if info.get("size") is None or info["type"] == "directory":
            raise no_ranges(where) if info["type"] == "file" else IsADirectoryError
        self._etag = version(info).get("etag")
        kept = {"cache_type": "blockcache", "cache_options": {"maxblocks": BLOCKS}}
        # fsspec logs what it takes for the path: that may be a signed address.
        super().__init__(None, where, "rb", BLOCK_BYTES, size=int(info["size"]), **kept)
        self._open = contextlib.ExitStack()
        self._open.enter_context(collected_apart)

    def readinto(self, buffer: Any) -> int:
        """As many bytes as are asked for, or a block: who wants many takes them one after another."""
        return int(super().readinto(memoryview(buffer)[:BLOCK_BYTES]))

    def close(self) -> None:
        """The blocks go now, and not when garbage is collected: they are held in a ring."""
        if not self.closed:
            self.cache._fetch_block_cached = None
            self._open.close()
        super().close()

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        with translated(self._where):
            read = self._ranges.read(self._path, self._where, start, end, etag=self._etag)
        if read.start != end or read.etag != self._etag:
            raise StorageError(
                "the file was replaced while it was read",
                where=self._where,
                advice="run the same command again once nobody writes it",
            )
        return bytes(read.data)


class Ranges:
    """Reads parts of the objects of one file system.

    Parameters
    ----------
    fs
        An fsspec file system.
    requests
        What asks it.

    Attributes
    ----------
    fs
        The same file system, without retries of its own where it is S3's.
    """

    def __init__(self, fs: Any, requests: Requests) -> None:
        self._requests = requests
        self._receive: Callable[[Any, Read, float], Coroutine[Any, Any, None]] | None = None
        if getattr(fs, "async_impl", False):
            is_s3, is_web = "s3" in fs.protocol, "http" in fs.protocol
            self._receive = _from_s3 if is_s3 else _from_web if is_web else _from_loop
        self.fs = _patient(fs, requests.retry) if self._receive is _from_s3 else fs

    def info(self, path: str, where: str) -> dict[str, Any]:
        """What the file system says of an object or a folder: its size, its version and so on."""
        if self._receive is not _from_web:
            return dict(self._requests.ask(where, lambda _: self.fs.info(path)))
        # A web server is asked for a byte: an address may be signed for GET alone, and fsspec takes
        # every answer that it does not like for a file that is not there.
        head, patience = Read(path, where, 0, 1), self._requests.retry.timeout
        try:
            self._requests.ask(where, lambda _: self._wait(_look(self.fs, head, patience)))
        except Refused as e:
            if e.status != _NOT_FROM_THERE:
                raise
        return {"size": head.size, "type": "file", **head.version}

    def read(
        self,
        path: str,
        where: str,
        start: int,
        end: int | None,
        parts: Sequence[memoryview] | None = None,
        *,
        etag: str | None = None,
        stop: Stop | None = None,
    ) -> Read:
        """Ask for a part of an object until all of it is there, or the object has ended; see Read."""
        read = Read(path, where, start, end, parts, etag)
        if read.start != read.end:
            self._requests.ask(where, lambda limit: self._go_on(read, limit, stop), stop)
        return read

    def within(self, work: Coroutine[Any, Any, Any], size: int = 0) -> None:
        """Run what writes or removes so many bytes; TimeoutError when that takes far too long.

        A store that never says that it is ready to receive would be waited for without an end.
        """
        self._wait(_within(work, 2 * self._requests.retry.timeout + size / SLOWEST))

    def _go_on(self, read: Read, limit: Limit, stop: Stop | None) -> None:
        had = read.got
        try:
            if self._receive is None:
                read.put(self.fs.cat_file(read.path, start=read.start, end=read.end))
            else:
                patience = min(self._requests.retry.timeout, limit.seconds_left)
                self._wait(self._receive(self.fs, read, patience), stop)
            read.check()
        except Exception as e:
            if answer_of(e)[0] != _NOT_FROM_THERE:
                raise
        finally:
            if read.got > had:
                limit.got_on()

    def _wait(self, work: Coroutine[Any, Any, None], stop: Stop | None = None) -> None:
        """Run it on the file system's loop until it has ended, or `stop` was set."""
        job = asyncio.run_coroutine_threadsafe(work, self.fs.loop)
        try:
            if stop is not None:
                while not concurrent.futures.wait([job], LOOK_S).done:
                    if stop.is_set():
                        raise Stopped
            job.result()
        finally:
            job.cancel()  # does nothing when it is done


class Read:
    """A part of an object on its way: what is asked for, what came, and what the answers said of it.

    Parameters
    ----------
    path, where
        The object, and what it is called in messages.
    start, end
        The bytes [start, end) are wanted; None: all from there on.
    parts
        Buffers that are filled one after another; without them the bytes are kept in `data`.
    etag
        The version that an earlier answer was of; then, that of the last one.

    Attributes
    ----------
    got
        How many bytes have come.
    data
        They, where there are no buffers.
    """

    def __init__(
        self,
        path: str,
        where: str,
        start: int,
        end: int | None,
        parts: Sequence[memoryview] | None = None,
        etag: str | None = None,
    ) -> None:
        self.path, self.where, self.end, self.etag = path, where, end, etag
        self._first, self._parts = start, parts
        self.version: dict[str, str] = {}
        self._begin()

    def _begin(self) -> None:
        self.got, self.data = 0, bytearray()
        self._left = deque(p for p in self._parts or () if len(p))
        self.size: int | None = None
        self.has_changed = False

    @property
    def start(self) -> int:
        """The first byte that has not come."""
        return self._first + self.got

    @property
    def header(self) -> str:
        """The HTTP Range header; of whole objects too, as then the answer says how long they are."""
        return f"bytes={self.start}-{'' if self.end is None else self.end - 1}"

    def met(self, content_range: str | None, etag: str | None) -> None:
        """Note what an answer's head says, and refuse one that is not the part that was asked for."""
        said = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range or "bytes 0-0/*")
        if said is None or (content_range is None and self.start):
            raise no_ranges(self.where)
        if int(said[1]) != self.start:
            # Of aiohttp 3.9, where an earlier request was given up.
            raise Spoiled("the answer was to another request")
        if said[2] != "*":
            self.size = int(said[2])
        self.has_changed = None not in (self.etag, etag) and etag != self.etag
        self.etag = etag or self.etag

    def ended(self, content_range: str | None) -> None:
        """Note what an answer says that has nothing from there on."""
        said = re.fullmatch(r"bytes \*/(\d+)", content_range or "")
        self.size = int(said[1]) if said else self.size

    def put(self, piece: bytes) -> None:
        """Take the next bytes."""
        if self.end is not None and self.start + len(piece) > self.end:
            raise no_ranges(self.where)
        self.got += len(piece)
        if self._parts is None:
            self.data += piece
            return
        view = memoryview(piece)
        while len(view):
            part = self._left.popleft()
            n = min(len(view), len(part))
            part[:n] = view[:n]
            view = view[n:]
            if n < len(part):
                self._left.appendleft(part[n:])

    def check(self) -> None:
        """Refuse an answer that broke off, or was of another version."""
        if self.has_changed:
            self._begin()  # no mixture of two versions
            raise Spoiled("the object was replaced while it was read")
        if self.start != self.end and self.size is not None and self.start < self.size:
            raise Spoiled("the answer was shorter than what was asked for")


# What takes an answer. No next bytes within `patience` seconds end it.


async def _from_s3(fs: Any, read: Read, patience: float) -> None:
    bucket, key, version = fs.split_path(read.path)
    options = {"Range": read.header} | ({"VersionId": version} if version else {})
    await fs.set_session()  # makes the client, the first time, which is no fault of the server
    async with asyncio.timeout(patience) as limit:
        said = await fs._call_s3("get_object", Bucket=bucket, Key=key, **fs.req_kw, **options)
        try:
            read.met(said.get("ContentRange"), said.get("ETag"))
            await _receive(said["Body"], read, limit, patience)
        finally:
            # Closes the connection, unless the answer was read to its end.
            said["Body"].close()


async def _look(fs: Any, read: Read, patience: float) -> None:
    """What the head of a web server's answer says, of which no byte is taken."""
    async with asyncio.timeout(patience), _of_web(fs, read):
        pass


async def _from_web(fs: Any, read: Read, patience: float) -> None:
    async with asyncio.timeout(patience) as limit, _of_web(fs, read) as body:
        await _receive(body, read, limit, patience)


@contextlib.asynccontextmanager
async def _of_web(fs: Any, read: Read) -> AsyncIterator[Any]:
    # Parts of a file are parts of its bytes as they are, not as a server compresses them.
    own = {"Range": read.header, "Accept-Encoding": "identity"}
    options = fs.kwargs | {"headers": {**fs.kwargs.get("headers", {}), **own}}
    session = await fs.set_session()
    async with session.get(fs.encode_url(read.path), **options) as said:
        if said.status >= 400:
            read.ended(said.headers.get("Content-Range"))
            raise Refused(said.status, code_in(await said.content.read(_HEAD)))
        read.version = version(said.headers)
        read.met(said.headers.get("Content-Range"), said.headers.get("ETag"))
        if said.status != 206:
            read.size = said.content_length
        yield said.content


async def _receive(body: Any, read: Read, limit: asyncio.Timeout, patience: float) -> None:
    """Take an answer as it comes in, to its end, so that its connection is used again."""
    while not read.has_changed:
        limit.reschedule(asyncio.get_running_loop().time() + patience)
        piece = await body.read(_PIECE)
        if not piece:
            return
        read.put(piece)


async def _within(work: Coroutine[Any, Any, Any], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await work


async def _from_loop(fs: Any, read: Read, patience: float) -> None:
    """Of a file system that gives whole answers, which have to come within the time limit."""
    async with asyncio.timeout(patience):
        read.put(await fs._cat_file(read.path, start=read.start, end=read.end))


def _patient(fs: Any, retry: Retry) -> Any:
    """The same S3 file system with enough connections, our time limits, and no retries of its own."""
    config = {"max_pool_connections": CONNECTIONS, **fs.storage_options.get("config_kwargs", {})}
    config |= {
        "connect_timeout": retry.timeout,
        "read_timeout": retry.timeout,
        "retries": {"total_max_attempts": 1},
    }
    made = type(fs)(*fs.storage_args, **(fs.storage_options | {"config_kwargs": config}))
    made.retries = 1
    return made

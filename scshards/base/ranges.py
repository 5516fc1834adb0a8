"""Requests to stores and web servers, tried again; reads of a part from where an answer broke off.

    thread --read_into--> a request on the file system's event loop --pieces--> the caller's memory
              ^                                                   |
              +--- what is missing is asked for again (base.retry) <-- 5xx, reset, stall, short body

This is the only place where a read is repeated: the file system's own retries, and those of the
client below it, are switched off for reads, or they would multiply. Bytes that were received are not
asked for again. On S3 and on web servers an answer is copied into the caller's memory as it comes in;
other file systems give whole answers. Used by base.storage, from any number of threads.

Own code beside fsspec and not obstore, which is faster but reads no AWS profiles without boto3, takes an
answer that is too short for whole, and would stand beside fsspec, which all else is reached by.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import io
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from scshards.base.errors import StorageError
from scshards.base.remote import (
    Refused,
    code_in,
    no_ranges,
    status_of,
    temporary,
    translated,
    version,
)
from scshards.base.retry import Retry, Stopped, Tally, Tries

CONNECTIONS = 64
"""Connections to a store that a process keeps at most, unless its options say otherwise."""

BLOCK_BYTES, BLOCKS = 1 << 22, 8
"""An open file is read in blocks of so many bytes, of which it keeps so many."""

_PIECE, _HEAD = 1 << 20, 1 << 12
_LOOK_S = 0.5
"""How often a waiting read looks whether it was given up."""

Got = TypeVar("Got")

_NOT_FROM_THERE = 416
"""HTTP's answer to a range that begins after the end."""


class RemoteFile(io.RawIOBase):
    """An object as a seekable file, read in blocks; its errors are StorageErrors.

    HDF5 reads here and there in turn: the blocks that were used last are kept, wherever they lie.
    """

    def __init__(self, ranges: Ranges, path: str, where: str) -> None:
        self._ranges, self._path, self._where = ranges, path, where
        info = ranges.info(path, where)
        if info.get("size") is None or info["type"] == "directory":
            raise no_ranges(where) if info["type"] == "file" else IsADirectoryError
        self.size = int(info["size"])
        self._answer = _Answer()
        self._etag = self._answer.etag = version(info).get("etag")
        self._at = 0
        self._blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"a file has no byte {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Bytes of one block, as many as are asked for and lie in it."""
        if self._at >= self.size or not len(buffer):
            return 0
        number, begin = divmod(self._at, BLOCK_BYTES)
        piece = memoryview(self._block(number))[begin : begin + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _block(self, number: int) -> bytes:
        block = self._blocks.pop(number, None)
        if block is None:
            block = self._fetched(number)
            while len(self._blocks) >= BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))  # the one that was used longest ago
        self._blocks[number] = block
        return block

    def _fetched(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self.size)
        with translated(self._where), _uncollected():
            block = self._ranges.read(self._path, self._where, start, end, self._answer)
        if len(block) != end - start or self._answer.etag != self._etag:
            raise StorageError(
                "the file was replaced while it was read",
                where=self._where,
                advice="run the same command again once nobody writes it",
            )
        return block


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected meanwhile: h5py holds its lock while it reads, and objects of h5py that
    were collected on the file system's thread would wait for that lock there. Neither would end."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Sink:
    """Takes the bytes of an answer, in order: into buffers one after another, or as many as come.

    Parameters
    ----------
    parts
        The buffers; without them the bytes are kept in `data`.
    room
        How many bytes there may be; None: any number.
    """

    def __init__(self, parts: Sequence[memoryview] | None = None, room: int | None = None) -> None:
        self.got, self.data = 0, bytearray()
        self._parts = None if parts is None else [p for p in parts if len(p)]
        self._room = room if parts is None else sum(len(p) for p in parts)
        self._part = self._at = 0

    @property
    def is_full(self) -> bool:
        return self.got == self._room

    def put(self, piece: bytes, where: str) -> None:
        if self._room is not None and self.got + len(piece) > self._room:
            raise no_ranges(where)
        self.got += len(piece)
        if self._parts is None:
            self.data += piece
            return
        view = memoryview(piece)
        while len(view):
            part = self._parts[self._part]
            n = min(len(view), len(part) - self._at)
            part[self._at : self._at + n] = view[:n]
            view = view[n:]
            self._at += n
            if self._at == len(part):
                self._part, self._at = self._part + 1, 0

    def restart(self) -> None:
        self.data.clear()
        self.got = self._part = self._at = 0


class Ranges:
    """Asks one file system, and reads parts of its objects.

    Parameters
    ----------
    fs
        An fsspec file system.
    retry
        How requests are tried again.
    where
        The root, without credentials, for messages.

    Attributes
    ----------
    fs
        The same file system, without retries of its own where it is S3's.
    tally
        What was tried again.
    """

    def __init__(self, fs: Any, retry: Retry, where: str) -> None:
        self._retry = retry
        self.tally = Tally(where)
        self._kind = _kind(fs)
        self.fs = _patient(fs, retry) if self._kind == "s3" else fs

    def ask(self, where: str, call: Callable[[], Got]) -> Got:
        """What `call` returns, which asks the file system something that may be asked twice."""
        tries = Tries(self._retry, self.tally, where)
        while True:
            try:
                return call()
            except Exception as e:
                problem = temporary(e)
                if problem is None:
                    raise
            tries.again(problem)

    def info(self, path: str, where: str) -> dict[str, Any]:
        """What the file system says of an object or a folder: its size, its version and so on."""
        if self._kind != "web":
            return dict(self.ask(where, lambda: self.fs.info(path)))
        # A web server is asked for a byte: an address may be signed for GET alone, and fsspec takes
        # every answer that it does not like for a file that is not there.
        answer, request = _Answer(), _Request(path, where, 0, 1)
        try:
            self.ask(
                where, lambda: self._wait(_look(self.fs, request, answer, self._retry.timeout))
            )
        except Refused as e:
            if e.status != _NOT_FROM_THERE:
                raise
        return {"size": answer.size, "type": "file", **answer.version}

    def open(self, path: str, where: str) -> RemoteFile:
        """An object as a file that can be read here and there."""
        return RemoteFile(self, path, where)

    def read(
        self, path: str, where: str, start: int, end: int | None, answer: _Answer | None = None
    ) -> bytes:
        """The bytes [start, end) of an object, or fewer when it ends early; `end` None is its end.

        `answer` is what earlier reads of it said.
        """
        sink = _Sink(room=None if end is None else end - start)
        self._fill(sink, answer or _Answer(), _Request(path, where, start, end))
        return bytes(sink.data)

    def read_into(
        self,
        path: str,
        where: str,
        start: int,
        parts: Sequence[memoryview],
        stop: threading.Event | None = None,
    ) -> int:
        """Fill buffers, one after another, from byte `start` of an object; how many bytes it had."""
        sink = _Sink(parts)
        request = _Request(path, where, start, start + sum(len(p) for p in parts))
        self._fill(sink, _Answer(), request, stop)
        return sink.got

    def _fill(
        self,
        sink: _Sink,
        answer: _Answer,
        request: _Request,
        stop: threading.Event | None = None,
    ) -> None:
        """Try until the sink is full or the object has ended; other errors than temporary ones go up."""
        tries = Tries(self._retry, self.tally, request.where, stop)
        while not sink.is_full:
            had = sink.got
            now = request._replace(start=request.start + had)
            try:
                if self._kind == "plain":
                    data = self.fs.cat_file(now.path, start=now.start, end=now.end)
                    sink.put(data, now.where)
                else:
                    patience = min(self._retry.timeout, tries.seconds_left)
                    self._wait(_RECEIVE[self._kind](self.fs, now, sink, answer, patience), stop)
            except Exception as e:
                if status_of(e) == _NOT_FROM_THERE:
                    return
                problem = temporary(e)
                if problem is None:
                    raise
            else:
                if answer.has_changed:
                    # No mixture of two versions.
                    sink.restart()
                    answer.forget()
                    problem = "the object was replaced while it was read"
                elif sink.is_full or answer.is_complete(request.start + sink.got, request.end):
                    return
                else:
                    problem = "the answer was shorter than what was asked for"
            if sink.got > had:
                tries.got_on()
            tries.again(problem)

    def _wait(self, work: Coroutine[Any, Any, None], stop: threading.Event | None = None) -> None:
        """Run it on the file system's loop until it has ended, or `stop` was set."""
        job = asyncio.run_coroutine_threadsafe(work, self.fs.loop)
        try:
            if stop is not None:
                while not concurrent.futures.wait([job], _LOOK_S).done:
                    if stop.is_set():
                        raise Stopped
            job.result()
        finally:
            job.cancel()  # does nothing when it is done


class _Request(NamedTuple):
    """What is asked for: the bytes [start, end) of an object."""

    path: str
    where: str
    start: int
    end: int | None

    @property
    def header(self) -> str:
        """The HTTP Range header; of whole objects too, as then the answer says how long they are."""
        return f"bytes={self.start}-{'' if self.end is None else self.end - 1}"


class _Answer:
    """What the answers to a read have said of the object."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The object is another now."""
        self.size: int | None = None
        self.has_changed = False
        self.etag: str | None = None
        self.version: dict[str, str] = {}

    def is_complete(self, at: int, end: int | None) -> bool:
        """Whether there is nothing more to be had after the byte `at`."""
        return at == end or self.size is None or at >= self.size

    def met(self, request: _Request, content_range: str | None, etag: str | None) -> None:
        """Note what an answer's head says, and refuse one that is not the part that was asked for."""
        if content_range is None:
            if request.start:
                raise no_ranges(request.where)
        else:
            said = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
            if said is None or int(said[1]) != request.start:
                raise no_ranges(request.where)
            if said[2] != "*":
                self.size = int(said[2])
        self.has_changed = self.etag is not None and etag is not None and etag != self.etag
        self.etag = etag or self.etag

    def ended(self, content_range: str | None) -> None:
        """Note what an answer says that has nothing from there on."""
        said = re.fullmatch(r"bytes \*/(\d+)", content_range or "")
        self.size = int(said[1]) if said else self.size


# What fills a sink from an answer. No next bytes within `patience` seconds end it.


async def _from_s3(
    fs: Any, request: _Request, sink: _Sink, answer: _Answer, patience: float
) -> None:
    bucket, key, version = fs.split_path(request.path)
    options = {"Range": request.header} | ({"VersionId": version} if version else {})
    await fs.set_session()  # makes the client, the first time, which is no fault of the server
    async with asyncio.timeout(patience) as limit:
        said = await fs._call_s3("get_object", Bucket=bucket, Key=key, **fs.req_kw, **options)
        try:
            answer.met(request, said.get("ContentRange"), said.get("ETag"))
            await _receive(said["Body"], request, sink, answer, limit, patience)
        finally:
            # Closes the connection, unless the answer was read to its end.
            said["Body"].close()


async def _look(fs: Any, request: _Request, answer: _Answer, patience: float) -> None:
    """What the head of a web server's answer says, of which no byte is taken."""
    async with asyncio.timeout(patience), _of_web(fs, request, answer):
        pass


async def _from_web(
    fs: Any, request: _Request, sink: _Sink, answer: _Answer, patience: float
) -> None:
    async with asyncio.timeout(patience) as limit, _of_web(fs, request, answer) as body:
        await _receive(body, request, sink, answer, limit, patience)


@contextlib.asynccontextmanager
async def _of_web(fs: Any, request: _Request, answer: _Answer) -> AsyncIterator[Any]:
    # Parts of a file are parts of its bytes as they are, not as a server compresses them.
    own = {"Range": request.header, "Accept-Encoding": "identity"}
    options = fs.kwargs | {"headers": {**fs.kwargs.get("headers", {}), **own}}
    session = await fs.set_session()
    async with session.get(fs.encode_url(request.path), **options) as said:
        if said.status >= 400:
            answer.ended(said.headers.get("Content-Range"))
            raise Refused(said.status, code_in(await said.content.read(_HEAD)))
        answer.version = version(said.headers)
        answer.met(request, said.headers.get("Content-Range"), said.headers.get("ETag"))
        if said.status != 206:
            answer.size = said.content_length
        yield said.content


async def _receive(
    body: Any,
    request: _Request,
    sink: _Sink,
    answer: _Answer,
    limit: asyncio.Timeout,
    patience: float,
) -> None:
    """Copy an answer into the sink as it comes in, to its end, so that its connection is used again."""
    while not answer.has_changed:
        limit.reschedule(asyncio.get_running_loop().time() + patience)
        piece = await body.read(_PIECE)
        if not piece:
            return
        sink.put(piece, request.where)


async def _from_loop(
    fs: Any, request: _Request, sink: _Sink, answer: _Answer, patience: float
) -> None:
    """Of a file system that gives whole answers, which have to come within the time limit."""
    async with asyncio.timeout(patience):
        data = await fs._cat_file(request.path, start=request.start, end=request.end)
        sink.put(data, request.where)


_RECEIVE = {"s3": _from_s3, "web": _from_web, "loop": _from_loop}


def _kind(fs: Any) -> str:
    """How a file system is read: "s3", "web", "loop" (asynchronous) or "plain"."""
    names = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if not getattr(fs, "async_impl", False):
        return "plain"
    if "s3" in names:
        return "s3"
    return "web" if "http" in names else "loop"


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

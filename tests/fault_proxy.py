"""A proxy that stands before a web server and spoils a share of its answers, for tests of reading.

    with FaultProxy(endpoint, share=0.1, seed=0) as proxy:
        ...                                   # read from proxy.url
        proxy.faults, proxy.requests          # what was done, and what was asked for

Which requests it spoils, and how, is drawn from a seed by the number of the request. Only GET is
spoiled, unless `writes` says that PUT, POST and DELETE are, too. It listens on 127.0.0.1 and stops with
its context.
"""

from __future__ import annotations

import collections
import http.client
import http.server
import random
import socket
import struct
import threading
import urllib.parse
from dataclasses import dataclass

FAULTS = (
    "500",  # an error of the server
    "503",  # slow down
    "refuse",  # the connection is cut before an answer
    "reset",  # cut in the middle of the body
    "stall",  # the answer stops in its middle, or before its head
    "short",  # the body ends early, and its Content-Length says so
    "cut",  # the body ends early, though its Content-Length says otherwise
)
FLIP = "flip"
"""One bit of the body is another: no transport finds that. Only done when asked for, and only to shards
and indexes: the manifest, which has all checksums, has none itself."""

MIXED = "mixed"
"""The answer is to another request: its head says so. Seen where a connection was used again too soon."""

LOST = "lost"
"""What was asked for is done, and the answer never comes."""

WRITE_FAULTS = ("500", "503", "refuse", LOST)
"""What becomes of a write."""

_SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>later</Message></Error>'


@dataclass(frozen=True)
class Request:
    """One GET, or a write where those are spoiled: its path without query, the first byte it asked for, and how it was spoiled, if it was."""

    path: str
    start: int
    fault: str | None
    headers: dict[str, str]


class FaultProxy:
    """A proxy in front of `endpoint`, as a context manager.

    Parameters
    ----------
    endpoint
        Such as http://127.0.0.1:8080.
    share
        Of requests that are spoiled; or a function of a path that says which fault it gets, if any.
    kinds
        Faults to draw from.
    writes
        Spoil writes, by WRITE_FAULTS, as often as reads; with the attribute `hangs` none is answered, nor asked
        for its body.
    stall_s
        How long a stalled answer stands still before its connection is closed.
    """

    def __init__(
        self,
        endpoint,
        *,
        share=0.1,
        seed=0,
        kinds=FAULTS,
        stall_s: float = 30.0,
        writes: bool = False,
    ) -> None:
        self.writes, self.hangs = writes, False
        upstream = urllib.parse.urlsplit(endpoint)
        self.upstream = (upstream.hostname, upstream.port)
        self.share, self.seed, self.kinds, self.stall_s = share, seed, kinds, stall_s
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.released = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def faults(self) -> collections.Counter[str]:
        """How often each fault was done."""
        with self.lock:
            return collections.Counter(r.fault for r in self.requests if r.fault is not None)

    def decide(
        self, path: str, start: int, headers: dict[str, str], kinds: tuple[str, ...] | None = None
    ) -> str | None:
        """Note a request and draw its fault."""
        with self.lock:
            drawn = random.Random(f"{self.seed} {len(self.requests)}")
            if callable(self.share):
                fault = self.share(path)
            else:
                fault = drawn.choice(kinds or self.kinds) if drawn.random() < self.share else None
            if fault == FLIP and "/train/" not in path:
                fault = None
            self.requests.append(Request(path, start, fault, headers))
        return fault

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *args: object) -> None:
        """A client that hangs up is no fault."""


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    _upstream: http.client.HTTPConnection | None = None

    def log_message(self, *args: object) -> None:
        """Nothing is said."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        fault = None
        if self.command == "GET":
            asked = self.headers.get("Range", "bytes=0-")
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            fault = self.owner.decide(path, start, dict(self.headers))
        if fault == "refuse":
            self._hang_up()
        elif fault in ("500", "503"):
            self._send(int(fault), {"Content-Type": "application/xml"}, _SLOW_DOWN, None)
        else:
            self._send(*self._forward(), fault)

    def do_PUT(self) -> None:
        if self.owner.writes and self.owner.hangs:
            self._stall()
            return
        self.wfile.flush()  # who says Expect: 100-continue waits for that before it sends
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        fault = None
        if self.owner.writes:
            fault = self.owner.decide(path, 0, dict(self.headers), WRITE_FAULTS)
        if fault == "refuse":
            self._hang_up()
        elif fault in ("500", "503"):
            self._send(int(fault), {"Content-Type": "application/xml"}, _SLOW_DOWN, None)
        else:
            answer = self._forward(body)
            if fault == LOST:
                self._hang_up()
            else:
                self._send(*answer, None)

    do_POST = do_DELETE = do_PUT

    def _forward(self, sent: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(*self.owner.upstream, timeout=60)
        self._upstream.putrequest(
            self.command, self.path, skip_host=True, skip_accept_encoding=True
        )
        for name, value in self.headers.items():
            if name.lower() != "expect":
                self._upstream.putheader(name, value)
        self._upstream.endheaders(sent or None)
        answer = self._upstream.getresponse()
        body = answer.read()
        skipped = ("transfer-encoding", "connection", "content-length", "keep-alive")
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in skipped}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length", "0")
        return answer.status, headers, body

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str | None) -> None:
        middle = len(body) // 2
        if fault == FLIP and body:
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault == "short":
            body = body[:middle]
        if fault == MIXED and "Content-Range" in headers:
            start, _, rest = headers["Content-Range"].removeprefix("bytes ").partition("-")
            headers["Content-Range"], body = f"bytes {int(start) + 1}-{rest}", body[1:]
        if fault == "stall" and middle % 2:
            return self._stall()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        is_cut = fault in ("reset", "stall", "cut")
        self.wfile.write(body[:middle] if is_cut else body)
        self.wfile.flush()
        if fault == "reset":
            self._hang_up()
        elif fault == "stall":
            self._stall()
        elif fault == "cut":
            self.close_connection = True
        return None

    def _stall(self) -> None:
        self.owner.released.wait(self.owner.stall_s)
        self.close_connection = True

    def _hang_up(self) -> None:
        """Close the connection so that the client sees a reset."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

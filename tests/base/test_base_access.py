"""Storage options by address, from JSON and files, checked; and the retry rule that comes with them."""

from __future__ import annotations

import copy
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scshards.base.access import Access, parse_options
from scshards.base.errors import ConfigError, StorageError
from scshards.base.retry import Limit, Requests, Retry
from scshards.base.storage import Storage


def test_options_by_the_longest_beginning_that_fits() -> None:
    access = Access.of(
        {
            "anon": True,
            "s3://atlas/": {"key": "a"},
            "s3://atlas/x/": {"key": "x"},
            "https://": {"headers": {"A": "b"}},
        }
    )
    assert access.options_for("s3://atlas/y.h5ad") == {"key": "a"}
    assert access.options_for("s3://atlas/x/y.h5ad") == {"key": "x"}
    assert access.options_for("https://h/x") == {"headers": {"A": "b"}}
    assert access.options_for("s3://other/x") == {"anon": True}
    assert Access.of(access) is access and Access.of(None) == parse_options(None)
    other = copy.deepcopy(Access(options={"key": "a"}, retry=Retry(retries=3)))
    assert other.retry.retries == 3 and dict(other) == {"key": "a"} and other
    assert Access(retry=Retry(retries=3)), "it is not taken for nothing where it has no options"
    assert "hunter2" not in repr(Access(options={"key": "hunter2"}))


TOML = '\ufeff["s3://atlas/"]\nkey = "k"\nsecret = "hunter2"\n'


def test_options_from_json_and_files(tmp_path: Path) -> None:
    file = tmp_path / "o.toml"
    file.write_text(TOML, encoding="utf-8")
    wanted = {"s3://atlas/": {"key": "k", "secret": "hunter2"}}
    assert dict(parse_options(f"@{file}")) == wanted
    file.write_text('{"s3://atlas/": {"key": "k", "secret": "hunter2"}}')
    assert dict(parse_options(f"@{file}", Retry(retries=2))) == wanted
    assert dict(parse_options('{"anon": true}')) == {"anon": True}
    assert dict(parse_options("")) == {}


@pytest.mark.parametrize(
    "text",
    [
        '{"secret": "hunter2"', "[1]", "hunter2", '"hunter2"', "@/no/such/hunter", "[" * 200_000,
        '{"a": ' + "1" * 5000 + "}",
    ],
)  # fmt: skip
def test_what_is_no_table_of_options(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(text)
    assert "hunter2" not in str(caught.value) and "@FILE" in str(caught.value)
    if not text.startswith("@"):
        file = tmp_path / "options.toml"
        file.write_text(f"secret = hunter2{text}")
        with pytest.raises(ConfigError) as caught:
            parse_options(f"@{file}")
        assert "hunter2" not in str(caught.value) and str(file) in str(caught.value)
        assert "line 1" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": 5}, "key is text, not int"),
        ({"anon": "yes"}, "anon is true or false, not str"),
        ({"client_kwargs": "eu"}, "client_kwargs is a table, not str"),
        ({"token": []}, "token is a table"),
        ({"s3://x/": 5}, "s3://x/ is a table, not int"),
        ({"s3://x/": {"secret": 5}}, r'\["s3://x/"\] secret is text, not int'),
    ],
)
def test_values_that_an_option_cannot_have(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Storage("s3://x/y", options)


def test_an_option_of_another_store_is_named_for_the_web() -> None:
    for options in ({"hedders": "hunter2"}, {"http://": {"hedders": "hunter2"}}):
        with pytest.raises(ConfigError, match="knows no option 'hedders'") as caught:
            Storage("http://127.0.0.1/x", options).read("")
        assert "begin" in str(caught.value) and "hunter2" not in str(caught.value)
    # One set of keys for S3 does not keep an input from a web server.
    Storage("http://127.0.0.1/x", {"key": "k", "client_kwargs": {}, "headers": {"A": "b"}})
    Storage("http://127.0.0.1/x", {"s3://": {"key": "k"}, "headers": {"A": "b"}})


# --- the rule ------------------------------------------------------------------------------------


class _Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr("scshards.base.retry.time", made)
    return made


def _give_up(retry: Retry, clock: _Clock, each: float = 0.0) -> str:
    def refused(limit: Limit) -> None:
        clock.now += each
        raise ConnectionRefusedError

    with pytest.raises(StorageError) as caught:
        Requests(retry, "s3://b").ask("s3://b/x", refused)
    return str(caught.value)


def test_refused_connections_are_outlived_for_about_a_minute(clock: _Clock) -> None:
    said = _give_up(Retry(), clock)
    assert 40 <= clock.now <= 85
    assert f"ConnectionRefusedError (15 tries in {clock.now:.0f} s)" in said
    assert "--retries and --timeout (14 and 30 s here)" in said and "s3://b/x" in said


def test_a_server_that_hangs_is_given_up_after_two_timeouts_or_the_waits(clock: _Clock) -> None:
    assert "3 tries" in _give_up(Retry(), clock, each=30.0) and 82 < clock.now < 125
    clock.now = 0
    assert "2 tries" in _give_up(Retry(retries=1), clock, each=30.0) and clock.now < 61
    clock.now = 0
    assert "1 try" in _give_up(Retry(retries=0), clock, each=30.0) and clock.now == 30
    clock.now = 0
    _give_up(Retry(retries=100), clock)
    assert 450 < clock.now < 1000, "more retries take longer: no hidden end cuts them short"


def test_bytes_that_come_begin_the_time_anew(clock: _Clock) -> None:
    tries = []

    def broken(limit: Limit) -> None:
        tries.append(1)
        clock.now += 40 if len(tries) < 21 else 61
        if len(tries) < 21:
            limit.got_on()
        raise ConnectionResetError

    retry = Retry(retries=50, timeout=30, longest_wait=1)
    with pytest.raises(StorageError, match="21 tries"):
        Requests(retry, "s3://b").ask("s3://b/x", broken)


# --- web servers ---------------------------------------------------------------------------------


class _Server(http.server.ThreadingHTTPServer):
    """Answers the first requests with statuses (0 hangs up), then with a file, by ranges."""

    daemon_threads = True
    data = bytes(range(256)) * 80_000
    body = b""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.asked = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/d/x.bin"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.asked += 1
        status = self.server.statuses.pop(0) if self.server.statuses else 206
        if status == 0:
            self.connection.close()
            return
        data, first = self.server.body, 0
        self.send_response(status)
        if status == 206:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            data = self.server.data[int(first) : int(last) + 1 if last else None]
            end, size = int(first) + len(data) - 1, len(self.server.data)
            self.send_header("Content-Range", f"bytes {first}-{end}/{size}")
            self.send_header("ETag", f'"{hash(self.server.data)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Nothing is told."""


@pytest.fixture
def server() -> Iterator[_Server]:
    made = _Server()
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


QUICK = Retry(retries=3, timeout=20, first_wait=0.01, longest_wait=0.02)
CALLS = {
    "read": lambda s: s.read("", 0, 5),
    "open": lambda s: s.open().read(5),
    "identity": lambda s: s.identity(),
    "size": lambda s: s.size(""),
    "exists": lambda s: s.exists(""),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [503, 500, 502, 504, 429, 408, 0])
def test_passing_answers_are_outlived_by_every_call(
    server: _Server, status: int, call: str
) -> None:
    server.statuses = [status] * 3
    storage = Storage(server.url, Access(options={"http://": {}}, retry=QUICK))
    CALLS[call](storage)
    assert storage.retried == 3 or status == 0  # aiohttp asks once more itself after a hang-up
    server.statuses = [status] * 100
    with pytest.raises(StorageError, match="tries in") as caught:
        CALLS[call](storage)
    assert (f"answered {status}" if status else "connection failed") in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "denied.* 401"), (403, "denied.* 403"), (404, "no such file"), (410, "no such file")],
)
def test_lasting_answers_are_told_at_once(
    server: _Server, status: int, said: str, call: str
) -> None:
    server.statuses = [status] * 100
    storage = Storage(server.url, Access(retry=QUICK))
    if call == "exists" and status in (404, 410):
        assert not storage.exists("")
    else:
        with pytest.raises(StorageError, match=said):
            CALLS[call](storage)
    assert server.asked == 1 and storage.retried == 0


S3_CALLS = CALLS | {"list": lambda s: s.list(), "folder": lambda s: s.folder()}


@pytest.mark.parametrize("call", S3_CALLS)
def test_every_call_to_a_store_goes_by_the_rule(server: _Server, call: str) -> None:
    endpoint = server.url.removesuffix("/d/x.bin")
    options = {"endpoint_url": endpoint, "key": "k", "secret": "hunter2"}
    storage = Storage("s3://bucket/x", Access(options=options, retry=QUICK))
    for status, tries in ((503, 4), (500, 4), (429, 4), (403, 1)):
        server.statuses, server.asked = [status] * 100, 0
        with pytest.raises(StorageError, match=f"answered {status} ") as caught:
            S3_CALLS[call](storage)
        assert server.asked == tries and "hunter2" not in str(caught.value)


def test_an_address_whose_signature_has_expired(server: _Server) -> None:
    server.statuses = [403]
    server.body = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    with pytest.raises(StorageError, match="have expired") as caught:
        Storage(f"{server.url}?X-Amz-Signature=hunter2").read("")
    assert "signed again" in str(caught.value) and "hunter2" not in str(caught.value)


def test_an_open_file_is_read_anywhere_and_not_of_two_versions(server: _Server) -> None:
    with Storage(server.url, Access(retry=QUICK)).open() as file:
        size = file.seek(0, 2)
        assert size == len(server.data)
        for start in (size - 3, 5, 4 << 20, (4 << 20) - 2):
            file.seek(start)
            assert file.read(100) == server.data[start : start + 100]
        asked = server.asked
        file.seek(9)
        assert file.read(9) == server.data[9:18] and server.asked == asked, "it was kept"
        server.data = bytes(len(server.data))
        file.seek((12 << 20) + 1)
        with pytest.raises(StorageError, match="replaced while it was read"):
            file.read(5)


def test_a_host_that_nobody_knows_is_told_at_once() -> None:
    with pytest.raises(StorageError, match=r"no such host|connection failed"):
        Storage(
            "http://no-such-host.invalid/x", Access(retry=Retry(retries=1, first_wait=0.01))
        ).read("")

"""--storage-options, --retries and --timeout: on every command that reads over a network, and in effect."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from scshards.cli import main


class _Busy(http.server.BaseHTTPRequestHandler):
    """Answers 503 to everything, and counts."""

    asked = 0

    def do_GET(self) -> None:
        _Busy.asked += 1
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing is told."""


@pytest.fixture
def busy() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    _Busy.asked = 0
    yield f"http://127.0.0.1:{server.server_port}/x"
    server.shutdown()
    server.server_close()


COMMANDS = {
    "info": ["info", "{}"],
    "verify": ["verify", "{}"],
    "reshard": ["reshard", "{}", "-o", "new"],
    "merge": ["merge", "{}", "{}/2", "-o", "new"],
    "export": ["export", "{}", "--to", "parquet", "-o", "new"],
    "pack": ["pack", "{}.h5ad", "-o", "new", "--vocab", "v.json"],
    "append": ["pack", "v.json", "-o", "{}", "--append"],
    "vocab check": ["vocab", "check", "v.json", "{}.h5ad"],
    "train": ["train", "{}", "-o", "run"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_busy_server_is_asked_as_often_as_is_said(
    name: str, busy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.json").write_text('{"<pad>": 0, "<cls>": 1, "<eoc>": 2, "A": 3}')
    options = tmp_path / "o.toml"
    options.write_text('key = "hunter2"\n["http://127.0.0.1"]\nheaders = { A = "hunter2" }\n')
    args = [arg.format(busy) for arg in COMMANDS[name]]
    args += ["--retries", "1", "--timeout", "9", "--storage-options", f"@{options}"]
    done = CliRunner().invoke(main, args)
    said = str(done.exception) + done.output
    assert done.exit_code == 1 and "answered 503 (Service Unavailable) (2 tries" in said
    assert "--retries and --timeout (1 and 9 s here)" in said and "hunter2" not in said
    assert 2 <= _Busy.asked <= 6


def test_every_command_with_storage_options_has_the_rule() -> None:
    def commands(of: click.Command) -> Iterator[click.Command]:
        yield of
        context = click.Context(of)
        for name in of.list_commands(context) if isinstance(of, click.Group) else ():
            inner = of.get_command(context, name)
            assert inner is not None
            yield from commands(inner)

    found = 0
    for command in commands(main):
        names = {p.name for p in command.params}
        if "storage_options" in names:
            found += 1
            assert {"retries", "timeout"} <= names, command.name
    assert found > 12

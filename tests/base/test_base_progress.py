"""Progress off a terminal and on one, tables, and how numbers are spelled."""

from __future__ import annotations

import io

import pytest

from scshards.base import progress
from scshards.base.progress import Progress, duration, size, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands in for the time module inside progress."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_now_and_then(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("scatter", 1000, stream=out) as p:
        clock.now += 4
        p.add(100)
        assert out.getvalue() == ""
        clock.now += 6
        p.add(100, note="shard 2")
        clock.now += 5
        p.add(300)
        clock.now += 5
        p.add(500)
    lines = out.getvalue().splitlines()
    assert lines == [
        "scatter: 200 of 1,000 cells (20%), 20 cells/s, 40.0 s left, shard 2",
        "scatter: 1,000 of 1,000 cells (100%), 50 cells/s, 0.0 s left",
        "scatter: 1,000 cells in 20.0 s (50 cells/s)",
    ]


def test_no_total(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("read", None, "files", stream=out) as p:
        clock.now += 10
        p.add(5)
    assert out.getvalue().splitlines()[0] == "read: 5 files, 0.5 files/s"


def test_silence(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("read", 5, stream=out, shown=False) as p:
        clock.now += 60
        p.add(5)
    assert out.getvalue() == "" and p.done == 5 and p.seconds == 60


def test_no_closing_line_after_an_error(clock: Clock) -> None:
    out = io.StringIO()
    with pytest.raises(KeyError), Progress("read", 5, stream=out) as p:
        p.add(1)
        raise KeyError
    assert out.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    out = Terminal()
    with Progress("pack", 10, stream=out) as p:
        p.add(10, note="done")
    assert "pack" in out.getvalue() and "10" in out.getvalue() and "\r" in out.getvalue()


def test_table() -> None:
    text = table(
        ["file", "cells", "share", "ok"],
        [["a.h5ad", 12345, 0.5, True], ["longer.h5ad", None, 12345.678, False]],
    )
    assert text.splitlines() == [
        "file          cells   share   ok",
        "-----------  ------  ------  ---",
        "a.h5ad       12,345     0.5  yes",
        "longer.h5ad       -  12,346   no",
    ]


def test_table_without_rows() -> None:
    assert table(["a", "bc"], []).splitlines() == ["a  bc", "-  --"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (4.21, "4.2 s"),
        (185.9, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (float("inf"), "unknown time"),
        (float("nan"), "unknown time"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (812, "812 B"), (4200, "4.2 kB"), (4.2e6, "4.2 MB"), (1e9, "1.0 GB"), (2e12, "2.0 TB"), (3e15, "3000.0 TB")],
)  # fmt: skip
def test_size(n: float, text: str) -> None:
    assert size(n) == text

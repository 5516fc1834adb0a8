"""Progress off a terminal and on one, tables, and how numbers are spelled."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base import progress
from scshards.base.progress import (
    Progress,
    display_width,
    duration,
    printable,
    shorten,
    size,
    table,
)


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


def test_bytes_are_shown_as_a_rate(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("write", 1000, stream=out) as p:
        clock.now += 10
        p.add(100, bytes=25_000_000)
        clock.now += 10
        p.add(900, bytes=15_000_000)
    assert out.getvalue().splitlines() == [
        "write: 100 of 1,000 cells (10%), 10 cells/s, 2.5 MB/s, 1 min 30 s left",
        "write: 1,000 of 1,000 cells (100%), 50 cells/s, 2.0 MB/s, 0.0 s left",
        "write: 1,000 cells in 20.0 s (50 cells/s, 2.0 MB/s)",
    ]
    assert p.bytes == 40_000_000


def test_what_an_earlier_run_has_done_is_no_speed(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("write", 1000, initial=900, stream=out) as p:
        clock.now += 10
        p.add(50)
        p.add(50)
    assert out.getvalue().splitlines() == [
        "write: 950 of 1,000 cells (95%), 5 cells/s, 10.0 s left",
        "write: 1,000 cells (900 of them before) in 10.0 s (10 cells/s)",
    ]


def test_nothing_done_yet_has_no_time_left(clock: Clock) -> None:
    with Progress("write", 1000, stream=io.StringIO()) as p:
        clock.now += 10
        assert p.line() == "write: 0 of 1,000 cells (0%), 0 cells/s, unknown time left"


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


def test_a_bar_shows_bytes_and_note() -> None:
    out = Terminal()
    with Progress("pack", 10, stream=out) as p:
        p.add(4, note="shard 1", bytes=10**15)
        assert p._bar.postfix.endswith("TB/s, shard 1")
        p.add(6, bytes=0)
    assert "TB/s" in out.getvalue()


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


def test_table_of_wide_and_combining_characters() -> None:
    # Each line's second column begins in the same column of a terminal.
    text = table(["name", "n"], [["細胞.h5ad", 1], ["e\u0301t\u00e9", 20], ["a\u200bb", 3]])
    assert text.splitlines() == [
        "name        n",
        "---------  --",
        "細胞.h5ad   1",
        "e\u0301t\u00e9        20",
        "a\u200bb          3",
    ]


def test_table_of_names_that_would_break_its_lines() -> None:
    text = table(["name", "n"], [["a\nb\x1b[31m\udcff\u2028", 1]])
    assert text.splitlines()[-1] == r"a\nb\x1b[31m\udcff\u2028  1"
    text.encode()


def test_table_with_a_total() -> None:
    text = table(["name", "n", "x"], [["a", 1, None], ["b", 20, 1.5]], total=["all", 1021, None])
    assert text.splitlines() == [
        "name      n    x",
        "----  -----  ---",
        "a         1    -",
        "b        20  1.5",
        "----  -----  ---",
        "all   1,021    -",
    ]


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("", 0),
        ("abc", 3),
        ("細胞", 4),
        ("e\u0301", 1),
        ("\u200d", 0),
        ("ｱ", 1),
        ("🧬", 2),
        ("Ω", 1),
    ],
)
def test_display_width(text: str, width: int) -> None:
    assert display_width(text) == width


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain é 細胞", "plain é 細胞"), ("a\tb", r"a\tb"), ("\x7f", r"\x7f"), ("\u2029", r"\u2029"),
     ("\udc80", r"\udc80"), ("a\u200db", "a\u200db")],
)  # fmt: skip
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.integers(5, 30))
def test_shorten(text: str, width: int) -> None:
    short = shorten(text, width)
    assert display_width(short) <= width
    if display_width(text) <= width:
        assert short == text
    else:
        assert "..." in short and display_width(short) >= width - 2
        head, _, tail = short.partition("...") if "..." not in text else ("", "", "")
        assert text.startswith(head) and text.endswith(tail)


def test_shorten_keeps_the_end_of_a_path() -> None:
    assert shorten("s3://bucket/atlas/lung/donor-0017.h5ad", 26) == "s3://bu.../donor-0017.h5ad"


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

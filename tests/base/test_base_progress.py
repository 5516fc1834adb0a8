"""Progress off a terminal and on one, tables, and how numbers are spelled."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base import progress
from scshards.base.progress import (
    CLEAR_LINE,
    Progress,
    Table,
    counted,
    display_width,
    duration,
    printable,
    shorten,
    size,
    styled,
)

BAR = "\u2501"


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
        "scatter: shard 2, 200 of 1,000 cells (20%), 40.0 s left, 20 cells/s",
        "scatter: 1,000 of 1,000 cells (100%), 0.0 s left, 50 cells/s",
        "scatter: 1,000 cells in 20.0 s (50 cells/s)",
    ]


def test_no_total(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("read", None, "files", stream=out) as p:
        clock.now += 10
        p.add(5)
    assert out.getvalue().splitlines() == [
        "read: 5 files, 0.5 files/s",
        "read: 5 files in 10.0 s (0.5 files/s)",
    ]


def test_bytes_are_shown_as_a_rate(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("write", 1000, stream=out) as p:
        clock.now += 10
        p.add(100, bytes=25_000_000)
        clock.now += 10
        p.add(900, bytes=15_000_000)
    assert out.getvalue().splitlines() == [
        "write: 100 of 1,000 cells (10%), 1 min 30 s left, 10 cells/s, 2.5 MB/s",
        "write: 1,000 of 1,000 cells (100%), 0.0 s left, 50 cells/s, 2.0 MB/s",
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
        "write: 950 of 1,000 cells (95%), 10.0 s left, 5 cells/s",
        "write: 1,000 cells (900 of them before) in 10.0 s (10 cells/s)",
    ]


def test_nothing_done_yet_has_no_time_left(clock: Clock) -> None:
    with Progress("write", 1000, stream=io.StringIO()) as p:
        clock.now += 10
        assert p.line() == "write: 0 of 1,000 cells (0%), unknown time left, 0 cells/s"


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


def drawn(out: io.StringIO) -> list[str]:
    """What each drawing of the line shows, without colours."""
    return [re.sub(r"\x1b\[\d+m", "", d) for d in out.getvalue().split(CLEAR_LINE)[1:]]


def test_a_bar_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with Progress("2/3 reading cells", 4000, stream=out) as p:
        clock.now += 0.05
        p.add(1)
        clock.now += 1.95
        p.add(1999, note="shard 1", bytes=10**6)
    # What does not fit is left out as a whole; the bar is what is left of the line.
    first, second, last = drawn(out)
    assert first == "2/3 reading cells  0 of 4,000 cells (0%), unknown time left, 0 cells/s"
    assert (
        second
        == f"2/3 reading cells  {BAR * 5}{' ' * 8}shard 1, 2,000 of 4,000 cells (50%), 2.0 s left"
    )
    assert last == "2/3 reading cells: 2,000 cells in 2.0 s (1,000 cells/s, 500.0 kB/s)\n"
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    with Progress("pack", 4, "inputs", stream=out) as p:
        clock.now += 2
        p.add(1)
    assert (
        drawn(out)[1]
        == f"pack  {BAR * 10}{' ' * 30}  1 of 4 inputs (25%), 6.0 s left, 0.5 inputs/s"
    )
    assert drawn(out)[-1] == "pack: 1 input in 2.0 s (0.5 inputs/s)\n"


@pytest.mark.parametrize("columns", [12, 20, 40, 80, 160])
def test_a_bar_fits_the_terminal(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    with Progress("train", 10**9, "steps", stream=out) as p:
        for note in ("", "masked MSE 784.2", "loss " * 50, "細胞" * 50):
            clock.now += 1
            p.add(10**7, note)
    for line in drawn(out)[:-1]:
        assert display_width(line) < columns


def test_a_bar_is_gone_after_an_error(clock: Clock) -> None:
    out = Terminal()
    with pytest.raises(KeyError), Progress("read", 5, stream=out):
        raise KeyError
    assert out.getvalue().endswith(CLEAR_LINE)


@pytest.mark.parametrize(
    ("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("NO_COLOR", "")]
)
def test_colours_are_for_terminals_that_show_them(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert (
        styled("x", "1", Terminal()) == "\x1b[1mx\x1b[0m" and styled("x", "1", io.StringIO()) == "x"
    )
    monkeypatch.setenv(variable, value)
    assert (styled("x", "1", Terminal()) == "x") == bool(value)


@pytest.mark.parametrize(
    ("n", "units", "said"),
    [(1, "cells", "1 cell"), (0, "cells", "0 cells"), (2000, "inputs", "2,000 inputs"),
     (1, "indexes", "1 index"), (1, "queries", "1 query"), (1, "genes", "1 gene")],
)  # fmt: skip
def test_counted(n: int, units: str, said: str) -> None:
    assert counted(n, units) == said


def test_a_table_that_has_to_fit() -> None:
    rows = [["s3://bucket/atlas/lung/donor-0017.h5ad", 123_456_789, "a long text, " * 9]]
    lines = Table(["input", "values", "such as"], rows).text(width=80).splitlines()
    assert max(map(len, lines)) == 80 and "123,456,789" in lines[2]
    assert lines[2].startswith("s3://buck...") and "donor-0017.h5ad  123" in lines[2]
    narrow = Table(["input", "values", "such as"], rows).text(width=30).splitlines()
    # Numbers stay as they are, and texts keep a few letters.
    assert "s3:.../0017.h5ad"[:3] in narrow[2] and "123,456,789" in narrow[2]
    assert (
        Table(["input", "values", "such as"], rows).text().splitlines()[2].count("a long text") == 9
    )


def test_table() -> None:
    table = Table(
        ["file", "cells", "share", "ok"],
        [["a.h5ad", 12345, 0.5, True], ["longer.h5ad", None, 12345.678, False]],
    )
    assert table.text().splitlines() == [
        "file          cells   share   ok",
        "-----------  ------  ------  ---",
        "a.h5ad       12,345     0.5  yes",
        "longer.h5ad       -  12,346   no",
    ]


def test_table_without_rows() -> None:
    assert Table(["a", "bc"], []).text().splitlines() == ["a  bc", "-  --"]


def test_table_of_wide_and_combining_characters() -> None:
    # Each line's second column begins in the same column of a terminal.
    table = Table(["name", "n"], [["細胞.h5ad", 1], ["e\u0301t\u00e9", 20], ["a\u200bb", 3]])
    assert table.text().splitlines() == [
        "name        n",
        "---------  --",
        "細胞.h5ad   1",
        "e\u0301t\u00e9        20",
        "a\u200bb          3",
    ]


def test_table_of_names_that_would_break_its_lines() -> None:
    table = Table(["name", "n"], [["a\nb\x1b[31m\udcff\u2028", 1]])
    assert table.text().splitlines()[-1] == r"a\nb\x1b[31m\udcff\u2028  1"
    table.text().encode()


def test_table_with_a_total() -> None:
    table = Table(["name", "n", "x"], [["a", 1, None], ["b", 20, 1.5]], total=["all", 1021, None])
    assert table.text().splitlines() == [
        "name      n    x",
        "----  -----  ---",
        "a         1    -",
        "b        20  1.5",
        "----  -----  ---",
        "all   1,021    -",
    ]


def test_columns_for_which_there_is_no_room() -> None:
    table = Table(["name", "n", "x"], [["a" * 30, 1, 2]], total=["all", 1, 2], more=("n",))
    assert [line.split() for line in table.text(width=20).splitlines()[::2]] == [
        ["name", "x"], ["aaaa...aaaaaaaaaa", "2"], ["all", "2"],
    ]  # fmt: skip
    assert table.text(wide=True).splitlines()[2].split() == ["a" * 30, "1", "2"]


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

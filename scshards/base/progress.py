"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere; tables.

Progress goes to standard error, so that standard output stays for results (`--json`). Own code in place
of rich and tqdm: no thread or redirected stream gets in the way of workers that are forked, a table cuts
names in their middle, where rich wraps or cuts their ends, and no command waits for an import.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TextIO

LINE_EVERY_S = 10.0
BAR_EVERY_S = 0.1

CLEAR_LINE = "\r\x1b[K"
"""What takes a bar off its line, for those who write to the same terminal."""

_LEAST_TEXT = 12
"""Columns that a text of a table is left, however narrow the terminal."""

_NOT_SHOWN = ("Cc", "Cs", "Zl", "Zp")
_NO_WIDTH = ("Mn", "Me", "Cf")
_CUT = "..."


class Progress:
    """Counts towards a total, with rates and time left; a context manager.

    Parameters
    ----------
    label
        What is being done, such as ``"2/3 reading cells"``.
    total
        How many units in all, or None when unknown.
    unit
        The unit counted, in plural, such as ``"cells"``.
    shown
        False counts in silence.
    initial
        Units of the total that an earlier run has done: they are counted, but not into the rates.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "cells",
        *,
        shown: bool = True,
        initial: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.shown = label, total, unit, shown
        self.initial = self.done = initial
        self.bytes = 0
        self.note = ""
        self._stream = stream or sys.stderr
        self._start = self._last = time.monotonic()
        self._has_bar = shown and self._stream.isatty()
        self._every = BAR_EVERY_S if self._has_bar else LINE_EVERY_S
        if self._has_bar:
            self._draw()

    def add(self, n: int, note: str = "", *, bytes: int = 0) -> None:
        """Count `n` more units and the bytes they took; `note` is shown, too."""
        self.done += n
        self.bytes += bytes
        self.note = note
        if self.shown and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            if self._has_bar:
                self._draw()
            else:
                print(self.line(), file=self._stream, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units a second in this run."""
        return (self.done - self.initial) / max(self.seconds, 1e-9)

    def line(self) -> str:
        """One plain line: done, total, time left and rates."""
        return f"{self.label}: {', '.join(self._said())}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._has_bar:
            self._stream.write(CLEAR_LINE)
        if self.shown and error[0] is None:
            before = f" ({self.initial:,} of them before)" if self.initial else ""
            print(
                f"{self.label}: {counted(self.done, self.unit)}{before} in {duration(self.seconds)} "
                f"({', '.join(self._rates())})",
                file=self._stream,
                flush=True,
            )

    def _said(self) -> list[str]:
        """What there is to say, the most important first."""
        if self.total:
            share = 100 * self.done / self.total
            left = (self.total - self.done) / self.rate if self.rate else float("inf")
            said = [f"{self.done:,} of {counted(self.total, self.unit)} ({share:.0f}%)"]
            said.append(f"{duration(left)} left")
        else:
            said = [counted(self.done, self.unit)]
        return [*([self.note] if self.note else []), *said, *self._rates()]

    def _draw(self) -> None:
        """The line again, as much of it as fits, with a bar where there is room for one."""
        room = shutil.get_terminal_size().columns - 1 - display_width(f"{self.label}  ")
        said = self._said()
        while len(said) > 1 and display_width(", ".join(said)) > room:
            said.pop()
        words = _first(", ".join(said), room)
        length = min(room - display_width(f"{words}  "), 40)
        bar = ""
        if self.total and length >= 8:
            full = min(length * self.done // self.total, length)
            bar = styled("\u2501" * full, "36", self._stream) + " " * (length - full) + "  "
        self._stream.write(f"{CLEAR_LINE}{self.label}  {bar}{words}")
        self._stream.flush()

    def _rates(self) -> list[str]:
        rates = [f"{_rate(self.rate)} {self.unit}/s"]
        return [*rates, f"{size(self.bytes / max(self.seconds, 1e-9))}/s"] if self.bytes else rates


@dataclass(frozen=True)
class Table:
    """An aligned text table: numbers to the right with thousands marked, the rest to the left.

    Columns are aligned by what a terminal shows: wide characters count twice. Nothing in a cell can
    break a line: control characters are spelled out.

    Attributes
    ----------
    header, rows
        The names of the columns, and what they hold.
    total
        A last row below a line.
    more
        The columns of which there is room in a wide table alone.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    total: Sequence[object] | None = None
    more: Collection[str] = ()

    def text(self, *, wide: bool = False, width: int | None = None) -> str:
        """The table; texts, never numbers, are shortened until it fits into `width` columns.

        By default those are the terminal's, and there is no limit where the output is none. A wide one
        has all columns, whole.
        """
        shown = [i for i, name in enumerate(self.header) if wide or name not in self.more]
        rows = [self.header, *self.rows, *([] if self.total is None else [self.total])]
        columns = [[r[i] for r in rows] for i in shown]
        right = [
            len(rows) > 1 and all(isinstance(v, int | float) or v is None for v in column[1:])
            for column in columns
        ]
        cells = [[_show(v) for v in column] for column in columns]
        widths = [max(map(display_width, column)) for column in cells]
        if width is None:
            is_bounded = sys.stdout.isatty() and not wide
            width = shutil.get_terminal_size().columns if is_bounded else 1 << 30
        texts = [i for i, to_right in enumerate(right) if not to_right]
        while texts and sum(widths) + 2 * len(widths) - 2 > width:
            i = max(texts, key=widths.__getitem__)
            if widths[i] <= _LEAST_TEXT:
                break
            widths[i] -= 1

        def padded(text: str, width: int, to_right: bool) -> str:
            text = shorten(text, width)
            pad = " " * (width - display_width(text))
            return pad + text if to_right else text + pad

        lines = [
            "  ".join(map(padded, row, widths, right)).rstrip() for row in zip(*cells, strict=True)
        ]
        lines[0] = styled(lines[0], "1", sys.stdout)
        rule = "  ".join("-" * w for w in widths)
        lines.insert(1, rule)
        if self.total is not None:
            lines.insert(-1, rule)
        return "\n".join(lines)


def styled(text: str, code: str, stream: TextIO) -> str:
    """Text in a colour or weight, by its number, where the stream is a terminal that shows some."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain or not text else f"\x1b[{code}m{text}\x1b[0m"


def counted(n: int, units: str) -> str:
    """A number with its unit, which is given in plural: `1 input`, `2,000 inputs`."""
    one = (
        re.sub("ies$", "y", units)
        if units.endswith("ies")
        else re.sub("(?<=[xh])es$|s$", "", units)
    )
    return f"{n:,} {one if n == 1 else units}"


def printable(text: str) -> str:
    """Text that stays on its line and can be written anywhere: what can't be shown is spelled out.

    Control characters, line separators and the lone surrogates of file names that are no UTF-8
    become backslash escapes.
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _NOT_SHOWN else c
        for c in text
    )


def display_width(text: str) -> int:
    """How many columns of a terminal a text takes: East Asian wide characters two, accents none."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in _NO_WIDTH
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def shorten(text: str, width: int) -> str:
    """A text of at most `width` columns (5 or more): its beginning, `...` and more of its end."""
    if display_width(text) <= width:
        return text
    assert width > len(_CUT) + 1
    room = width - len(_CUT)
    head, tail = _first(text, room // 3), _first(text[::-1], room - room // 3)[::-1]
    return head + _CUT + tail


def duration(seconds: float) -> str:
    """Seconds as `4.2 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds != seconds or seconds == float("inf"):
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def size(n_bytes: float) -> str:
    """Bytes as `812 B`, `4.2 MB` and so on, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def _rate(rate: float) -> str:
    """Two digits of a slow rate, whole numbers of a fast one."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _first(text: str, width: int) -> str:
    """As much of the beginning of a text as fits into so many columns."""
    used = 0
    for i, c in enumerate(text):
        used += display_width(c)
        if used > width:
            return text[:i]
    return text


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return printable(str(value))

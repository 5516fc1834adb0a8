"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere; tables.

Called by pack, verify, train and the command line. Everything goes to standard error, so that
standard output stays for results (`--json`).
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO

LINE_EVERY_S = 10.0

_NOT_SHOWN = ("Cc", "Cs", "Zl", "Zp")
_NO_WIDTH = ("Mn", "Me", "Cf")
_CUT = "..."


class Progress:
    """Counts towards a total, with rates and time left; a context manager.

    Parameters
    ----------
    label
        What is being done, such as ``"scatter"``.
    total
        How many units in all, or None when unknown.
    unit
        The unit counted, such as ``"cells"``.
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
        self._bar: Any = None
        if shown and self._stream.isatty():
            from tqdm import tqdm

            # Its watching thread would keep pack from forking its workers.
            tqdm.monitor_interval = 0
            self._bar = tqdm(
                total=total,
                unit=f" {unit}",
                desc=label,
                file=self._stream,
                unit_scale=True,
                initial=initial,
            )

    def add(self, n: int, note: str = "", *, bytes: int = 0) -> None:
        """Count `n` more units and the bytes they took; `note` is shown at the end of the line."""
        self.done += n
        self.bytes += bytes
        self.note = note
        if self._bar is not None:
            postfix = ", ".join(part for part in (self._byte_rate(), note) if part)
            if postfix:
                self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(n)
        elif self.shown and time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            self._print(self.line())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units a second in this run."""
        return (self.done - self.initial) / max(self.seconds, 1e-9)

    def line(self) -> str:
        """One plain line: done, total, rates and time left."""
        if self.total:
            share = 100 * self.done / self.total
            parts = [f"{self.label}: {self.done:,} of {self.total:,} {self.unit} ({share:.0f}%)"]
            left = (self.total - self.done) / self.rate if self.rate else float("inf")
            parts += [*self._rates(), f"{duration(left)} left"]
        else:
            parts = [f"{self.label}: {self.done:,} {self.unit}", *self._rates()]
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown and kind is None:
            before = f" ({self.initial:,} of them before)" if self.initial else ""
            self._print(
                f"{self.label}: {self.done:,} {self.unit}{before} in {duration(self.seconds)} "
                f"({', '.join(self._rates())})"
            )

    def _rates(self) -> list[str]:
        rates = [f"{_rate(self.rate)} {self.unit}/s"]
        return [*rates, self._byte_rate()] if self.bytes else rates

    def _byte_rate(self) -> str:
        return f"{size(self.bytes / max(self.seconds, 1e-9))}/s" if self.bytes else ""

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    total: Sequence[object] | None = None,
) -> str:
    """An aligned text table: numbers to the right with thousands marked, the rest to the left.

    `total` is a last row below a line. Columns are aligned by what a terminal shows: wide characters
    count twice. Nothing in a cell can break a line: control characters are spelled out.
    """
    body = [list(r) for r in rows]
    every = body if total is None else [*body, list(total)]
    cells = [[_show(v) for v in r] for r in (list[object](header), *every)]
    widths = [max(display_width(r[i]) for r in cells) for i in range(len(header))]
    right = [
        bool(every) and all(isinstance(r[i], int | float) or r[i] is None for r in every)
        for i in range(len(header))
    ]
    lines = []
    for r in cells:
        padded = (
            pad + v if to_right else v + pad
            for v, to_right, pad in (
                (v, to_right, " " * (w - display_width(v)))
                for v, w, to_right in zip(r, widths, right, strict=True)
            )
        )
        lines.append("  ".join(padded).rstrip())
    rule = "  ".join("-" * w for w in widths)
    lines.insert(1, rule)
    if total is not None:
        lines.insert(-1, rule)
    return "\n".join(lines)


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
    assert width > len(_CUT) + 1
    if display_width(text) <= width:
        return text
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


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number with its unit: `1 input`, `2,000 inputs`, `3 indexes` of ("index", "indexes")."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


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

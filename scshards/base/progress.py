"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere; tables.

Called by pack, verify, train and the command line. Everything goes to standard error, so that
standard output stays for results (`--json`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO

LINE_EVERY_S = 10.0


class Progress:
    """Counts towards a total, with rate and time left; a context manager.

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
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "cells",
        *,
        shown: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.shown = label, total, unit, shown
        self.done = 0
        self.note = ""
        self._stream = stream or sys.stderr
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if shown and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, unit=f" {unit}", desc=label, file=self._stream, unit_scale=True
            )

    def add(self, n: int, note: str = "") -> None:
        """Count `n` more units; `note` is shown at the end of the line."""
        self.done += n
        self.note = note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif self.shown and time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            self._print(self.line())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def line(self) -> str:
        """One plain line: done, total, rate and time left."""
        rate = self.done / max(self.seconds, 1e-9)
        parts = [f"{self.label}: {self.done:,}"]
        if self.total:
            parts[0] += f" of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f}%)"
            left = (self.total - self.done) / rate if rate else float("inf")
            parts += [f"{_rate(rate)} {self.unit}/s", f"{duration(left)} left"]
        else:
            parts[0] += f" {self.unit}"
            parts += [f"{_rate(rate)} {self.unit}/s"]
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
            rate = self.done / max(self.seconds, 1e-9)
            self._print(
                f"{self.label}: {self.done:,} {self.unit} in {duration(self.seconds)} "
                f"({_rate(rate)} {self.unit}/s)"
            )

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An aligned text table: numbers to the right with thousands marked, the rest to the left."""
    rows = [list(r) for r in rows]
    cells = [list(header)] + [[_show(v) for v in r] for r in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    right = [
        bool(rows) and all(isinstance(r[i], int | float) or r[i] is None for r in rows)
        for i in range(len(header))
    ]
    lines = []
    for r in cells:
        lines.append(
            "  ".join(
                v.rjust(w) if to_right else v.ljust(w)
                for v, w, to_right in zip(r, widths, right, strict=True)
            ).rstrip()
        )
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


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


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)

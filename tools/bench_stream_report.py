"""What a part of tools/bench_stream finds, and how it is measured: in rounds, and by the median."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from scshards.base import progress

Figures = dict[str, float]
Table = Callable[[Sequence[str], Iterable[Sequence[object]]], str]


@dataclass
class Part:
    """Figures of each thing that was measured, and the bars.

    Attributes
    ----------
    rows
        {thing: {name: median}}.
    bars
        (what, measured, "at least" or "at most", bar).
    notes
        Lines for the reader.
    """

    rows: dict[str, Figures]
    bars: list[tuple[str, float, str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self, table: Table) -> str:
        """Tables of the figures and of the bars, made by `table`, and the notes."""
        header = ["", *dict.fromkeys(name for row in self.rows.values() for name in row)]
        body = [(what, *(row.get(name) for name in header[1:])) for what, row in self.rows.items()]
        parts = [table(header, body)]
        if self.bars:
            bars = [(*bar, "met" if _is_met(*bar[1:]) else "missed") for bar in self.bars]
            parts.append(table(("", "measured", "", "bar", ""), bars))
        return "\n\n".join([*parts, *self.notes])


def plain(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for a terminal."""
    return progress.Table(header, list(rows)).text()


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for docs/explanation/measurements.md: three digits of each number."""

    def show(value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return str(value)

    lines = [header, ["---"] * len(header), *([show(v) for v in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_turn(measured: Mapping[str, Callable[[], Figures]], runs: int) -> dict[str, Figures]:
    """The medians of several rounds, in each of which everything is measured once."""
    taken: dict[str, list[Figures]] = {what: [] for what in measured}
    for i in range(runs):
        for what, measure in measured.items():
            print(f"run {i + 1} of {runs}: {what}", file=sys.stderr, flush=True)
            taken[what].append(measure())
    return {
        what: {name: statistics.median(f[name] for f in figures) for name in figures[0]}
        for what, figures in taken.items()
    }


def _is_met(measured: float, side: str, bar: float) -> bool:
    return measured >= bar if side == "at least" else measured <= bar

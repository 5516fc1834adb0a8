"""Measures the stream beside its peers; see tools/bench_stream.

Every figure is a median of runs that were taken in turn, each in a process of its own. "Memory" is what
a process had at most beyond what it had when everything was imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_stream_jobs as jobs
from bench_process import in_process, machine
from bench_stream_data import Data

from scshards.base.progress import table

Figures = dict[str, float]


@dataclass
class Part:
    """What a part found: a figure or more for each thing that was measured, and the bars."""

    rows: dict[str, Figures]
    bars: list[tuple[str, float, str, float]] = field(default_factory=list)
    """(what, measured, "at least" or "at most", bar)"""
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        header = ["", *dict.fromkeys(name for row in self.rows.values() for name in row)]
        body = [(what, *(row.get(name) for name in header[1:])) for what, row in self.rows.items()]
        parts = [table(header, body)]
        if self.bars:
            bars = [(*bar, "met" if _is_met(*bar[1:]) else "MISSED") for bar in self.bars]
            parts.append(table(("", "measured", "", "bar", ""), bars))
        return "\n\n".join([*parts, *self.notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join([*PARTS, "all"]))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--cache", type=Path, default=_cache(), metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = set(args.parts) - {*PARTS, "all"}
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    parts = list(PARTS) if not args.parts or "all" in args.parts else args.parts
    about = machine("numpy", "numba", "torch", "webdataset")
    if not args.json:
        print(about)
    data = Data(args.cache, args.cells)
    data.warm()
    in_process(jobs.compile_kernels, str(data.own))
    found: dict[str, Part] = {}
    for name in parts:
        found[name] = PARTS[name](data, args.runs)
        if not args.json:
            print(f"\n{name}\n\n{found[name].text()}", flush=True)
    if args.json:
        figures = {name: {"figures": p.rows, "bars": p.bars} for name, p in found.items()}
        print(json.dumps({"machine": about.splitlines(), "runs": args.runs, **figures}))


def speed(data: Data, runs: int) -> Part:
    """An epoch of ten times the cells, so that its beginning and end weigh as they do in training."""
    long, short = str(data.repeated(10 * data.cells)), str(data.own)
    stock = str(data.stock)
    slow = min(data.cells, 4000)
    measured: dict[str, Callable[[], Figures]] = {
        "51 bins, 2 threads": _epoch(long, {"threads": 2}),
        "51 bins, 1 thread": _epoch(long, {"threads": 1}),
        "51 bins, 1 thread on one core": _epoch(long, {"threads": 1}, pinned=True),
        "no bins, 2 threads": _epoch(long, {"threads": 2, "n_bins": 0}),
        "no bins, 1 thread": _epoch(long, {"threads": 1, "n_bins": 0}),
        f"51 bins, 2 threads, an epoch of {data.cells:,}": _epoch(short, {"threads": 2}),
        "stock webdataset, scGPT's collator, one core": lambda: in_process(
            jobs.stock, stock, slow, True, False
        ),
        "... without bins": lambda: in_process(jobs.stock, stock, slow, False, False),
        "scGPT's collator alone, cells in memory, one core": lambda: in_process(
            jobs.stock, stock, slow, True, True
        ),
    }
    rows = _in_turn(measured, runs)
    speeds = {what: row["cells/s"] for what, row in rows.items()}
    two, one = speeds["51 bins, 2 threads"], speeds["51 bins, 1 thread"]
    rival = speeds["stock webdataset, scGPT's collator, one core"]
    return Part(
        rows,
        [
            ("51 bins, 2 threads, cells/s", two, "at least", 100_000.0),
            ("... against stock webdataset with scGPT's collator", two / rival, "at least", 40.0),
            ("... one thread against two", one / two, "at least", 0.5),
            ("no bins, 2 threads, cells/s", speeds["no bins, 2 threads"], "at least", 150_000.0),
        ],
    )


PARTS: dict[str, Callable[[Data, int], Part]] = {"speed": speed}


def _epoch(root: str, options: dict[str, Any], pinned: bool = False) -> Callable[[], Figures]:
    return lambda: in_process(jobs.epoch, root, options, pinned)


def _in_turn(measured: dict[str, Callable[[], Figures]], runs: int) -> dict[str, Figures]:
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


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scshards-bench"


if __name__ == "__main__":
    main()

"""Measures the stream beside its peers; see tools/bench_stream.

Every figure is a median of runs that were taken in turn, each in a process of its own. "Memory" is what
a process had at most beyond what it had when everything was imported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import bench_stream_jobs as jobs
from bench_process import in_process, machine
from bench_stream_data import Data
from bench_stream_parts import PARTS
from bench_stream_report import Part, markdown, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join([*PARTS, "all"]))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--cache", type=Path, default=_cache(), metavar="FOLDER")
    parser.add_argument(
        "--annbatch",
        default=sys.executable,
        metavar="PYTHON",
        help="a Python that has annbatch[zarrs]",
    )
    parser.add_argument(
        "--datasets",
        default=sys.executable,
        metavar="PYTHON",
        help="a Python that has torch and Hugging Face's datasets",
    )
    parser.add_argument(
        "--beside", type=Path, metavar="TREE", help="another checkout of scshards, measured too"
    )
    parser.add_argument("--markdown", action="store_true", help="tables for the page Performance")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = set(args.parts) - {*PARTS, "all"}
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    parts = list(PARTS) if not args.parts or "all" in args.parts else args.parts
    about = machine("numpy", "numba", "torch", "webdataset")
    if not args.json:
        print(about, flush=True)
    data = Data(
        args.cache,
        args.cells,
        annbatch_python=args.annbatch,
        datasets_python=args.datasets,
        beside=args.beside,
    )
    data.warm()
    in_process(jobs.compile_kernels, str(data.own))
    found: dict[str, Part] = {}
    for name in parts:
        found[name] = PARTS[name](data, args.runs)
        if not args.json:
            print(
                f"\n{name}\n\n{found[name].text(markdown if args.markdown else plain)}", flush=True
            )
    if args.json:
        figures = {name: {"figures": p.rows, "bars": p.bars} for name, p in found.items()}
        print(json.dumps({"machine": about.splitlines(), "runs": args.runs, **figures}))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scshards-bench"


if __name__ == "__main__":
    main()

"""Measures how cost grows with cells, shards, sources and ranks; see tools/bench_scale."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import bench_scale_jobs as jobs
import numpy as np
from bench_pack_data import NAMES, sparse_cells, write_h5ad
from bench_process import in_process, machine
from bench_stream_data import Data
from bench_stream_report import markdown, plain

from scshards.base.progress import counted

Figures = dict[str, float]
Rows = dict[int, Figures]
"""Figures by what grows."""

FILE_CELLS = 1_000_000
"""Cells of an input file at most."""

DONORS, TYPES = 1000, 100
RANKS = (1, 4, 16, 64)
SIMULATED = 100_000_000, 12_000

TRAIN = (
    "data.max_length=64", "model.d_model=64", "model.d_hid=64", "model.n_heads=4", "model.n_layers=2",
    "model.dropout=0.0", "run.steps=60", "run.batch_size=64", "run.log_every=10", "run.eval_every=60",
)  # fmt: skip

GROWS = {
    "cells": "pack, verify, stream, resume and train",
    "sources": "a pack of as many cells from more files",
    "shards": "a pack of as many cells into more shards",
    "ranks": "one rank's share of an epoch of the largest set, among more ranks",
    "simulated": f"{SIMULATED[0]:,} cells in {SIMULATED[1]:,} shards, the manifest alone",
}

DRAWN = {
    "cells": ("pack, s", "verify, s", "pack, memory, MB", "stream, memory, MB", "manifest, MB"),
    "sources": ("s", "memory, MB"),
    "shards": ("s", "memory, MB", "manifest, MB", "open, s"),
    "ranks": ("requests", "memory, MB", "first batch, s"),
    "simulated": ("open, s", "plan, s", "replay, s", "requests an epoch"),
}
"""The curves of each picture."""

_READ = """\
The cells have 50 values each, so that many of them fit on a disk. A slope is that of the line through
the logarithms: 0 means that it stays the same, 1 that it grows in proportion. Memory of a command is
what all of its processes had at once; that of a stream is what the process had beyond imports, for two
million cells of an epoch at most."""

_SIMULATED = """\
Nothing of it was read: there is only the manifest that such a set would have. Replay is what a resume
at 90 % of an epoch computes before it reads; requests are the chunks that a rank's lanes touch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(GROWS))
    parser.add_argument("--cells", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the page and its pictures"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(GROWS):
        parser.error(f"no such part: {', '.join(unknown)}")
    about = machine("numpy", "numba", "torch")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="scshards-scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Rows] = {}
    try:
        for part in args.parts or GROWS:
            measure: Callable[[Path, int], Rows] = globals()[f"measure_{part}"]
            found[part] = measure(folder, args.cells)
            if not args.json:
                print(f"\n{part}: {GROWS[part]}\n\n{table(found[part], part, plain)}", flush=True)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    if args.json:
        print(json.dumps({"machine": about.splitlines(), **found}))
    if args.markdown:
        size = [] if args.cells == parser.get_default("cells") else ["--cells", str(args.cells)]
        write_page(args.markdown, about, found, " ".join([*args.parts, *size, "--markdown FILE"]))


def measure_cells(folder: Path, cells: int) -> Rows:
    """Pack, verify, stream, resume and train sets of more and more cells."""
    rows: Rows = {}
    vocab = vocab_in(folder)
    warm(folder, vocab)
    for n in (cells // 100, cells // 10, cells):
        root, run = folder / f"set{n}", folder / f"run{n}"
        for old in (root, run):
            shutil.rmtree(old, ignore_errors=True)
        files = files_of(folder, n)
        words = ("--vocab", vocab, "--obs", "donor,cell_type")
        said(f"pack {n:,} cells")
        row = {
            f"pack, {name}": value
            for name, value in jobs.command(
                "pack", *files, "-o", root, *words, "--valid-fraction", "0.001", "--allow-repeats"
            ).items()
        }
        row["set, MB"] = jobs.bytes_of(root, "*.tar") / 1e6
        row["indexes, MB"] = jobs.bytes_of(root, "*.parquet") / 1e6
        row["manifest, MB"] = jobs.bytes_of(root, "manifest.json") / 1e6
        for name, command in (("verify", ("verify", root)), ("info", ("info", root))):
            said(f"{name} {n:,} cells")
            row |= {f"{name}, {k}": v for k, v in jobs.command(*command).items()}
        said(f"stream {n:,} cells")
        row |= {f"stream, {k}": v for k, v in in_process(jobs.stream, str(root)).items()}
        resumed = in_process(jobs.stream, str(root), 1, 0.9)
        row["resumed at 90 %, first batch, s"] = resumed["first batch, s"]
        said(f"train on {n:,} cells")
        settings = [word for setting in TRAIN for word in ("--set", setting)]
        took = jobs.command("train", root, "-o", run, *settings)
        row |= {f"train, {name}": value for name, value in took.items()}
        row["train, data wait, %"] = 100 * jobs.wait_of(run)
        rows[n] = row
    return rows


def measure_sources(folder: Path, cells: int) -> Rows:
    """A pack of as many cells from more and more files."""
    rows, vocab, all_of_it = {}, vocab_in(folder), max(cells // 100, 2000)
    warm(folder, vocab)
    for sources in (10, 100, 1000):
        each = all_of_it // sources
        files = folder / f"sources{sources}"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        write_h5ad(files / "0.h5ad", sparse_cells(each, seed=0), compression=None)
        for i in range(1, sources):
            (files / f"{i}.h5ad").hardlink_to(files / "0.h5ad")
        said(f"pack {sources} sources")
        root = folder / "from-sources"
        shutil.rmtree(root, ignore_errors=True)
        rows[sources] = jobs.command(
            "pack", files, "-o", root, "--vocab", vocab, "--allow-repeats", "--workers", "1"
        )
    return rows


def measure_shards(folder: Path, cells: int) -> Rows:
    """A pack of as many cells into more and more shards, and what came out, opened."""
    rows, vocab, all_of_it = {}, vocab_in(folder), max(cells // 100, 20_000)
    warm(folder, vocab)
    (file,) = files_of(folder, min(all_of_it, FILE_CELLS))
    for shards in (10, 100, 1000, 10_000):
        said(f"pack into {shards:,} shards")
        root = folder / "in-shards"
        shutil.rmtree(root, ignore_errors=True)
        size = -(-min(all_of_it, FILE_CELLS) // shards)
        words = ("--cells-per-shard", str(size), "--workers", "1")
        row = jobs.command("pack", file, "-o", root, "--vocab", vocab, *words)
        row["manifest, MB"] = jobs.bytes_of(root, "manifest.json") / 1e6
        rows[shards] = row | {
            name: value
            for name, value in in_process(jobs.planned, str(root), 1).items()
            if name in ("open, s", "plan, s")
        }
    return rows


def measure_ranks(folder: Path, cells: int) -> Rows:
    """One rank's share of an epoch of the largest set, among more and more ranks."""
    root = folder / f"set{cells}"
    if not (root / "manifest.json").exists():
        raise SystemExit(f"{root} is not there: run the part cells before, with the same --folder")
    rows = {}
    for world in RANKS:
        said(f"a rank of {world}")
        rows[world] = in_process(jobs.stream, str(root), world)
    return rows


def measure_simulated(folder: Path, cells: int) -> Rows:
    """100 million cells, of which there is the manifest alone."""
    data = Data(folder, min(cells, 2000), sys.executable, sys.executable)
    root = str(data.manifest_only(SIMULATED[1], SIMULATED[0]))
    return {world: in_process(jobs.planned, root, world) for world in RANKS}


def slope(rows: Rows, name: str) -> float:
    """Of the line through the logarithms: 0 where it stays, 1 where it grows in proportion."""
    grown, values = list(rows), [row[name] for row in rows.values()]
    if min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(grown), np.log(values), 1)[0])


def table(rows: Rows, part: str, make: Callable[..., str]) -> str:
    """A line for each figure, a column for each size, and the slope."""
    first = next(iter(rows.values()))
    body = [
        (name, *(float(row[name]) for row in rows.values()), shown_slope(slope(rows, name)))
        for name in first
    ]
    unit = "ranks" if part == "simulated" else part
    return make(("", *(counted(n, unit) for n in rows), "slope"), body)


def shown_slope(found: float) -> str:
    return "" if math.isnan(found) else f"{found:.2f}"


def vocab_in(folder: Path) -> Path:
    path = folder / "vocab.json"
    if not path.exists():
        names = [*NAMES, "<pad>", "<cls>", "<eoc>"]
        path.write_text(json.dumps({name: i for i, name in enumerate(names)}))
    return path


def files_of(folder: Path, cells: int) -> list[Path]:
    """The h5ad files of so many cells, made where they are not there."""
    made = []
    for i in range(-(-cells // FILE_CELLS)):
        n = min(FILE_CELLS, cells - i * FILE_CELLS)
        path = folder / f"cells{n}-{i}.h5ad"
        if not path.exists():
            said(f"making {path.name}")
            rng = np.random.default_rng(i)
            obs = {
                "donor": [f"donor{k}" for k in rng.integers(0, DONORS, n)],
                "cell_type": [f"type{k}" for k in rng.integers(0, TYPES, n)],
            }
            write_h5ad(path, sparse_cells(n, seed=i), compression=None, obs=obs)
        made.append(path)
    return made


def warm(folder: Path, vocab: Path) -> None:
    """Compile all kernels, whose time is not what is measured."""
    if (folder / "warm").exists():
        return
    jobs.command("warm")
    in_process(jobs.stream, str(_small(folder, vocab)))


def _small(folder: Path, vocab: Path) -> Path:
    root = folder / "warm"
    write_h5ad(folder / "small.h5ad", sparse_cells(500, seed=0), compression=None)
    jobs.command("pack", folder / "small.h5ad", "-o", root, "--vocab", vocab)
    return root


def said(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def write_page(path: Path, about: str, found: Mapping[str, Rows], asked: str) -> None:
    """The page of docs/, and a picture for each part."""
    images = path.parent.parent / "images"
    images.mkdir(exist_ok=True)
    largest = max(found["cells"]) if "cells" in found else 0
    parts = [
        "# How cost grows",
        "This page is for whoever plans a larger set than the last one. It shows how time, memory, "
        "bytes and requests\ngrow with cells, source files, shards and ranks. One command measured all "
        "of it, on one machine, and wrote this page:",
        f"```\ntools/bench_scale {asked}\n```",
        "\n".join(f"* {line}" for line in about.splitlines()),
        _READ,
    ]
    for part, rows in found.items():
        parts.append(f"## {_titled(part, largest)}")
        if part == "simulated":
            parts.append(_SIMULATED)
        draw(images / f"scale-{part}.png", part, rows)
        parts.append(f"![Growth with {part}](../images/scale-{part}.png)")
        parts.append(table(rows, part, markdown))
    path.write_text("\n\n".join(parts) + "\n")


def draw(path: Path, part: str, rows: Rows) -> None:
    """Each curve beside its first value, both axes logarithmic, with its slope."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours: Sequence[str] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    grown = np.array(list(rows), float)
    for name, colour, mark in zip(DRAWN[part], colours, "osD^v", strict=False):
        values = np.array([row[name] for row in rows.values()])
        if values.min() > 0:
            label = f"{name} ({values[0]:,.3g} at first; slope {slope(rows, name):.2f})"
            axes.plot(grown, values / values[0], marker=mark, color=colour, label=label)
    axes.plot(grown, grown / grown[0], color="0.7", linestyle="--", label="in proportion")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="ranks" if part == "simulated" else part,
        ylabel="times the first",
        title=GROWS[part] if len(GROWS[part]) < 60 else part,
    )
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _titled(part: str, cells: int) -> str:
    return {
        "cells": f"Cells: up to {cells:,}",
        "sources": "Source files",
        "shards": "Shards",
        "ranks": f"Ranks: an epoch of {cells:,} cells" if cells else "Ranks",
        "simulated": f"On paper: {SIMULATED[0]:,} cells, 64 ranks",
    }[part]


if __name__ == "__main__":
    main()

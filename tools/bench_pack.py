"""Measures pack against h5py's plain reading, its memory, and what sources and shards cost; see
tools/bench_pack.

Every figure is a median of runs that were taken in turn. Each pack runs in a process of its own, whose
peak memory is the operating system's account. "Fresh" times begin when scshards.packing was imported, so
that they include loading what a pack needs (pyarrow, compiled kernels, ...); "loaded" ones are a second
pack of the same process, as h5py's own reading is timed with h5py loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
from bench_pack_data import NAMES, dense_cells, sparse_cells, write_h5ad
from bench_pack_soma import measure_soma as measure_soma
from bench_process import in_process

from scshards.base.memory import peak_bytes
from scshards.base.progress import Table
from scshards.cells.vocab import Vocab
from scshards.packing.pack import PackOptions, pack

BLOCK_ROWS = 512
PARTS = ("speed", "memory", "scale", "soma")

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    figures: Figures = {}
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="scshards-bench-") as name:
            measured = globals()[f"measure_{part}"](Path(name), args.cells, args.runs)
            for figure, value in measured:
                figures[figure] = value
                if not args.json:
                    print(f"{figure}: {value:,.3g}", flush=True)
    shown = Table(("figure", "median"), list(figures.items())).text()
    print(json.dumps(figures) if args.json else shown)


def measure_speed(folder: Path, cells: int, runs: int) -> Iterator[tuple[str, float]]:
    """Seconds, ratios, and bytes a value, for cells of about 3,500 values."""
    for i in range(2):
        x = dense_cells(cells, seed=i)
        write_h5ad(folder / f"plain{i}.h5ad", x, compression=None)
        write_h5ad(folder / f"gzip{i}.h5ad", x, compression="gzip")
        for kind in ("plain", "gzip"):
            for copy in range(2, 8, 2):
                os.link(folder / f"{kind}{i}.h5ad", folder / f"{kind}{copy + i}.h5ad")
    run_pack(folder, ["plain0"], {"workers": 1})  # compiles the kernels, if they are not yet
    for kind in ("gzip", "plain"):
        eight = [f"{kind}{i}" for i in range(8)]
        one, two = eight[:1], eight[:2]
        taken: dict[str, list[float]] = {}
        for _ in range(runs):
            read = seconds_to_read(folder / f"{kind}0.h5ad")
            (fresh, loaded), peak = run_pack(folder, one, {"workers": 1}, times=2)
            (_, alone), _ = run_pack(folder, two, {"workers": 1}, times=2)
            (_, both), _ = run_pack(folder, two, {"workers": 2}, times=2)
            # The same again as eight files, which take longer than starting processes.
            (long_alone,), _ = run_pack(folder, eight, {"workers": 1})
            (long_both,), _ = run_pack(folder, eight, {"workers": 2})
            for name, value in {
                "h5py reads, s": read,
                "pack, loaded, s": loaded,
                "pack, loaded / h5py": loaded / read,
                "pack, fresh, s": fresh,
                "pack, fresh / h5py": fresh / read,
                "cells/s, loaded": cells / loaded,
                "two files, one worker / two workers": alone / both,
                "eight files, one worker / two workers": long_alone / long_both,
                "peak memory, MB": peak / 1e6,
            }.items():
                taken.setdefault(name, []).append(value)
        for name, values in taken.items():
            yield f"{kind}: {name}", statistics.median(values)
    for compression in ("none", "zstd"):
        run_pack(folder, ["plain0"], {"workers": 1, "compression": compression})
        yield f"stored bytes a value, {compression}", bytes_a_value(folder / "out")


def measure_memory(folder: Path, cells: int, runs: int) -> Iterator[tuple[str, float]]:
    """Peak memory of one worker, which does all of the pack; cells of 50 values."""
    for n in (cells, 50 * cells):
        write_h5ad(folder / f"{n}.h5ad", sparse_cells(n, seed=n), compression=None)
    write_h5ad(folder / "part.h5ad", sparse_cells(cells // 4, seed=0), compression=None)
    for i in range(200):
        os.link(folder / "part.h5ad", folder / f"part{i}.h5ad")
    run_pack(folder, ["part"], {"workers": 1})  # compiling takes memory, once
    peaks = {}
    for name, stems in {
        f"1 source of {cells:,} cells": [str(cells)],
        f"1 source of {50 * cells:,} cells": [str(50 * cells)],
        f"200 sources of {cells // 4:,} cells": [f"part{i}" for i in range(200)],
    }.items():
        peaks[name] = statistics.median(
            run_pack(folder, stems, {"workers": 1})[1] / 1e6 for _ in range(runs)
        )
        yield f"peak memory, MB: {name}", peaks[name]
    yield "peak memory: largest / smallest", max(peaks.values()) / min(peaks.values())


def measure_scale(folder: Path, cells: int, runs: int) -> Iterator[tuple[str, float]]:
    """What more sources and more shards cost, beside a pack of as many cells in one and ten."""
    n_sources, n_shards = 500, 2_000
    of_one = max(cells // 100, 2)
    write_h5ad(folder / "part.h5ad", sparse_cells(of_one, seed=0), compression=None)
    for i in range(n_sources):
        os.link(folder / "part.h5ad", folder / f"part{i}.h5ad")
    for n in (n_sources // 2, n_sources):
        write_h5ad(folder / f"whole{n}.h5ad", sparse_cells(n * of_one, seed=1), compression=None)

    def seconds(stems: Sequence[str], n: int, shards: int) -> float:
        options = {"workers": 1, "cells_per_shard": -(-n * of_one // shards)}
        return statistics.median(
            run_pack(folder, stems, options)[0][0] for _ in range(min(runs, 1 + runs // 2))
        )

    run_pack(folder, ["part"], {"workers": 1})  # compiles the kernels, if they are not yet
    parts = [f"part{i}" for i in range(n_sources)]
    half, whole = [f"whole{n_sources // 2}"], [f"whole{n_sources}"]
    base = {
        n_sources // 2: seconds(half, n_sources // 2, 10),
        n_sources: seconds(whole, n_sources, 10),
    }
    yield "1 source, 10 shards, s", base[n_sources]
    for n in (n_sources // 2, n_sources):
        took = seconds(parts[:n], n, 10)
        yield f"{n} sources, 10 shards, s", took
        yield f"one more source of {n}, ms", 1000 * (took - base[n]) / n
    for n in (n_shards // 2, n_shards):
        took = seconds(whole, n_sources, n)
        yield f"1 source, {n:,} shards, s", took
        yield f"one more shard of {n:,}, ms", 1000 * (took - base[n_sources]) / n
    yield f"{n_sources} sources, {n_shards:,} shards, s", seconds(parts, n_sources, n_shards)


def run_pack(
    folder: Path, stems: Sequence[str], options: dict[str, Any], times: int = 1
) -> tuple[list[float], float]:
    """Seconds of some packs, one after another in one fresh process, and its peak bytes."""
    inputs = [str(folder / f"{stem}.h5ad") for stem in stems]
    taken: tuple[list[float], float] = in_process(
        _pack, inputs, str(folder / "out"), options, times
    )
    return taken


def _pack(
    inputs: list[str], out: str, options: dict[str, Any], times: int
) -> tuple[list[float], float]:
    vocab = Vocab.from_genes(NAMES)
    taken = []
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # what others have written is not this pack's to wait for
        start = time.perf_counter()
        pack(inputs, out, vocab, PackOptions(allow_repeats=True, **options), progress=False)
        taken.append(time.perf_counter() - start)
    return taken, peak_bytes()


def seconds_to_read(path: Path) -> float:
    """How long h5py takes to read a CSR matrix in blocks of rows, doing nothing with it."""
    start = time.perf_counter()
    with h5py.File(path) as f:
        x = f["X"]
        indptr = x["indptr"][:]
        for a in range(0, len(indptr) - 1, BLOCK_ROWS):
            b = min(a + BLOCK_ROWS, len(indptr) - 1)
            x["indices"][indptr[a] : indptr[b]]
            x["data"][indptr[a] : indptr[b]]
    return time.perf_counter() - start


def bytes_a_value(out: Path) -> float:
    """Bytes of shards and indexes for each stored value."""
    manifest = json.loads((out / "manifest.json").read_text())
    shards = [s for split in manifest["splits"].values() for s in split["shards"]]
    stored = sum(s["bytes"] + s["index"]["bytes"] for s in shards)
    return float(stored / sum(s["tokens"] for s in shards))


if __name__ == "__main__":
    main()

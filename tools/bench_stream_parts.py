"""The parts of tools/bench_stream: what each of them measures, and the bars it is held to."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_stream_jobs as jobs
from bench_pack_data import NAMES
from bench_process import in_process
from bench_stream_data import Data, write_source
from bench_stream_report import Figures, Part, in_turn
from peers.contract import Peer, Work, job

STOCK_CELLS = 4000
"""Of the slow peers: two seconds' worth."""

STREAMED = 300_000
"""Cells of a large set that the memory part streams: every lane turns its buffer over many times."""

VARIABLE = 4000
"""Genes that models of counts look at."""

ANNBATCH_BATCH = 4096
"""Cells of a batch in annbatch's documentation and figures."""

RANKED = 2048
"""Tokens of a cell told by ranks at most."""

S3_TIMES = 4
"""How often the cells are in the set that is read from S3."""


def speed(data: Data, runs: int) -> Part:
    """An epoch of ten times the cells, so that its beginning and end weigh as they do in training."""
    long, short = str(data.repeated(10 * data.cells)), str(data.own)

    def epoch(
        root: str, *, threads: int, n_bins: int = 51, pinned: bool = False
    ) -> Callable[[], Figures]:
        return partial(in_process, jobs.epoch, root, threads, {"n_bins": n_bins}, pinned)

    def stock(do_binning: bool, in_memory: bool = False) -> Callable[[], Figures]:
        cells = min(data.cells, STOCK_CELLS)
        return partial(in_process, jobs.stock, str(data.stock), cells, do_binning, in_memory)

    measured = {
        "51 bins, 2 threads": epoch(long, threads=2),
        "51 bins, 1 thread": epoch(long, threads=1),
        "51 bins, 1 thread, one core": epoch(long, threads=1, pinned=True),
        "no bins, 2 threads": epoch(long, threads=2, n_bins=0),
        "no bins, 1 thread": epoch(long, threads=1, n_bins=0),
        f"51 bins, 2 threads, an epoch of {data.cells:,}": epoch(short, threads=2),
        "stock webdataset, scGPT's collator, one core": stock(True),
        "stock webdataset, the same without bins, one core": stock(False),
        "scGPT's collator alone, cells in memory, one core": stock(True, in_memory=True),
    }
    if data.beside is not None:
        for threads in (2, 1):
            what = f"{data.beside.name}, 51 bins, {threads} thread{'s' * (threads > 1)}"
            measured[what] = partial(_beside, data.beside, long, threads)
    version = _annbatch_version(data)
    for cores, name in ((2, "two cores"), (1, "one core")) if version else ():
        for batch_size in (64, ANNBATCH_BATCH):
            what = f"annbatch {version}, raw CSR batches of {batch_size:,}, {name}"
            measured[what] = partial(_annbatch, data, cores, batch_size)
    rows = in_turn(measured, runs)
    speeds = {what: row["cells/s"] for what, row in rows.items()}
    two, one = speeds["51 bins, 2 threads"], speeds["51 bins, 1 thread"]
    rival = speeds["stock webdataset, scGPT's collator, one core"]
    bars = [
        ("51 bins, 2 threads, against stock webdataset, binning", two / rival, "at least", 60.0),
        ("... one thread against two", one / two, "at least", 0.5),
    ]  # fmt: skip
    if version:
        raw = speeds[f"annbatch {version}, raw CSR batches of 64, two cores"]
        bars.append(("... two threads against annbatch's raw rows", two / raw, "at least", 2.0))
    if data.beside is not None:
        name = f"{data.beside.name}, 51 bins, 2 threads"
        before = rows[name]["µs of processor a cell"]
        now = rows["51 bins, 2 threads"]["µs of processor a cell"]
        bars.append((f"... against {data.beside.name}", two / speeds[name], "at least", 0.97))
        bars.append(("... of its processor time a cell", now / before, "at most", 0.85))
    missing = [] if version else [f"annbatch was not measured: {data.annbatch_python} lacks it."]
    return Part(rows, bars, missing)


_BESIDE = """
import json, resource, sys, time
from scshards import CellLoader
root, threads = sys.argv[1], int(sys.argv[2])
try:
    from scshards import ReadOptions
    loader = CellLoader(root, read=ReadOptions(threads=threads))
except ImportError:  # before there were option classes
    loader = CellLoader(root, threads=threads)
def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
first = iter(loader)
next(first)
first.close()
loader.set_epoch(1)
begin, processor = time.perf_counter(), spent()
cells = sum(len(batch) for batch in loader)
seconds, processor = time.perf_counter() - begin, spent() - processor
print(json.dumps(
    {"cells/s": cells / seconds, "µs of processor a cell": 1e6 * processor / cells, "cells": cells}
))
"""


def _beside(tree: Path, root: str, threads: int) -> Figures:
    """The same epoch as another checkout of scshards reads it."""
    command = [sys.executable, "-W", "ignore", "-c", _BESIDE, root, str(threads)]
    env = os.environ | {"PYTHONPATH": str(tree)}
    said = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=env, cwd=tree
    ).stdout
    figures: Figures = json.loads(said)
    return figures


def _annbatch_version(data: Data) -> str:
    return _version(data.annbatch_python, "annbatch")


def _version(python: str, package: str) -> str:
    """The version of a package in another Python, or "" where it is not installed."""
    ask = f"import {package}, importlib.metadata as m; print(m.version({package!r}))"
    asked = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else ""


def _annbatch(data: Data, cores: int, batch_size: int) -> Figures:
    return _peer(data, data.annbatch_python, "annbatch", "counts", cores, batch_size)


def _peer(data: Data, python: str, name: str, kind: str, threads: int, batch_size: int) -> Figures:
    """The figures of another loader of tools/peers, run by a Python that has it.

    Its store is made of the cells on the first call.
    """
    peer: Peer = importlib.import_module(f"peers.{name}").PEER
    folder = data.peers / name
    for store in peer.stores[kind]:
        if peer.convert is not None and not (folder / store).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="scshards-bench-") as own:
                source = Path(own) / "cells.h5ad"
                write_source(source, data.cells)
                told = {"files": [str(source)], "folder": str(folder), "store": store}
                _job(python, name, job("convert", threads=threads, **told))
    stores = {store: str(folder / store) for store in peer.stores[kind]}
    with tempfile.TemporaryDirectory(prefix="scshards-bench-") as own:
        work = Work(
            kind=kind,
            stores=stores,
            files=[],
            scratch=own,
            batch=batch_size,
            threads=threads,
            cells=data.cells,
            cores=threads,
        )
        said = _job(python, name, job("stream", work))
    wanted = ("cells/s", "µs of processor a cell", "first batch, s", "cells")
    return {figure: said[figure] for figure in wanted}


def _job(python: str, name: str, asked: str) -> dict[str, Any]:
    """What a job of a peer says."""
    command = [python, "-W", "ignore", "-m", f"peers.{name}", asked]
    # Its Python need not be ours, nor have what ours has.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    folder = Path(__file__).parent
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=env, cwd=folder
    )
    said: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return said


def counts(data: Data, runs: int) -> Part:
    """Rows of counts in batches of the size that annbatch's documentation has, beside annbatch's."""
    root = str(data.repeated(10 * data.cells))
    some = tuple(NAMES[::5][:VARIABLE])

    def epoch(batch_size: int, change: str = "", **options: Any) -> Callable[[], Figures]:
        return partial(in_process, jobs.epoch, root, 2, options, False, batch_size, change)

    measured = {
        "51 bins, masked, batches of 64": epoch(64),
        f"counts, batches of {ANNBATCH_BATCH:,}": epoch(ANNBATCH_BATCH, objective="counts"),
        "... made torch.sparse_csr on the CPU": epoch(ANNBATCH_BATCH, "sparse", objective="counts"),
        f"... of {VARIABLE:,} genes": epoch(ANNBATCH_BATCH, objective="counts", genes=some),
    }
    version = _annbatch_version(data)
    rival = f"annbatch {version}, raw CSR batches of {ANNBATCH_BATCH:,}"
    if version:
        measured[rival] = partial(_annbatch, data, 2, ANNBATCH_BATCH)
    rows = in_turn(measured, runs)
    own = rows[f"counts, batches of {ANNBATCH_BATCH:,}"]
    bars = [("memory of counts, MB", own["memory, MB"], "at most", 500.0)]
    if version:
        times = own["cells/s"] / rows[rival]["cells/s"]
        bars.append(("counts against annbatch's raw rows", times, "at least", 3.0))
    missing = [] if version else [f"annbatch was not measured: {data.annbatch_python} lacks it."]
    return Part(rows, bars, missing)


def sets(data: Data, runs: int) -> Part:
    """Sets beside their controls, of sorted shards and of shuffled ones, beside single cells."""
    mixed, grouped = data.screens()
    single = "counts of single cells, batches of 2,048"
    measured = {
        single: partial(in_process, jobs.sets, str(grouped), False),
        "16 sets of 64 and their controls, grouped shards": partial(
            in_process, jobs.sets, str(grouped), True
        ),
        "... shuffled shards": partial(in_process, jobs.sets, str(mixed), True),
    }
    rows = in_turn(measured, runs)
    own = rows["16 sets of 64 and their controls, grouped shards"]
    bars = [
        ("sets against single cells", own["cells/s"] / rows[single]["cells/s"], "at least", 0.7),
        ("memory of sets, MB", own["memory, MB"], "at most", 500.0),
    ]
    return Part(rows, bars)


def ranks(data: Data, runs: int) -> Part:
    """Cells by ranked genes, beside masked values, and beside Geneformer's way on ranked tokens."""
    root = str(data.repeated(10 * data.cells))
    data.make_medians()
    options: dict[str, dict[str, Any]] = {
        "masked values": {},
        "ranks": {"objective": "ranks", "medians": str(data.medians)},
    }

    def epoch(name: str, threads: int, change: str = "") -> Callable[[], Figures]:
        collate = {"max_length": RANKED, **options[name]}
        return partial(in_process, jobs.epoch, root, threads, collate, False, 64, change)

    measured = {
        f"{name}, {n} thread{'s' * (n > 1)}": epoch(name, n) for n in (2, 1) for name in options
    }
    measured["ranks, 2 threads, made int64 by to_bert"] = epoch("ranks", 2, "to_bert")
    version = _version(data.datasets_python, "datasets")
    rival = f"datasets {version}, ranked tokens, two workers"
    if version:
        measured[rival] = partial(_peer, data, data.datasets_python, "datasets", "ranked", 2, 64)
    rows = in_turn(measured, runs)
    each = "µs of processor a cell"
    own = rows["ranks, 2 threads"]
    ratio = own[each] / rows["masked values, 2 threads"][each]
    bars = [
        ("ranks, 2 threads, cells/s", own["cells/s"], "at least", 60_000.0),
        ("... processor time against masked values", ratio, "at most", 1.25),
        ("memory of ranks, MB", own["memory, MB"], "at most", 500.0),
    ]
    if version:
        times = own["cells/s"] / rows[rival]["cells/s"]
        bars.append(("ranks against datasets of ranked tokens", times, "at least", 30.0))
    missing = [] if version else [f"datasets was not measured: {data.datasets_python} lacks it."]
    return Part(rows, bars, missing)


def arrays(data: Data, runs: int) -> Part:
    """Masked values of cells that have arrays beside the genes, which are asked for or not."""
    plain, more = data.own, data.with_arrays()

    def epoch(root: Path, *names: str) -> Callable[[], Figures]:
        return partial(in_process, jobs.epoch, str(root), 2, {"arrays": names})

    without, ignored = "cells without arrays", "cells with arrays that are not asked for"
    measured = {
        without: epoch(plain),
        ignored: epoch(more),
        "... X_pca, 50 numbers a cell": epoch(more, "X_pca"),
        "... X_pca, and protein, 200 counts a cell": epoch(more, "X_pca", "protein"),
    }
    rows = in_turn(measured, runs)
    spent = "µs of processor a cell"
    times = rows[ignored][spent] / rows[without][spent]
    size, size_without = (sum(p.stat().st_size for p in r.rglob("*.tar")) for r in (more, plain))
    note = (
        f"Arrays that are not asked for cost {times:.2f} times the processor time; their shards have "
        f"{size / size_without:.2f} times the bytes."
    )
    return Part(rows, notes=[note])


def memory(data: Data, runs: int) -> Part:
    """The default loader's peak for sets of more and more cells, and for more and more epochs.

    As many cells are streamed of each set: buffers are full only after some ten thousand.
    """
    sizes = [data.cells, 25 * data.cells, 250 * data.cells]
    measured: dict[str, Callable[[], Figures]] = {}
    for cells in sizes:
        root = str(data.repeated(cells))
        epochs = -(-STREAMED // cells)
        measured[f"{cells:,} cells"] = partial(in_process, jobs.memory, root, STREAMED, epochs)
    for epochs, name in ((1, "one epoch"), (10, "ten epochs")):
        root = str(data.repeated(data.cells))
        few = partial(in_process, jobs.memory, root, epochs * data.cells, epochs)
        measured[f"{data.cells:,} cells, {name}"] = few
    rows = in_turn(measured, runs)
    peaks = [row["memory, MB"] for row in rows.values()]
    return Part(
        rows,
        [
            ("memory beyond imports, MB", max(peaks), "at most", 500.0),
            ("largest set against smallest", max(peaks[:-2]) / peaks[0], "at most", 1.1),
            ("ten epochs against one", peaks[-1] / peaks[-2], "at most", 1.1),
        ],
        [
            f"Some {STREAMED:,} cells of each set are streamed; beside one epoch of {data.cells:,} "
            f"cells the largest set takes {max(peaks[:-2]) / peaks[-2]:.2f} times the memory."
        ],
    )


def start(data: Data, runs: int) -> Part:
    """The first batch of an epoch and of the rest of one, with kernels in numba's cache."""
    measured: dict[str, Callable[[], Figures]] = {}
    sizes = [data.cells, 10 * data.cells, 250 * data.cells]
    for cells in sizes:
        root = str(data.repeated(cells))
        measured[f"{cells:,} cells, fresh"] = partial(in_process, jobs.start, root, 0.0)
        measured[f"{cells:,} cells, resumed at 90%"] = partial(in_process, jobs.start, root, 0.9)
    rows = in_turn(measured, runs)
    bars = []
    for cells in sizes:
        fresh, resumed = (rows[f"{cells:,} cells, {how}"] for how in ("fresh", "resumed at 90%"))
        bars.append((f"{cells:,} cells: first batch, s", fresh["first batch, s"], "at most", 1.0))
        for again in ("", ", loaded"):
            ratio = resumed[f"first batch{again}, s"] / fresh[f"first batch{again}, s"]
            bars.append((f"... resumed against fresh{again}", ratio, "at most", 1.5))
    return Part(
        rows,
        bars,
        [
            "Seconds from construction on. Loaded: once more in the same process, kernels loaded. Read: "
            "until the first batch came."
        ],
    )


def plan(data: Data, runs: int) -> Part:
    """What opening and planning a set of 100 million cells costs, of which there is only a manifest."""
    shards, cells = 12_000, 100_000_000
    root = str(data.manifest_only(shards, cells))
    rows = in_turn(
        {f"{cells:,} cells, {shards:,} shards": partial(in_process, jobs.plan, root)}, runs
    )
    (row,) = rows.values()
    return Part(
        rows,
        [
            ("open and plan, s", row["open, s"] + row["plan, s"], "at most", 1.0),
            ("memory beyond imports, MB", row["memory, MB"], "at most", 200.0),
        ],
    )


def s3(data: Data, runs: int) -> Part:
    """The loader's bytes a second from an S3 server on this machine, beside plain ranged GETs."""
    import s3fs
    from s3_start import s3_process

    from scshards.streaming.read.fetch import REMOTE_READS

    local, url = str(data.repeated(S3_TIMES * data.cells)), "s3://bench/set"
    with (
        tempfile.TemporaryDirectory(prefix="scshards-bench-") as folder,
        s3_process(Path(folder)) as env,
    ):
        os.environ.update(env)
        s3fs.S3FileSystem().mkdir("bench")
        in_process(jobs.upload, local, url)
        measured = {
            f"plain GETs of {n}, {REMOTE_READS} at a time": partial(
                in_process, jobs.ranged_gets, url, REMOTE_READS, chunks
            )
            for chunks, n in ((1, "one chunk"), (2, "two chunks"))
        }
        own = partial(in_process, jobs.remote_epoch, str(data.own), url)
        rows = in_turn({**measured, "scshards, full batches": own}, runs)
    best = max(rows[what]["MB/s"] for what in measured)
    ratio = rows["scshards, full batches"]["MB/s"] / best
    return Part(rows, [("scshards against the faster plain GETs", ratio, "at least", 0.8)])


PARTS: dict[str, Callable[[Data, int], Part]] = {
    "speed": speed,
    "counts": counts,
    "sets": sets,
    "ranks": ranks,
    "arrays": arrays,
    "memory": memory,
    "start": start,
    "plan": plan,
    "s3": s3,
}

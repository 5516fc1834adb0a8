"""Measures pack against h5py's plain reading; see tools/bench_pack.

For each file (gzip, uncompressed), in turn and several times: read indptr, indices and data in blocks
with h5py alone; pack with one worker. Then two files with one and with two workers. Every figure is a
median; each pack runs in a process of its own, whose peak memory is the operating system's account.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from scshards.base.progress import table
from scshards.cells.vocab import Vocab
from scshards.pack.run import PackOptions, pack

GENES = 36_000
BLOCK_ROWS = 512
NAMES = [f"G{i:05d}" for i in range(GENES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scshards-bench-") as name:
        folder = Path(name)
        figures = measure(folder, args.cells, args.runs)
    if args.json:
        print(json.dumps(figures))
        return
    print(table(("figure", "median"), [(k, v) for k, v in figures.items()]))


def measure(folder: Path, cells: int, runs: int) -> dict[str, float]:
    """All figures by name; seconds, ratios, bytes a value, MB."""
    for i in range(2):
        make_h5ad(folder / f"plain{i}.h5ad", cells, seed=i, compression=None)
    make_h5ad(folder / "gzip0.h5ad", cells, seed=0, compression="gzip")
    one = {"workers": 1}
    run_pack(folder, ["plain0"], one)  # compiles the kernels and warms the page cache
    figures: dict[str, float] = {}
    for kind in ("gzip", "plain"):
        path = folder / f"{kind}0.h5ad"
        read, packed, memory = [], [], []
        for _ in range(runs):
            read.append(seconds_to_read(path))
            took, peak = run_pack(folder, [path.stem], one)
            packed.append(took)
            memory.append(peak)
        figures[f"{kind}: h5py reads, s"] = statistics.median(read)
        figures[f"{kind}: pack, one worker, s"] = statistics.median(packed)
        ratios = [p / r for p, r in zip(packed, read, strict=True)]
        figures[f"{kind}: pack / h5py"] = statistics.median(ratios)
        figures[f"{kind}: cells/s"] = cells / statistics.median(packed)
        figures[f"{kind}: peak memory, MB"] = statistics.median(memory) / 1e6
    both = ["plain0", "plain1"]
    speedups = [
        run_pack(folder, both, one)[0] / run_pack(folder, both, {"workers": 2})[0]
        for _ in range(runs)
    ]
    figures["two files: two workers against one, times"] = statistics.median(speedups)
    for compression in ("none", "zstd"):
        run_pack(folder, ["plain0"], {**one, "compression": compression})
        figures[f"stored bytes a value, {compression}"] = bytes_a_value(folder / "out")
    return figures


def run_pack(folder: Path, stems: list[str], options: dict[str, Any]) -> tuple[float, float]:
    """Seconds and peak bytes of one pack in a fresh process."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    inputs = [str(folder / f"{stem}.h5ad") for stem in stems]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_pack, inputs, str(folder / "out"), options).result()


def _pack(inputs: list[str], out: str, options: dict[str, Any]) -> tuple[float, float]:
    vocab = Vocab.from_genes(NAMES)
    start = time.perf_counter()
    pack(inputs, out, vocab, PackOptions(**options), progress=False)
    took = time.perf_counter() - start
    return took, peak_bytes()


def peak_bytes() -> float:
    """The most memory this process has had. getrusage would count its parent's at the fork too."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) * 1024


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


def make_h5ad(path: Path, cells: int, *, seed: int, compression: str | None) -> None:
    """Cells of about 3,500 values: a library of lognormal depth drawn from a power law of genes.

    Genes lie in no order of the vocabulary, as in real files.
    """
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    cdf = np.cumsum(rng.permutation(1 / np.arange(1, GENES + 1) ** 0.8))
    cdf /= cdf[-1]
    indices, data, indptr = [], [], [0]
    for _ in range(cells):
        depth = int(np.clip(rng.lognormal(np.log(4500), 0.7), 500, 60_000))
        ids, counts = np.unique(np.searchsorted(cdf, rng.random(depth)), return_counts=True)
        indices.append(ids.astype(np.int32))
        data.append(counts.astype(np.float32))
        indptr.append(indptr[-1] + len(ids))
    x = sp.csr_matrix(
        (np.concatenate(data), np.concatenate(indices), np.array(indptr)), shape=(cells, GENES)
    )
    names = np.random.default_rng(0).permutation(NAMES)
    frame = anndata.AnnData(x, var=pd.DataFrame(index=names))
    frame.obs_names = [f"c{i}" for i in range(cells)]
    frame.write_h5ad(path, compression=compression)


if __name__ == "__main__":
    main()

"""Part `soma` of tools/bench_pack: cells of a SOMA experiment straight to shards.

Packing is timed beside a plain loop over tiledbsoma that reads the same rows in the same amounts and
does nothing with them, in turn, each in a process of its own with everything loaded. Called by
bench_pack.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_pack_data import NAMES, dense_cells, sparse_cells
from bench_process import in_process

from scshards.atlas.soma import READ_VALUES
from scshards.base.memory import peak_bytes
from scshards.cells.vocab import Vocab
from scshards.pack.run import PackOptions, pack

SIZES = (10_000, 500_000, 1_000_000)
"""The cells of the packs whose memory is compared: 50 values each, so that they are soon written.

The first has an eighth of the values that pack reads at once; the others fill several reads."""


def measure_soma(folder: Path, cells: int, runs: int) -> Iterator[tuple[str, float]]:
    """Seconds of packing and of reading cells of about 3,500 values, and peak memory."""
    in_process(_write, str(folder / "whole"), cells, 0)
    in_process(_pack, str(folder / "whole"), str(folder / "out"), {"workers": 1}, 1)  # compiles
    taken: dict[str, list[float]] = {}
    for _ in range(runs):
        read = in_process(_read, str(folder / "whole"))
        (fresh, loaded), peak = in_process(
            _pack, str(folder / "whole"), str(folder / "out"), {"workers": 1}, 2
        )
        for name, value in {
            "tiledbsoma reads, s": read,
            "pack, fresh, s": fresh,
            "pack, loaded, s": loaded,
            "pack, loaded / tiledbsoma": loaded / read,
            "cells/s, loaded": cells / loaded,
            "peak memory, MB": peak / 1e6,
        }.items():
            taken.setdefault(name, []).append(value)
    for name, values in taken.items():
        yield f"soma: {name}", statistics.median(values)
    shutil.rmtree(folder / "whole")
    peaks = {}
    for n in SIZES:
        in_process(_write, str(folder / f"{n}"), n, 50)
        peaks[n] = statistics.median(
            in_process(_pack, str(folder / f"{n}"), str(folder / "out"), {"workers": 1}, 1)[1] / 1e6
            for _ in range(runs)
        )
        yield f"soma: peak memory, MB: {n:,} cells", peaks[n]
    for few, many in itertools.pairwise(SIZES):
        yield f"soma: peak memory: {many:,} / {few:,} cells", peaks[many] / peaks[few]


def _write(uri: str, cells: int, values: int) -> None:
    """An experiment in the Census's layout; about 3,500 values a cell where `values` is 0."""
    import anndata
    import pandas as pd
    import tiledbsoma.io

    x = sparse_cells(cells, seed=0, values=values) if values else dense_cells(cells, seed=0)
    made = anndata.AnnData(
        x,
        obs=pd.DataFrame({"nnz": np.diff(x.indptr)}, index=[f"c{i}" for i in range(cells)]),
        var=pd.DataFrame(index=np.random.default_rng(0).permutation(NAMES)),
    )
    tiledbsoma.io.from_anndata(
        uri,
        made,
        "RNA",
        X_layer_name="raw",
        obs_id_name="observation_joinid",
        var_id_name="feature_id",
    )


def _pack(uri: str, out: str, options: dict[str, Any], times: int) -> tuple[list[float], float]:
    vocab = Vocab.from_genes(NAMES)
    taken = []
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        pack(f"soma://{uri}", out, vocab, PackOptions(**options), progress=False)
        taken.append(time.perf_counter() - start)
    return taken, peak_bytes()


def _read(uri: str) -> float:
    """How long tiledbsoma takes to read all rows, in the amounts that pack reads, loaded."""
    import tiledbsoma

    with tiledbsoma.Experiment.open(uri) as experiment:
        x, n = experiment.ms["RNA"].X["raw"], experiment.obs.count
        rows = max(1, READ_VALUES * n // x.nnz)
        x.read((np.arange(1),)).tables().concat()
        start = time.perf_counter()
        for first in range(0, n, rows):
            for _ in x.read((np.arange(first, min(first + rows, n)),)).tables():
                pass
        return time.perf_counter() - start

"""Part `soma` of tools/bench_pack: cells of a SOMA experiment straight to shards.

Packing is timed beside a plain loop over tiledbsoma that reads the same rows and does nothing with them,
in one go and in the amounts that pack reads, in turn, each in a process of its own with everything
loaded. Called by bench_pack.
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
from soma_census import X_LAYOUT

from scshards.base.memory import peak_bytes
from scshards.cells.vocab import Vocab
from scshards.census.experiment import READ_VALUES
from scshards.census.rows import stretches
from scshards.packing.pack import PackOptions, pack

SIZES = (10_000, 500_000)
"""The cells of the packs whose memory is compared."""

VALUES = 1000
"""Of each of these cells: so many that ten thousand of them fill more than one read."""

_PIECE = 20_000
"""Cells that are written at a time."""

_TILE = X_LAYOUT["tiledb"]["create"]["dims"]["soma_dim_0"]["tile"]


def measure_soma(folder: Path, cells: int, runs: int) -> Iterator[tuple[str, float]]:
    """Seconds of packing and of reading cells of about 3,500 values, and peak memory."""
    in_process(_write, str(folder / "whole"), cells, 0)
    in_process(_pack, str(folder / "whole"), str(folder / "out"), {"workers": 1}, 1)  # compiles
    taken: dict[str, list[float]] = {}
    for _ in range(runs):
        read = in_process(_read, str(folder / "whole"), False)
        cut = in_process(_read, str(folder / "whole"), True)
        (fresh, loaded), peak = in_process(
            _pack, str(folder / "whole"), str(folder / "out"), {"workers": 1}, 2
        )
        for name, value in {
            "tiledbsoma reads, s": read,
            "tiledbsoma reads, cut at tiles, s": cut,
            "pack, fresh, s": fresh,
            "pack, loaded, s": loaded,
            "pack, loaded / tiledbsoma": loaded / read,
            "pack, loaded / tiledbsoma, cut at tiles": loaded / cut,
            "cells/s, loaded": cells / loaded,
            "peak memory, MB": peak / 1e6,
        }.items():
            taken.setdefault(name, []).append(value)
    for name, values in taken.items():
        yield f"soma: {name}", statistics.median(values)
    shutil.rmtree(folder / "whole")
    peaks = {}
    for n in SIZES:
        in_process(_write, str(folder / f"{n}"), n, VALUES)
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
    import pyarrow as pa
    import scipy.sparse as sp
    import tiledbsoma.io

    whole = None if values else dense_cells(cells, seed=0)
    nnz = np.full(cells, values) if whole is None else np.diff(whole.indptr)
    made = anndata.AnnData(
        sp.csr_matrix((cells, len(NAMES)), dtype=np.float32),
        obs=pd.DataFrame({"nnz": nnz}, index=[f"c{i}" for i in range(cells)]),
        var=pd.DataFrame(index=np.random.default_rng(0).permutation(NAMES)),
    )
    tiledbsoma.io.from_anndata(
        uri,
        made,
        "RNA",
        X_layer_name="raw",
        obs_id_name="observation_joinid",
        var_id_name="feature_id",
        platform_config=X_LAYOUT,
    )
    with tiledbsoma.Experiment.open(uri, "w") as opened:
        for start in range(0, cells, _PIECE):
            stop = min(start + _PIECE, cells)
            x = (
                sparse_cells(stop - start, seed=start, values=values)
                if values
                else whole[start:stop]
            )
            rows, x = np.repeat(np.arange(start, stop), np.diff(x.indptr)), x.tocoo()
            coords = {"soma_dim_0": rows, "soma_dim_1": x.col.astype(np.int64)}
            opened.ms["RNA"].X["raw"].write(pa.table({**coords, "soma_data": x.data}))


def _pack(uri: str, out: str, options: dict[str, Any], times: int) -> tuple[list[float], float]:
    vocab = Vocab.from_genes(NAMES)
    taken = []
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        pack(f"soma://{uri}", out, vocab, PackOptions(**options), progress=False)
        taken.append(time.perf_counter() - start)
    return taken, peak_bytes()


def _read(uri: str, cut: bool) -> float:
    """How long tiledbsoma takes to read all rows, loaded: at once, or in the amounts that pack reads."""
    import tiledbsoma

    with tiledbsoma.Experiment.open(uri) as experiment:
        x, n = experiment.ms["RNA"].X["raw"], experiment.obs.count
        x.read((slice(0, 0),)).tables().concat()
        start = time.perf_counter()
        mean = x.nnz / n
        ends = stretches(np.arange(n), None, READ_VALUES, mean, _TILE) if cut else [(0, n)]
        for first, stop in ends:
            for _ in x.read((slice(first, stop - 1),)).tables():
                pass
        return time.perf_counter() - start

"""Sets to export, and what an export holds as pyarrow and anndata read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.sparse as sp

from scshards import PackOptions, Vocab
from scshards.exporting.export import ExportReport, export
from scshards.exporting.options import ExportOptions
from scshards.packing.pack import pack
from scshards.packing.reshard import ReshardOptions, reshard

Cell = tuple[list[int], list[Any]]
"""Token ids and values."""


def write_h5ad(path: Path, x: Any, obs: Any = None) -> Path:
    """A dense array as an h5ad file of genes g0, g1, ..."""
    frame = pd.DataFrame(obs or {}, index=[f"c{i}" for i in range(x.shape[0])])
    var = pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])])
    anndata.AnnData(sp.csr_matrix(x), obs=frame, var=var).write_h5ad(path)
    return path


def vocab_of(n: int) -> Vocab:
    return Vocab([f"g{i}" for i in range(n)]).with_specials()


def quiet_pack(inputs: Any, root: Path | str, n_genes: int, **options: Any) -> None:
    chosen = {"workers": 1, "min_genes": 0} | options
    pack(inputs, root, vocab_of(n_genes), PackOptions(**chosen), progress=False)


def quiet_export(root: Path | str, output: Path | str, to: Any, **options: Any) -> ExportReport:
    return export(root, output, ExportOptions(to=to, **options), progress=False)


def in_source_order(root: Path) -> Path:
    """The same cells as they were in the inputs, by input and row."""
    new = root.with_name(f"{root.name}-in-order")
    options = ReshardOptions(shuffle=False, one_split=True, workers=1)
    reshard(root, new, options, progress=False)
    return new


def small_set(folder: Path, *, cells: int = 60, genes: int = 12, **options: Any) -> Path:
    """Two inputs of so many cells each, with labels; a third of the cells is in `valid`."""
    rng = np.random.default_rng(3)
    inputs = []
    for i in range(2):
        x = rng.poisson(0.7, (cells, genes)).astype(np.float32)
        x[5] = 0
        kinds = rng.choice(["T cell", "B: naïve", "嗜中性", "x/y"], cells).astype(object)
        kinds[:3] = None
        age = rng.normal(50, 9, cells)
        age[7] = np.nan
        obs = {"cell type": pd.Categorical(kinds), "age": age, "male": rng.random(cells) < 0.5}
        inputs.append(write_h5ad(folder / f"in{i}.h5ad", x, obs))
    chosen = {"obs": ("cell type", "age", "male"), "valid_fraction": 0.3, "cells_per_shard": 20}
    quiet_pack(inputs, folder / "set", genes, **(chosen | options))
    return folder / "set"


def bank(path: Path) -> list[Cell]:
    """The cells of a scBank; its other files are as they must be."""
    assert json.loads((path / "manifest.json").read_text()) == {
        "on_disk_format": "parquet",
        "main_data": "counts",
        "gene_vocab_md5": None,
    }
    assert json.loads((path / "studytable.json").read_text()) == {"study_ids": None}
    assert len(list(path.iterdir())) == 5  # and the report
    table = pq.read_table(path / "counts.datatable.parquet")
    assert table.column_names == ["id", "genes", "expressions"]
    assert table.column("id").to_pylist() == list(range(len(table)))
    return list(
        zip(table.column("genes").to_pylist(), table.column("expressions").to_pylist(), strict=True)
    )


def tables(folder: Path, files: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of parquet files, one file behind another."""
    rows = [row for name in files for row in pq.read_table(folder / name).to_pylist()]
    assert [row["id"] for row in rows] == list(range(len(rows)))
    return rows


def anndata_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an h5ad file as `tables` has them; missing is None."""
    data = anndata.read_h5ad(path)
    ids = data.var["id"].to_numpy()
    assert list(data.var_names) == [f"g{i}" for i in ids]
    x = data.X
    assert isinstance(x, sp.csr_matrix) and x.has_sorted_indices
    obs = data.obs.astype(object).where(data.obs.notna(), None)
    out = []
    for i, (key, labels) in enumerate(obs.iterrows()):
        at = slice(x.indptr[i], x.indptr[i + 1])
        cell = {"genes": ids[x.indices[at]].tolist(), "expressions": x.data[at].tolist()}
        out.append({"key": key, **cell, **labels.to_dict()})
    return out

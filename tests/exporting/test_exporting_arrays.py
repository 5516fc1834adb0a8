"""Arrays beside the genes in exported files: what anndata and pyarrow read is what was packed."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
from arrays_support import ANTIBODIES, N_GENES, assert_numbers, packed
from pack_support import quiet_pack, vocab_of

from scshards import ExportOptions, ShardSet, export
from scshards.base.errors import ConfigError
from scshards.packing.options import ReshardOptions
from scshards.packing.reshard import reshard

N = 60


def test_h5ad(tmp_path: Path) -> None:
    root, numbers = packed(tmp_path, N)
    export(root, tmp_path / "x.h5ad", ExportOptions(to="h5ad"), progress=False)
    found = anndata.read_h5ad(tmp_path / "x.h5ad")
    rows = [int(name[7:]) for name in found.obs_names]
    assert sorted(rows) == list(range(N))
    protein = found.obsm["protein"]
    assert list(protein.columns) == ["p1", "p 2", "p3"] and list(protein.index) == list(
        found.obs_names
    )
    whole = {
        "X_pca": found.obsm["X_pca"],
        "protein": protein.to_numpy(),
        "spots": found.obsm["spots"].toarray(),
        "Antibody Capture": found.obsm["Antibody Capture"].toarray(),
    }
    for i, row in enumerate(rows):
        assert_numbers({name: of[i] for name, of in whole.items()}, numbers, row)
    assert list(found.uns["arrays"]["Antibody Capture"]) == ANTIBODIES
    # What was exported can be packed again, and is the same.
    names = ("X_pca", "protein", "spots", "Antibody Capture")
    quiet_pack(tmp_path / "x.h5ad", tmp_path / "again", vocab_of(N_GENES), obsm=names)
    for cell in ShardSet(tmp_path / "again").cells("train", N):
        assert_numbers(cell.arrays, numbers, rows[int(cell.key[7:])])


def test_h5ad_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scshards.exporting.cells.PART_BYTES", 1)
    monkeypatch.setattr("scshards.shards.tar.CHUNK_BYTES", 4096)
    root, numbers = packed(tmp_path, N)
    export(
        root,
        tmp_path / "x",
        ExportOptions(to="h5ad", max_cells=25, where="donor != 'c'"),
        progress=False,
    )
    n = 0
    for path in sorted((tmp_path / "x").glob("*.h5ad")):
        found = anndata.read_h5ad(path)
        for i, name in enumerate(found.obs_names):
            some = {"X_pca": found.obsm["X_pca"][i], "spots": found.obsm["spots"][i].toarray()[0]}
            assert_numbers(some, numbers, int(name[7:]))
        n += found.n_obs
    assert 25 < n < N


def test_parquet(tmp_path: Path) -> None:
    root, numbers = packed(tmp_path, N)
    export(root, tmp_path / "x", ExportOptions(to="parquet"), progress=False)
    table = pq.read_table(next((tmp_path / "x").glob("*.parquet"))).to_pylist()
    assert len(table) == N
    for cell in table:
        spots, antibodies = np.zeros(400, np.float32), np.zeros(3, np.int32)
        spots[cell["spots.columns"]] = cell["spots.values"]
        antibodies[cell["Antibody Capture.columns"]] = cell["Antibody Capture.values"]
        found = {
            "X_pca": np.array(cell["X_pca"], np.float32),
            "protein": np.array(cell["protein"]),
            "spots": spots,
            "Antibody Capture": antibodies,
        }
        assert_numbers(found, numbers, int(cell["key"][7:]))


def test_a_sc_bank_says_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, _ = packed(tmp_path, N)
    with caplog.at_level(logging.WARNING, "scshards"):
        export(root, tmp_path / "x.scb", ExportOptions(to="scbank"), progress=False)
    assert "no place for what lies beside the genes: X_pca, protein, spots" in caplog.text


def test_names_that_files_can_not_have(tmp_path: Path) -> None:
    root, _ = packed(tmp_path, 20)
    path = tmp_path / "a.h5ad"
    a = anndata.read_h5ad(path)
    a.obsm["row"] = a.obsm["X_pca"]
    a.write_h5ad(path)
    quiet_pack(path, tmp_path / "row", vocab_of(N_GENES), obsm=("row",))
    with pytest.raises(ConfigError, match="another column, 'row'"):
        export(tmp_path / "row", tmp_path / "x", ExportOptions(to="parquet"), progress=False)
    reshard(tmp_path / "row", tmp_path / "none", ReshardOptions(arrays=("",)), progress=False)
    export(tmp_path / "none", tmp_path / "x", ExportOptions(to="parquet"), progress=False)
    assert root.exists()

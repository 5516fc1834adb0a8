"""Cells of SOMA experiments straight to shards: the same bytes as their h5ad partitions, and refusals.

The partitions are written by cellxgene_census and anndata, which know nothing of scshards.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
from pack_support import dense, index, quiet_pack, shard_sums, tree_sums
from soma_census import OLDER, STABLE, UNSORTED, Census

from scshards import PackOptions, Vocab, verify
from scshards.base.errors import (
    ConfigError,
    OutputExistsError,
    SourceError,
    StorageError,
    ValueKindError,
)
from scshards.census.partitions import partitions
from scshards.packing.pack import append, pack, pack_share
from scshards.sources.inputs import expand
from scshards.sources.open import input_identity, open_source
from scshards.sources.vocabulary import build_vocab, check_vocab

HEART = "suspension_type != 'na' and disease == 'normal' and tissue_general == 'heart'"
N = 30
"""Cells of a partition."""


def query(census: Census, name: str = "heart", **more: Any) -> str:
    said = "".join(f"&{key}={value}" for key, value in {"max_cells": N, **more}.items())
    return f"census://{name}?queries={census.queries}{said}"


@pytest.fixture(scope="module")
def vocab(census: Census) -> Vocab:
    """Most of the genes, by symbol and by id; some symbols are those of two genes."""
    var = census.anndata().var
    return Vocab.from_genes(
        sorted({*var.feature_name[::7], *var.feature_id[::5], *var.feature_name[:99]})
    )


@pytest.fixture(scope="module")
def partition_files(census: Census, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The cells of the query, N a file, in the order of their soma_joinids."""
    folder = tmp_path_factory.mktemp("partitions")
    with cellxgene_census.open_soma(uri=census.uri(), tiledb_config=UNSORTED) as opened:
        found = cellxgene_census.get_anndata(
            opened, "Homo sapiens", obs_value_filter=f"({HEART}) and is_primary_data == True"
        )
    found.obs.index = found.obs.soma_joinid.astype(str).rename(None)
    found.var.index = found.var.feature_id.rename(None)
    files = []
    for i, start in enumerate(range(0, found.n_obs, N)):
        files.append(folder / f"{i}.h5ad")
        found[start : start + N].write_h5ad(files[-1], compression="gzip")
    return files


def manifest(root: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((root / "manifest.json").read_bytes())
    return tree


@pytest.mark.parametrize(
    "options",
    [
        {"gene_column": "feature_name", "obs": ("cell_type", "is_primary_data", "raw_sum")},
        {
            "gene_column": "feature_id",
            "shuffle": False,
            "compression": "zstd",
            "obs": ("soma_joinid", "assay"),
            "min_genes": 40,
        },
        {
            "gene_column": "feature_name",
            "obs": ("donor_id",),
            "valid_fraction": 0.3,
            "split_by": "donor_id",
            "where": "cell_type != 'unknown' and nnz > 100",
            "unique": "observation_joinid",
        },
    ],
    ids=["symbols", "ids", "chosen"],
)
def test_the_shards_are_those_of_the_downloaded_partitions(
    census: Census,
    partition_files: list[Path],
    vocab: Vocab,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    options = {"cells_per_shard": 20, "min_match": 0.1, "seed": 5} | options
    straight = quiet_pack(query(census), tmp_path / "straight", vocab, **options)
    kept = options["obs"] + (() if "soma_joinid" in options["obs"] else ("soma_joinid",))
    quiet_pack(partition_files, tmp_path / "files", vocab, **{**options, "obs": kept})
    assert len(partition_files) > 1 and len(shard_sums(tmp_path / "files")) > 4
    assert shard_sums(tmp_path / "straight") == shard_sums(tmp_path / "files")
    a, b = manifest(tmp_path / "straight"), manifest(tmp_path / "files")
    for tree in (a, b):
        del tree["options"]["record"]["requests"]
        for source, more in zip(tree["sources"], tree["options"]["record"]["sources"], strict=True):
            del source["name"], more["identity"]
    assert a["splits"] == b["splits"] and a["options"] == b["options"]
    assert a["sources"] == b["sources"]
    names = [f"census://heart@{STABLE} [{i}]" for i in range(len(partition_files))]
    assert [s.name for s in straight.sources] == names
    assert verify(tmp_path / "straight").ok


def test_every_cell_is_found_again_by_its_soma_joinid(
    census: Census, vocab: Vocab, tmp_path: Path
) -> None:
    cells = census.anndata()
    quiet_pack(query(census), tmp_path / "set", vocab, gene_column="feature_name", min_match=0.1)
    table = index(tmp_path / "set", "train/000000.parquet")
    wanted = cells.obs.query(f"({HEART}) and is_primary_data").soma_joinid
    ids = table["obs.soma_joinid"].astype(int)
    assert sorted(ids) == wanted.tolist()
    known = np.flatnonzero(vocab.ids(cells.var.feature_name.tolist()) >= 0)
    totals = np.asarray(cells.X[:, known].sum(1)).ravel()
    np.testing.assert_allclose(table.total, totals[ids])
    assert manifest(tmp_path / "set")["options"]["obs"] == ["soma_joinid"]


def test_a_soma_source_is_what_the_file_is(census: Census, partition_files: list[Path]) -> None:
    (first, *_) = expand(query(census))
    with open_source(first.url, 3, name=first.name) as a, open_source(partition_files[0], 3) as b:
        assert (a.n_rows, a.n_columns, a.n_values) == (b.n_rows, b.n_columns, b.n_values)
        assert a.genes == b.genes and a.ordinal == 3 and not a.needs_transposing and not a.is_log1p
        assert a.names_in("feature_name") == b.names_in("feature_name")
        assert set(a.gene_columns) == {"feature_id", "feature_name", "feature_type"}
        assert set(a.obs_columns) == set(b.obs_columns)
        for column in (*a.obs_columns, "index"):
            mine, other = pd.Series(a.obs(column)), pd.Series(b.obs(column))
            assert mine.astype(str).tolist() == other.astype(str).tolist(), column
            assert hasattr(mine, "cat") == hasattr(other, "cat") or column == "observation_joinid"
        for start, stop, limits in (
            (0, N, {}),
            (3, 17, {"max_rows": 4}),
            (5, N, {"max_values": 1}),
            (0, N, {"max_values": 700, "max_rows": 3}),
            (9, 9, {}),
        ):
            np.testing.assert_array_equal(dense(a, start, stop, **limits), dense(b, start, stop))
            for block in a.blocks(start, stop, **limits):
                n = len(block.indptr) - 1
                assert n <= limits.get("max_rows", N)
                assert n == 1 or len(block.data) <= limits.get("max_values", 1 << 21)
        sample = a.sample(500)
        assert 100 < len(sample) <= a.n_values and set(sample) <= set(dense(b).ravel())
        with pytest.raises(SourceError, match="obs has no column 'celltype'"):
            a.obs("celltype")
        with pytest.raises(SourceError, match="var has no column 'symbol'"):
            a.names_in("symbol")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """An experiment as tiledbsoma.io makes one by itself: no nnz, other names, two layers, a dense one."""
    import tiledbsoma
    import tiledbsoma.io

    x = np.random.default_rng(0).poisson(1.0, (40, 9)).astype(np.float32)
    made = anndata.AnnData(
        sp.csr_matrix(x * 0.5),
        layers={"counts": sp.csr_matrix(x)},
        obs=pd.DataFrame(
            {"day": pd.array([1, None] * 20, "Int64")}, index=[f"c{i}" for i in range(40)]
        ),
        var=pd.DataFrame({"n": range(9)}, index=[f"G{i}" for i in range(9)]),
    )
    tiledbsoma.io.from_anndata(str(tmp_path / "plain"), made, "rna", X_layer_name="halves")
    with tiledbsoma.Experiment.open(str(tmp_path / "plain"), "w") as opened:
        layers = opened.ms["rna"].X
        layers.add_new_dense_ndarray("dense", type=pa.float32(), shape=x.shape)
    return tmp_path / "plain"


def test_any_experiment_is_packed(plain: Path, tmp_path: Path) -> None:
    vocab = Vocab.from_genes(f"G{i}" for i in range(9))
    url = f"soma://{plain}?measurement=rna&layer=counts"
    (file,) = expand(url)
    assert file.name == f"soma://{plain} [0]"
    with open_source(file.url, name=file.name) as source:
        assert source.genes == [f"G{i}" for i in range(9)]
        assert source.n_rows == 40 and source.matrix_name == "ms/rna/X/counts"
        np.testing.assert_array_equal(np.isnan(source.obs("day").astype(float)), [False, True] * 20)
    packed = quiet_pack(url, tmp_path / "set", vocab, obs=("day",))
    assert packed.labels["day"].kind == "number" and packed.value_kind == "counts"
    with pytest.raises(ValueKindError, match=r"(?s)0.5.*layer=counts in the address"):
        quiet_pack(f"soma://{plain}?measurement=rna&layer=halves", tmp_path / "no", vocab)
    with pytest.raises(SourceError, match="the layer 'dense' is dense"):
        expand(f"soma://{plain}?measurement=rna&layer=dense")


def test_the_only_layer_is_taken_and_named(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import tiledbsoma

    url, vocab = f"soma://{plain}?measurement=rna", Vocab.from_genes(f"G{i}" for i in range(9))
    with pytest.raises(SourceError, match=r"(?s)no layer 'raw'.*counts"):
        expand(url)
    with tiledbsoma.Experiment.open(str(plain), "w") as opened:
        for name in ("halves", "dense"):
            del opened.ms["rna"].X[name]
    quiet_pack(f"{url}&layer=counts", tmp_path / "asked", vocab)
    caplog.clear()
    quiet_pack(url, tmp_path / "set", vocab)
    assert "its only layer, counts, is taken" in caplog.text
    assert shard_sums(tmp_path / "set") == shard_sums(tmp_path / "asked")
    with pytest.raises(SourceError, match="no layer 'raw'"):
        expand(f"{url}&layer=raw")


def test_inputs_that_ask_for_what_is_not_there(
    census: Census, vocab: Vocab, tmp_path: Path
) -> None:
    uri, out = census.experiment(), tmp_path / "out"
    for url, error, said in (
        (
            f"soma://{uri}?filter=tissue_generl == 'lung'",
            ConfigError,
            r"(?s)tissue_generl.*tissue_general",
        ),
        (f"soma://{uri}?filter=tissue_general == 'lnug'", SourceError, "no cell fits"),
        (f"soma://{tmp_path}/none", SourceError, "no SOMA experiment"),
        (f"soma://{uri}?fliter=nnz > 3", ConfigError, r"(?s)unknown key 'fliter'.*'filter'"),
        (query(census, "hart"), ConfigError, r"(?s)no query 'hart'.*'heart'"),
        (query(census, release="2020-01-01"), ConfigError, r"(?s)does not serve.*2025-01-30"),
        (query(census, max_cells=0), ConfigError, "max_cells is a number of at least 1"),
        ([query(census), query(census)], ConfigError, "given twice"),
    ):
        with pytest.raises(error, match=said):
            quiet_pack(url, out, vocab)
        assert not out.exists()
    for options in ({"layer": "raw"}, {"raw": True}):
        with pytest.raises(SourceError, match=r"(?s)only AnnData has layers.*layer=NAME"):
            quiet_pack(query(census), out, vocab, **options)


def test_a_list_of_queries_is_relative_to_its_folder(census: Census, tmp_path: Path) -> None:
    shutil.copy(census.queries, tmp_path / "mine.toml")
    (tmp_path / "census").symlink_to(census.folder)
    (tmp_path / "all.txt").write_text(
        "# two queries and an experiment\n"
        "census://heart?queries=mine.toml&max_cells=40\n"
        f"census://lung?queries=mine.toml&release={OLDER}\tlungs\n"
        f"soma://census/{STABLE}/soma/census_data/homo_sapiens?filter=disease%20%3D%3D%20'COVID-19'\n"
    )
    found = expand(tmp_path / "all.txt")
    hearts = len(census.anndata().obs.query(f"({HEART}) and is_primary_data"))
    assert [f.name for f in found[: -(-hearts // 40)]] == [
        f"census://heart@{STABLE} [{i}]" for i in range(-(-hearts // 40))
    ]
    assert found[-2].name == "lungs" and OLDER in found[-2].url
    with open_source(found[-1].url, name=found[-1].name) as source:
        assert set(source.obs("disease")) == {"COVID-19"}
    (tmp_path / "all.txt").write_text("census://heart?queries=mine.toml&max_cells=9\thearts\n")
    with pytest.raises(ConfigError, match="one name is given to"):
        expand(tmp_path / "all.txt")


def test_cells_that_are_not_there_any_more_are_missed(
    census: Census, vocab: Vocab, tmp_path: Path
) -> None:
    everything = f"soma://{census.experiment()}?filter=nnz > 0&max_cells=100"
    last = partitions(everything)[-1]
    moved = str(last.address).replace(STABLE, OLDER)
    with pytest.raises(SourceError, match=r"has changed: of .* cells that were to be here it has"):
        open_source(moved)
    with pytest.raises(SourceError, match="has changed"):
        quiet_pack(moved, tmp_path / "out", vocab, gene_column="feature_name", min_match=0.1)
    assert not (tmp_path / "out").exists()
    assert input_identity(moved) != input_identity(str(last.address))


def test_shares_resumption_and_appending_keep_soma_joinid(
    census: Census,
    partition_files: list[Path],
    vocab: Vocab,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scshards.packing.plan.TASK_ROWS", 11)
    chosen = {
        "gene_column": "feature_name",
        "obs": ("cell_type",),
        "cells_per_shard": 25,
        "min_match": 0.1,
    }
    quiet_pack(query(census), tmp_path / "whole", vocab, **chosen)
    for _ in range(2):
        for i in (1, 2):
            pack_share(
                query(census),
                tmp_path / "shares",
                vocab,
                PackOptions(**chosen),
                False,
                share=(i, 2),
            )
    # Options that differ in what was added by itself alone are the same pack.
    explicit = {**chosen, "obs": ("cell_type", "soma_joinid")}
    pack(query(census), tmp_path / "shares", vocab, PackOptions(**explicit), False, finish=True)
    assert tree_sums(tmp_path / "shares") == tree_sums(tmp_path / "whole")

    more = {"gene_column": "feature_name", "obs": ("cell_type",)}
    append(query(census, "lung"), tmp_path / "shares", more, progress=False)
    assert "obs.soma_joinid" in index(tmp_path / "shares", "train/000003.parquet").columns
    added = manifest(tmp_path / "shares")
    assert added["options"]["obs"] == ["cell_type", "soma_joinid"]
    # The same again is done already; asked for otherwise, it is an input that the set has.
    before = tree_sums(tmp_path / "shares")
    append(query(census, "lung"), tmp_path / "shares", more, progress=False)
    assert tree_sums(tmp_path / "shares") == before
    with pytest.raises(SourceError, match="its cells are there already"):
        append(
            query(census, "lung"), tmp_path / "shares", more | {"min_match": 0.05}, progress=False
        )
    # A set that was packed without it stays without it.
    quiet_pack(partition_files, tmp_path / "files", vocab, **chosen)
    append(query(census, "lung"), tmp_path / "files", more, progress=False)
    assert manifest(tmp_path / "files")["options"]["obs"] == ["cell_type"]
    mixed = quiet_pack(
        [query(census, "lung"), *partition_files], tmp_path / "mixed", vocab, **chosen
    )
    assert list(mixed.labels) == ["cell_type"]


def test_an_experiment_that_changes_stops_a_pack(
    census: Census, vocab: Vocab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiledbsoma

    shutil.copytree(census.experiment(), tmp_path / "experiment")
    url = f"soma://{tmp_path}/experiment?filter={HEART}&max_cells={N}"
    options = {"gene_column": "feature_name", "min_match": 0.1}
    from scshards.packing import phases as job_phases

    real = job_phases.perform

    def written_to(work: Any) -> Any:
        if "scatter" in str(work.function):
            with tiledbsoma.SparseNDArray.open(f"{tmp_path}/experiment/ms/RNA/X/raw", "w") as x:
                x.write(one_value())
        return real(work)

    with monkeypatch.context() as patched:
        patched.setattr(job_phases, "perform", written_to)
        with pytest.raises(SourceError, match="the input has changed since this pack began"):
            quiet_pack(url, tmp_path / "out", vocab, **options)
    quiet_pack(url, tmp_path / "out", vocab, **options)
    assert verify(tmp_path / "out").ok


def one_value() -> Any:
    one = {"soma_dim_0": [0], "soma_dim_1": [1], "soma_data": pa.array([9.0], pa.float32())}
    return pa.table(one)


def test_a_read_that_fails_in_a_worker_is_gone_on_with(
    census: Census, vocab: Vocab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"gene_column": "feature_name", "min_match": 0.1, "cells_per_shard": 25}
    quiet_pack(query(census), tmp_path / "whole", vocab, **options)
    copy = tmp_path / "census"
    shutil.copytree(census.uri(), copy)
    url = f"soma://{copy}/census_data/homo_sapiens?filter=({HEART}) and is_primary_data == True&max_cells={N}"
    data = next(copy.glob("census_data/homo_sapiens/ms/RNA/X/raw/__fragments/*/d0.tdb"))
    away = data.with_name("away")

    from scshards.packing.phases import Phases

    real = Phases.scatter

    def without_data(self: Phases) -> None:
        data.rename(away)
        real(self)

    with monkeypatch.context() as patched:
        patched.setattr(Phases, "scatter", without_data)
        with pytest.raises(
            StorageError, match=r"(?s)reading .* failed.*run the same command to go on"
        ):
            quiet_pack(url, tmp_path / "out", vocab, **options, workers=2)
    with pytest.raises(OutputExistsError, match="another pack is half done"):
        quiet_pack(query(census), tmp_path / "out", vocab)
    away.rename(data)
    quiet_pack(url, tmp_path / "out", vocab, **options)
    assert shard_sums(tmp_path / "out") == shard_sums(tmp_path / "whole")


def test_vocabularies_are_made_of_queries_and_checked_with_them(census: Census) -> None:
    cells = census.anndata()
    built = build_vocab(query(census), "feature_name")
    assert set(cells.var.feature_name) < set(built.tokens)
    hearts = cells[cells.obs.eval(f"({HEART}) and is_primary_data")]
    expressed = np.asarray((hearts.X > 0).sum(0)).ravel() >= 5
    few = build_vocab(query(census), None, 5)
    assert set(cells.var.feature_id[expressed]) == set(few.tokens) - {"<pad>", "<cls>", "<eoc>"}
    for report in check_vocab(few, query(census)):
        assert report.matched == expressed.sum() and report.columns == cells.n_vars

"""Experiments read through census.experiment, beside what they were made of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from soma_census import Census

from scshards.base.errors import ConfigError, SourceError, StorageError
from scshards.census.address import SomaAddress
from scshards.census.context import store_options
from scshards.census.experiment import Experiment, identity, shared
from scshards.census.rows import by_row, stretches


@pytest.fixture(scope="module")
def cells(census: Census) -> anndata.AnnData:
    return census.anndata()


@pytest.fixture
def experiment(census: Census) -> Iterator[Experiment]:
    with Experiment(SomaAddress(uri=census.experiment())) as opened:
        yield opened


def dense(experiment: Experiment, ids: Any, **more: Any) -> tuple[np.ndarray, list[int]]:
    """The rows of some ids, and the values of each read."""
    out, sizes, at = np.zeros((len(ids), experiment.n_genes)), [], 0
    for indptr, indices, data in experiment.rows(np.asarray(ids), **more):
        assert indptr[0] == 0
        rows = np.repeat(np.arange(at, at + len(indptr) - 1), np.diff(indptr))
        np.add.at(out, (rows, indices), data)
        sizes.append(len(data))
        at += len(indptr) - 1
    assert at == len(ids)
    return out, sizes


def test_a_filter_takes_the_cells_that_pandas_takes(
    experiment: Experiment, cells: anndata.AnnData
) -> None:
    chosen = cells.obs.query("disease == 'normal' and tissue_general in ['heart', 'lung']")
    filter_ = "disease == 'normal' and tissue_general in ['heart', 'lung']"
    ids = experiment.ids(filter_)
    assert 0 < len(ids) < cells.n_obs and ids.dtype == np.int64
    np.testing.assert_array_equal(ids, chosen.soma_joinid)
    within = chosen.soma_joinid[chosen.soma_joinid.between(50, 200)]
    np.testing.assert_array_equal(experiment.ids(filter_, 50, 200), within)
    np.testing.assert_array_equal(experiment.ids(), np.arange(cells.n_obs))
    assert len(experiment.ids(filter_, 10**9)) == len(experiment.ids("nnz < 0")) == 0


@pytest.mark.parametrize(
    ("filter_", "said"),
    [
        ("tissue_generl == 'heart'", "tissue_generl"),
        ("tissue_general = 'heart'", "parse the given QueryCondition"),
        ("tissue_general == 5", "text stands in quotes"),
        ("nnz == 'many'", "many"),
        ("(nnz > 5", "parse the given QueryCondition"),
    ],
)
def test_a_filter_with_a_mistake_names_it_and_the_columns(
    experiment: Experiment, filter_: str, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        experiment.ids(filter_)
    assert said in error.value.what and filter_ in str(error.value.where)
    assert "suspension_type, tissue, tissue_general" in str(error.value.advice)


@pytest.mark.parametrize("read_values", [1, 100_000, 1 << 22])
@pytest.mark.parametrize("knows_sizes", [True, False])
def test_rows_are_those_that_were_written(
    experiment: Experiment, cells: anndata.AnnData, read_values: int, knows_sizes: bool
) -> None:
    # Two far-off stretches and single cells, of several datasets.
    ids = np.array(
        [*range(40), 77, 300, *range(410, 450), cells.n_obs - 1][:: 8 if read_values == 1 else 1]
    )
    sizes = experiment.n_values(ids) if knows_sizes else None
    found, reads = dense(experiment, ids, n_values=sizes, read_values=read_values)
    np.testing.assert_array_equal(found, cells.X[ids].toarray())
    if knows_sizes:
        np.testing.assert_array_equal(sizes, np.diff(cells.X.indptr)[ids])
        assert max(reads) <= max(2 * read_values, sizes.max())


def test_obs_and_var_come_in_the_order_of_their_ids(
    experiment: Experiment, cells: anndata.AnnData
) -> None:
    for ids in (np.arange(100, 200), np.array([3, cells.n_obs - 1]), np.zeros(0, np.int64)):
        table = experiment.obs(ids, ["cell_type", "nnz", "is_primary_data"]).to_pandas()
        wanted = cells.obs.iloc[ids][["cell_type", "nnz", "is_primary_data"]].reset_index(drop=True)
        assert table.astype(str).equals(wanted.astype(str))
    for column in ("soma_joinid", "feature_id", "feature_name"):
        assert experiment.var([column])[1 if column != "soma_joinid" else 0].to_pylist() == list(
            cells.var[column]
        )
    assert experiment.n_genes == cells.n_vars and experiment.gene_index == "feature_id"
    assert set(experiment.text_columns_of_var) == {"feature_id", "feature_name", "feature_type"}


def test_what_is_not_there_is_refused_with_what_is(
    census: Census, experiment: Experiment, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="obs has no column 'celltype'") as error:
        experiment.obs(np.arange(3), ["celltype"])
    assert "cell_type" in str(error.value.advice)
    with pytest.raises(
        SourceError, match="2 of 3 cells are not in the experiment, soma_joinid 100000"
    ):
        experiment.obs(np.array([5, 100_000, 100_001]), ["nnz"])
    uri = census.experiment()
    for address, said in {
        SomaAddress(uri=str(tmp_path / "none")): "no SOMA experiment",
        SomaAddress(uri=uri, measurement="rna"): "no measurement 'rna'",
        SomaAddress(uri=uri, layer="counts"): "no layer 'counts'",
    }.items():
        with pytest.raises(SourceError, match=said), Experiment(address):
            pass
    for uri, said in {
        "gs://bucket/x": "a path or from s3",
        "tiledb://x": "a path or from s3",
    }.items():
        with pytest.raises(ConfigError, match=said), Experiment(SomaAddress(uri=uri)):
            pass
    with pytest.raises(ConfigError, match="no option 'endpoint'"):
        Experiment(SomaAddress(uri="s3://bucket/x"), {"endpoint": "http://127.0.0.1:1"})


def test_a_damaged_matrix_is_an_error(census: Census, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(census.experiment(), copy)
    data = next(copy.glob("ms/RNA/X/raw/__fragments/*/d1.tdb"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with (
        Experiment(SomaAddress(uri=str(copy))) as experiment,
        pytest.raises(StorageError, match=r"reading rows 0 to .* failed: .*exceeds file size"),
    ):
        dense(experiment, np.arange(600))


def test_an_identity_is_that_of_one_state_and_one_choice(census: Census, tmp_path: Path) -> None:
    import pyarrow as pa
    import tiledbsoma

    copy = tmp_path / "copy"
    shutil.copytree(census.experiment(), copy)
    address = SomaAddress(uri=str(copy), filter="nnz > 3", cells=5)
    first, opened = identity(address), shared(address)
    assert identity(address) == first and shared(address) is opened
    other = identity(SomaAddress(uri=str(copy), filter="nnz > 4", cells=5))
    assert other["state"] == first["state"] and other != first
    with tiledbsoma.SparseNDArray.open(f"{copy}/ms/RNA/X/raw", "w") as x:
        coords = {"soma_dim_0": [0], "soma_dim_1": [1], "soma_data": pa.array([9.0], pa.float32())}
        x.write(pa.table(coords))
    assert identity(address)["state"] != first["state"]
    # Who opens it now sees what was written.
    found, _ = dense(shared(address), [0])
    assert found[0, 1] == 9


def test_on_s3_wrong_credentials_are_not_a_missing_experiment(s3_census: Census, s3: Any) -> None:
    address = SomaAddress(uri=s3_census.experiment())
    with Experiment(address, s3.options) as experiment:
        assert len(experiment.ids()) == s3_census.anndata().n_obs
    assert identity(address, s3.options) == identity(address)
    wrong = {**s3.options, "secret": "hunter2"}
    with pytest.raises(StorageError, match="access denied") as error:
        Experiment(address, wrong)
    assert "hunter2" not in str(error.value)
    with pytest.raises(SourceError, match="no SOMA experiment"):
        Experiment(SomaAddress(uri=f"{s3.url}/none"), s3.options)


def test_a_store_is_listed_with_what_tiledb_reads_it_with() -> None:
    given = {"key": "k", "client_kwargs": {"use_ssl": False}}
    assert store_options(SomaAddress(uri="s3://b/x", region="us-west-2"), given) == {
        "key": "k",
        "client_kwargs": {"use_ssl": False, "region_name": "us-west-2"},
    }
    assert given == {"key": "k", "client_kwargs": {"use_ssl": False}}
    assert store_options(SomaAddress(uri="/data/x"), given) == {}


@given(
    sizes=st.lists(st.integers(0, 50), max_size=60),
    gaps=st.integers(1, 5),
    said=st.booleans(),
    read_values=st.integers(1, 200),
    tile=st.sampled_from([1, 7, 16, 1000]),
)
def test_stretches_hold_every_cell_once_and_are_bounded(
    sizes: list[int], gaps: int, said: bool, read_values: int, tile: int
) -> None:
    n_values = np.array(sizes, np.int64)
    ids = np.arange(len(sizes), dtype=np.int64) * gaps + 3
    cut = list(stretches(ids, n_values if said else None, read_values, 10.0, tile))
    assert [i for a, b in cut for i in range(a, b)] == list(range(len(sizes)))
    for a, b in cut:
        values = n_values[a:b].sum() if said else 10 * (b - a)
        assert a < b and (b - a == 1 or values <= 2 * read_values)
        assert b - a <= 8 * max(1, read_values // 10)


def test_stretches_end_where_tiles_do() -> None:
    ids = np.arange(100, 10_000, dtype=np.int64)
    ends = [int(ids[b - 1]) + 1 for _, b in stretches(ids, None, 3_000, 1.0, 2048)]
    assert all(end % 2048 == 0 for end in ends[:-1]) and len(ends) == 3


@given(st.data())
def test_values_in_any_order_come_by_rows(data: st.DataObject) -> None:
    n, ids = 12, np.unique(data.draw(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=12)))
    cells = st.tuples(st.integers(0, len(ids) - 1), st.integers(0, n - 1))
    at = data.draw(st.lists(cells, unique=True, max_size=60))
    split = data.draw(st.integers(0, len(at)))
    rows = np.array([r for r, _ in at], np.int64)
    columns = np.array([c for _, c in at], np.int64)
    values = np.arange(1, len(at) + 1, dtype=np.float32)
    parts = [(ids[rows[s]], columns[s], values[s]) for s in (slice(split), slice(split, None))]
    wanted = sp.coo_array((values, (rows, columns)), (len(ids), n)).toarray()
    sizes, kind = np.bincount(rows, minlength=len(ids)), np.dtype(np.float32)
    for dealt in (by_row(ids, parts, kind, n), by_row(ids, parts, kind, n, sizes)):
        assert dealt is not None
        got = sp.csr_array((dealt.data, dealt.indices, dealt.indptr), (len(ids), n)).toarray()
        np.testing.assert_array_equal(got, wanted)
    if len(columns):
        for told in (None, sizes):
            with pytest.raises(ValueError, match="a value of gene"):
                by_row(ids, parts, kind, int(columns.max()), told)
    row = data.draw(st.integers(0, len(ids) - 1))
    for wrong in (-1, 1):
        told = sizes.copy()
        told[row] = max(0, told[row] + wrong)
        if told[row] != sizes[row]:
            assert by_row(ids, parts, kind, n, told) is None


@pytest.mark.parametrize("ids", [[5, 6, 9], [5, 1 << 40, (1 << 40) + 4]])
@pytest.mark.parametrize("stray", [0, 4, 7, 1 << 30, 1 << 50])
def test_values_of_rows_that_were_not_asked_for_are_seen(ids: list[int], stray: int) -> None:
    part = (np.array([5, stray]), np.array([1, 1]), np.ones(2, np.float32))
    told = np.array([1, 1, 0])
    assert by_row(np.array(ids), [part], np.dtype(np.float32), 2, told) is None


@pytest.mark.parametrize("wrong", ["none", "more", "turned", "huge", "negative"])
def test_rows_are_whole_where_obs_says_how_many_values_something_else_has(
    experiment: Experiment, cells: anndata.AnnData, wrong: str
) -> None:
    ids = np.arange(0, 120, 3)
    true = np.diff(cells.X.indptr)[ids].astype(np.int64)
    said = {
        "none": 0 * true, "more": true + 1, "turned": true[::-1], "huge": true + (1 << 50), "negative": -true,
    }[wrong]  # fmt: skip
    found, _ = dense(experiment, ids, n_values=said, read_values=3000)
    np.testing.assert_array_equal(found, cells.X[ids].toarray())


def test_any_experiment_of_tiledbsoma_io_is_read(tmp_path: Path) -> None:
    import tiledbsoma.io

    x = sp.random(30, 12, 0.4, "csr", random_state=np.random.default_rng(0))
    made = anndata.AnnData(
        x,
        obs=pd.DataFrame({"a": range(30)}, index=[f"c{i}" for i in range(30)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(12)]),
    )
    tiledbsoma.io.from_anndata(str(tmp_path / "e"), made, "rna")
    address = SomaAddress(uri=str(tmp_path / "e"), measurement="rna", layer="data")
    with Experiment(address) as experiment:
        assert experiment.gene_index == "var_id" and experiment.layers == ["data"]
        assert experiment.n_values(np.arange(3)) is None and experiment.dtype == np.float64
        assert experiment.mean_values == x.nnz / 30
        np.testing.assert_array_equal(dense(experiment, [0, 7, 29])[0], x.toarray()[[0, 7, 29]])

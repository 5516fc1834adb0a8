"""Sources: the rows of a file in bounded blocks, and the names and columns around them."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pack_support import adata, counts, write

from scshards.base import files
from scshards.base.errors import ConfigError, SourceError, StorageError
from scshards.sources import matrix as sources_matrix
from scshards.sources.open import open_source
from scshards.sources.rows import Source

FORMS = ["csr", "csc", "dense"]


def rebuild(source: Source, start: int, stop: int, **limits: int) -> np.ndarray:
    """The rows start:stop as a dense matrix, after every block was found to keep its promises."""
    out = np.zeros((stop - start, source.n_columns))
    at = start
    for block in source.blocks(start, stop, **limits):
        n = len(block.indptr) - 1
        assert block.first_row == at and n > 0
        assert n <= limits.get("max_rows", n)
        assert block.indptr.dtype == np.int64 and block.indices.dtype == np.int32
        assert len(block.indices) == len(block.data) == block.indptr[-1] - block.indptr[0]
        assert len(block.data) <= limits.get("max_values", len(block.data)) or n == 1
        rows = np.repeat(np.arange(at - start, at - start + n), np.diff(block.indptr))
        np.add.at(out, (rows, block.indices), block.data)
        at += n
    assert at == stop
    return out


@pytest.mark.parametrize("form", FORMS)
def test_blocks_hold_the_rows_and_their_limits(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = counts(57, 23)
    x[11] = 1 + np.arange(23)  # a row longer than the smallest limit
    x[30:41] = 0
    path = write(tmp_path / "a.h5ad", x, form=form)
    for bucket in (8, 100, 1 << 21):
        monkeypatch.setattr(sources_matrix, "BLOCK_VALUES", bucket)
        with open_source(path) as source:
            assert (source.n_rows, source.n_columns) == x.shape
            assert source.n_values == (x.size if form == "dense" else np.count_nonzero(x))
            for start, stop in ((0, 57), (0, 1), (10, 45), (31, 40), (56, 57), (20, 20)):
                for limits in ({}, {"max_rows": 4}, {"max_values": 15}, {"max_values": 60}):
                    assert (rebuild(source, start, stop, **limits) == x[start:stop]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
def test_any_storage_of_the_arrays(tmp_path: Path, form: str, compression: str | None) -> None:
    x = counts(40, 30)
    made = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[form](x)
    adata(made).write_h5ad(tmp_path / "a.h5ad", compression=compression)
    with open_source(tmp_path / "a.h5ad") as source:
        assert (rebuild(source, 0, 40) == x).all()


def test_dense_slabs_end_where_chunks_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = counts(50, 8)
    write(tmp_path / "a.h5ad", x, form="dense")
    with h5py.File(tmp_path / "a.h5ad", "a") as f:
        attrs = dict(f["X"].attrs)
        del f["X"]
        f.create_dataset("X", data=x, chunks=(12, 3), compression="gzip").attrs.update(attrs)
    reads: list[tuple[int, int]] = []
    real = sources_matrix.Dense.__init__

    class Watched:
        def __init__(self, data: Any) -> None:
            self._data, self.chunks, self.shape, self.dtype = (
                data,
                data.chunks,
                data.shape,
                data.dtype,
            )

        def __getitem__(self, rows: slice) -> Any:
            reads.append((rows.start, rows.stop))
            return self._data[rows]

    def watch(self: Any, data: Any) -> None:
        real(self, Watched(data))

    monkeypatch.setattr(sources_matrix.Dense, "__init__", watch)
    with open_source(tmp_path / "a.h5ad") as source:
        assert (rebuild(source, 5, 50, max_values=8 * 5) == x[5:]).all()
    assert reads == [(5, 12), (12, 24), (24, 36), (36, 48), (48, 50)]


def test_the_transposition_is_made_once_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = counts(30, 20)
    path = write(tmp_path / "a.h5ad", x, form="csc")
    folder = tmp_path / "scratch" / "t"
    with open_source(path, scratch=folder) as source:
        assert source.needs_transposing
        source.transpose()
        made = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    with open_source(path, scratch=folder) as source:
        assert (rebuild(source, 0, 30) == x).all()
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == made
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with open_source(path) as source:
        assert (rebuild(source, 0, 30) == x).all()
        assert list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "tmp").iterdir())
    monkeypatch.setattr(files, "is_in_memory", lambda folder: True)
    with (
        open_source(path) as source,
        pytest.raises(StorageError, match="temporary folder is in memory"),
    ):
        source.transpose()


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_matrix(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_matrix, "BLOCK_VALUES", 20_000)
    monkeypatch.setattr(sources_matrix, "SLAB_VALUES", 20_000)
    peaks = []
    for n in (500, 6000):
        x = np.random.default_rng(0).poisson(1, (n, 200)).astype(np.float32)
        path = write(tmp_path / f"{n}.h5ad", x, form=form)
        tracemalloc.start()
        with open_source(path) as source:
            total = sum(b.data.sum() for b in source.blocks(max_rows=500, max_values=20_000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == x.sum()
    # Twelve times the rows; 8 bytes a row are allowed, a copy of the matrix (700 bytes a row) is not.
    assert peaks[1] < peaks[0] + 100 * 5500, peaks


@pytest.mark.parametrize("form", FORMS)
def test_samples_come_from_all_over(tmp_path: Path, form: str) -> None:
    x = np.repeat(np.arange(1, 1001)[:, None], 10, axis=1).astype(np.float32)
    path = write(tmp_path / "a.h5ad", x, form=form)
    with open_source(path) as source:
        some = source.sample(320)
        assert 160 <= len(some) <= 640 and some.min() < 20 and some.max() > 980
        assert sorted(source.sample(10**6)) == sorted(x.ravel())


def test_names_and_columns(tmp_path: Path) -> None:
    made = adata(sp.csr_matrix(counts(3, 4)), obs={"a": [1, 2, 3], "b": ["x", "y", "z"]})
    made.var["symbol"] = pd.Categorical(["S0", None, "S2", "S2"])
    made.var["text"] = ["t0", "t1", "t2", "t3"]
    made.var["number"] = [1, 2, 3, 4]
    made.var["flag"] = [True, False, True, True]
    made.var["code"] = pd.Categorical([1, 2, 1, 1])
    made.write_h5ad(tmp_path / "a.h5ad")
    with open_source(tmp_path / "a.h5ad", 7, gene_column="symbol") as source:
        assert list(source.genes) == ["S0", "", "S2", "S2"] and source.ordinal == 7
        assert list(source.gene_columns) == ["symbol", "text"]
        assert list(source.names_in(None)) == [f"G{i:03d}" for i in range(4)]
        assert list(source.names_in("number")) == ["1", "2", "3", "4"]
        assert list(source.obs_columns) == ["a", "b"]
        assert source.obs("a").tolist() == [1, 2, 3]
        with pytest.raises(SourceError, match="no column 'c'"):
            source.obs("c")
        assert not source.is_log1p and not source.needs_transposing


def test_other_matrices_are_named_by_their_options(tmp_path: Path) -> None:
    made = adata(sp.csr_matrix(counts(3, 4)))
    made.raw = made.copy()
    made.layers["a"] = made.X * 2
    made.write_h5ad(tmp_path / "a.h5ad")
    for chosen, options in (
        ({}, ["--layer a", "--raw"]),
        ({"layer": "a"}, ["the default, X", "--raw"]),
        ({"raw": True}, ["the default, X", "--layer a"]),
    ):
        with open_source(tmp_path / "a.h5ad", **chosen) as source:
            assert [option for option, _ in source.other_samples(100)] == options


def test_more_sources_than_keys_can_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(3, 4))
    with pytest.raises(ConfigError, match="format 1"):
        open_source(path, 10**6)


def test_credentials_are_not_in_the_name(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://u:hush@host/a.h5ad", "wb") as f:
        f.write(write(tmp_path / "a.h5ad", counts(3, 4)).read_bytes())
    with open_source("memory://u:hush@host/a.h5ad") as source:
        assert source.name == "memory://host/a.h5ad"

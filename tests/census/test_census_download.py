"""Partitions as h5ad files: the same cells as the Census's own library gives, and every way to stop midway."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from soma_census import OLDER, STABLE, UNSORTED, Census

from scshards.base.errors import (
    ConfigError,
    OutputExistsError,
    ScshardsError,
    SourceError,
    StorageError,
)
from scshards.census import download as module
from scshards.census.download import DownloadedQuery, download
from scshards.census.experiment import Experiment
from scshards.census.h5ad import H5adWriter
from scshards.census.index import build_index, load_index
from scshards.census.options import DownloadOptions
from scshards.census.partitions import partitions

MAX_CELLS = 30


@pytest.fixture(scope="module")
def index(census: Census, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The queries heart and lung."""
    folder = tmp_path_factory.mktemp("index")
    build_index(["heart", "lung"], str(folder), census.queries, progress=False)
    return folder


def run(index: Path, output: Path, *names: str, **options: Any) -> tuple[DownloadedQuery, ...]:
    chosen = DownloadOptions(**{"max_cells": MAX_CELLS, **options})
    return download(list(names) or ["heart"], str(index), str(output), chosen, progress=False)


def cells_of(index: Path, name: str = "heart") -> np.ndarray:
    return load_index(str(index), name).ids


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(index: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of the partitions of the heart."""
    folder = tmp_path_factory.mktemp("whole")
    run(index, folder)
    return files(folder)


def no_reading(patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the experiment was opened")

    patch.setattr(module, "Experiment", refuse)


# --- what is in the files --------------------------------------------------------------------


def test_partitions_hold_what_the_censuss_own_library_gives(
    census: Census, index: Path, tmp_path: Path
) -> None:
    report = run(index, tmp_path)
    ids = cells_of(index)
    names = sorted(p.name for p in (tmp_path / "heart").glob("*.h5ad"))
    assert names == [f"partition_{i:06d}.h5ad" for i in range(-(-len(ids) // MAX_CELLS))]
    with cellxgene_census.open_soma(uri=census.uri(), tiledb_config=UNSORTED) as opened:
        for i, name in enumerate(names):
            part = ids[i * MAX_CELLS : (i + 1) * MAX_CELLS]
            theirs = cellxgene_census.get_anndata(opened, "Homo sapiens", obs_coords=part)
            ours = anndata.read_h5ad(tmp_path / "heart" / name)
            assert isinstance(ours.X, sp.csr_matrix) and ours.X.dtype == np.float32
            assert ours.X.has_canonical_format and (ours.X != theirs.X).nnz == 0
            assert ours.obs_names.tolist() == [str(i) for i in part]
            assert ours.var_names.tolist() == theirs.var.feature_id.tolist()
            for mine, other in ((ours.obs, theirs.obs), (ours.var, theirs.var)):
                assert list(mine.columns) == list(other.columns)
                for column in other:
                    same = mine[column].to_numpy() == other[column].to_numpy()
                    assert same.all(), column
                    if mine[column].dtype != other[column].dtype:
                        # Text that repeats itself, as anndata writes it.
                        assert (mine[column].dtype, other[column].dtype) == ("category", "object")
            assert ours.uns["census"]["version"] == STABLE
    (row,) = report
    assert (row.partitions, row.made, row.were_there, row.left) == (len(names), len(names), 0, 0)
    assert row.cells == len(ids)
    assert row.bytes == sum((tmp_path / "heart" / n).stat().st_size for n in names)


def test_they_are_the_partitions_that_pack_takes(index: Path, tmp_path: Path) -> None:
    run(index, tmp_path)
    found = partitions(f"census://heart?index={index}&max_cells={MAX_CELLS}")
    for number, part in enumerate(found):
        obs = anndata.read_h5ad(tmp_path / "heart" / f"partition_{number:06d}.h5ad").obs
        ends = obs.soma_joinid.iloc[0], obs.soma_joinid.iloc[-1], len(obs)
        assert ends == (part.address.first, part.address.last, part.address.cells)


def test_an_exact_multiple_makes_no_empty_partition(index: Path, tmp_path: Path) -> None:
    n = len(cells_of(index))
    divisor = next(d for d in range(n // 3, 0, -1) if n % d == 0)
    for size in (n, divisor):
        run(index, tmp_path / str(size), max_cells=size)
        found = sorted((tmp_path / str(size) / "heart").glob("*.h5ad"))
        assert len(found) == n // size
        assert sum(anndata.read_h5ad(p).n_obs for p in found) == n


def test_however_it_is_read_the_bytes_are_the_same(
    index: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = small_reads(monkeypatch)
    run(index, tmp_path)
    assert calls["blocks"] > 3 * len(list(tmp_path.rglob("*.h5ad")))
    assert files(tmp_path) == whole


def test_the_writer_takes_blocks_of_any_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = sp.random(3000, 400, 0.3, "csr", np.float32, rng)
    obs, var = pd.DataFrame(index=map(str, range(3000))), pd.DataFrame(index=map(str, range(400)))
    cuts = [0, 0, *np.sort(rng.integers(0, 3000, 7)), 3000]
    with H5adWriter(tmp_path / "a.h5ad", obs, var, np.dtype(np.float32)) as writer:
        for start, stop in itertools.pairwise(cuts):
            part = x[start:stop]
            writer.add(part.indptr.astype(np.int64), part.indices, part.data)
        writer.finish()
    assert writer.values == x.nnz > 1 << 18, "more than two chunks"
    read = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert (x != read.X).nnz == 0 and read.X.nnz == x.nnz


# --- sharing, going on, mending --------------------------------------------------------------


def test_tasks_share_all_partitions_of_all_queries(
    index: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    made = [run(index, tmp_path, "heart", "lung", share=(i, 3)) for i in (3, 1, 2)]
    per_task = [sum(q.made for q in report) for report in made]
    total = sum(q.partitions for q in made[-1])
    assert sum(per_task) == total and max(per_task) - min(per_task) <= 1
    assert [q.left for q in made[-1]] == [0, 0]
    assert sum(q.left for q in made[0]) == total - per_task[0]
    hearts = {name: data for name, data in files(tmp_path).items() if name.startswith("heart")}
    assert hearts == whole


def test_one_partition(index: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    run(index, tmp_path, partitions=(1,))
    found = files(tmp_path)
    assert sorted(found) == [
        "heart/download.json", "heart/partition_000001.h5ad",
    ]  # fmt: skip
    assert all(whole[name] == data for name, data in found.items())
    with pytest.raises(ConfigError, match=r"none is number 99"):
        run(index, tmp_path, partitions=(0, 99))


def test_a_second_call_makes_what_is_missing(
    index: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(index, tmp_path)
    with monkeypatch.context() as patch:
        no_reading(patch)
        assert run(index, tmp_path)[0].made == 0
    (tmp_path / "heart" / "partition_000000.h5ad").unlink()
    (tmp_path / "heart" / ".partition_000000.h5ad.tmp").write_bytes(b"of a process that was killed")
    (tmp_path / "heart" / ".partition_000000.lock").write_bytes(b"")
    assert run(index, tmp_path)[0].made == 1
    assert files(tmp_path) == whole


def test_partitions_of_something_else_are_refused(
    census: Census, index: Path, tmp_path: Path
) -> None:
    run(index, tmp_path, partitions=(0,))
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="another index, release or size"):
        run(index, tmp_path, max_cells=31)
    build_index(["heart"], str(tmp_path / "i"), census.queries, OLDER, progress=False)
    with pytest.raises(ConfigError, match="another index, release or size"):
        run(tmp_path / "i", tmp_path)
    theirs = tmp_path / "theirs" / "heart"
    theirs.mkdir(parents=True)
    (theirs / "partition_0.h5ad").write_bytes(b"")
    with pytest.raises(ConfigError, match="if scshards made them"):
        run(index, tmp_path / "theirs")
    assert {n: d for n, d in files(tmp_path).items() if n.startswith("heart/")} == before


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match="4/3 is no share"):
        DownloadOptions(share=(4, 3))
    with pytest.raises(ConfigError, match="at least 1 cell"):
        DownloadOptions(max_cells=0)
    with pytest.raises(ConfigError, match="only one of them"):
        DownloadOptions(share=(1, 2), partitions=(0,))


def test_the_output_is_a_local_folder(index: Path) -> None:
    with pytest.raises(ConfigError, match="local folder") as e:
        download(["heart"], str(index), "s3://user:secret@bucket/x", progress=False)
    assert "secret" not in str(e.value)


# --- faults ----------------------------------------------------------------------------------


def small_reads(
    patch: pytest.MonkeyPatch, fail_after: int | None = None, error: Exception | None = None
) -> dict[str, int]:
    """Blocks of few values; after so many of them, the error."""
    rows, calls = Experiment.rows, {"blocks": 0}

    def few(self: Experiment, ids: Any, **more: Any) -> Iterator[Any]:
        for block in rows(self, ids, **{**more, "read_values": 1000}):
            if calls["blocks"] == fail_after:
                assert error is not None
                raise error
            calls["blocks"] += 1
            yield block

    patch.setattr(Experiment, "rows", few)
    return calls


@pytest.mark.parametrize(
    "error", [StorageError("reading rows failed", where="s3://x"), KeyboardInterrupt()]
)
def test_what_stops_midway_leaves_no_half_partition(
    index: Path, whole: dict[str, bytes], tmp_path: Path, error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run(index, tmp_path, partitions=(0,))
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        small_reads(patch, 2, error)
        with pytest.raises(type(error)):
            run(index, tmp_path)
    assert files(tmp_path) == before
    assert run(index, tmp_path)[0].were_there == 1
    assert files(tmp_path) == whole


@pytest.mark.parametrize("limit", [2_000, 100_000])
def test_a_full_disk(index: Path, whole: dict[str, bytes], tmp_path: Path, limit: int) -> None:
    """A file larger than the limit can't be written, as if the disk were full."""
    assert min(len(data) for name, data in whole.items() if name.endswith(".h5ad")) > 100_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StorageError, match="File too large") as e:
            run(index, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "partition_000000.h5ad" in str(e.value) and "run the same again" in str(e.value)
    assert list(files(tmp_path)) == ["heart/download.json"]
    run(index, tmp_path)
    assert files(tmp_path) == whole


def test_another_process_makes_the_same_partition(index: Path, tmp_path: Path) -> None:
    (tmp_path / "heart").mkdir()
    with (tmp_path / "heart" / ".partition_000001.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputExistsError, match="another process is writing") as e:
            run(index, tmp_path)
    assert "partition_000001.h5ad" in str(e.value)
    assert run(index, tmp_path)[0].were_there == 1


def test_cells_that_vanished_are_noticed(census: Census, tmp_path: Path) -> None:
    """The index is of the newer release, and what it leads to is the older one, which lacks cells."""
    settings = Path(census.queries).read_text().partition("[query.")[0]
    text = "[query.heart]\nfilter = \"tissue_general == 'heart'\"\nprimary = false\n"
    (tmp_path / "q.toml").write_text(settings + text)
    for name, version in (("new", STABLE), ("old", OLDER)):
        folder = str(tmp_path / name)
        build_index(["heart"], folder, str(tmp_path / "q.toml"), version, progress=False)
    new, old = cells_of(tmp_path / "new"), cells_of(tmp_path / "old")
    moved(tmp_path / "new", tmp_path / "i", census.experiment(OLDER))
    gone = len(np.setdiff1d(new, old))
    assert gone > 0
    size = len(new) - gone  # the first partition is whole, and the second one has lost all cells
    with pytest.raises(SourceError, match="experiment has changed") as e:
        run(tmp_path / "i", tmp_path / "out", max_cells=size)
    assert f"of {gone:,} cells {gone:,} are not there" in str(e.value)
    assert [p.name for p in (tmp_path / "out").rglob("*.h5ad")] == ["partition_000000.h5ad"]


def test_a_release_that_is_gone(index: Path, tmp_path: Path) -> None:
    moved(index, tmp_path / "i", str(tmp_path / "withdrawn"))
    with pytest.raises(SourceError, match="no SOMA experiment") as e:
        run(tmp_path / "i", tmp_path / "out")
    assert "census list" in str(e.value)


def test_a_damaged_index(index: Path, tmp_path: Path) -> None:
    moved(index, tmp_path / "i", "anywhere")
    (tmp_path / "i" / "heart.idx").write_text("1\n")
    with pytest.raises(ScshardsError, match="the index is damaged"):
        run(tmp_path / "i", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def moved(index: Path, to: Path, experiment: str) -> None:
    """A copy of the index of the heart that leads elsewhere."""
    to.mkdir()
    (to / "heart.idx").write_bytes((index / "heart.idx").read_bytes())
    mark = dataclasses.asdict(load_index(str(index), "heart").mark)
    (to / "heart.json").write_text(json.dumps(mark | {"experiment": experiment}))

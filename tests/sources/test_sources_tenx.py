"""10x inputs: `.h5` files of Cell Ranger 2 and 3, mtx folders."""

from __future__ import annotations

import gzip
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from pack_support import (
    assert_holds,
    counts,
    dense,
    expected,
    key,
    quiet_pack,
    vocab_of,
    write,
    write_10x,
)

from scshards import Vocab
from scshards.base.errors import SourceError
from scshards.sources import matrix as sources_matrix
from scshards.sources import mtx as sources_mtx
from scshards.sources.open import open_source
from scshards.sources.vocabulary import build_vocab


@pytest.mark.parametrize("version", [2, 3])
def test_cells_of_an_h5_file_come_back(tmp_path: Path, version: int) -> None:
    x = counts(41, 17, dtype=np.int32)
    x[5] = 0
    path = write_10x(tmp_path / "a.h5", x, version=version)
    other = write(tmp_path / "b.h5ad", counts(6, 17, seed=1))
    genes = [f"G{i:03d}" for i in range(17)]
    vocab = Vocab.from_genes(genes[2:])
    manifest = quiet_pack([path, other], tmp_path / "out", vocab, min_genes=0)
    want = {key(0, i): cell for i, cell in enumerate(expected(x, genes, vocab))}
    want |= {
        key(1, i): cell for i, cell in enumerate(expected(counts(6, 17, seed=1), genes, vocab))
    }
    assert_holds(tmp_path / "out", want)
    first = manifest.sources[0]
    assert (first.rows, first.columns, first.matched, first.unmatched) == (41, 17, 15, 2)
    assert first.unmatched_values == x[:, :2].astype(bool).sum()


def test_names_are_those_of_scanpy(tmp_path: Path) -> None:
    x = counts(4, 3)
    with open_source(write_10x(tmp_path / "3.h5", x), gene_column="gene_ids") as source:
        assert source.genes == ["E000", "E001", "E002"]
        assert source.names_in(None) == ["G000", "G001", "G002"]
        assert source.gene_columns == ["gene_ids", "feature_types", "genome"]
        assert source.names_in("feature_types") == ["Gene Expression"] * 3
        assert source.names_in("genome") == ["GRCh38"] * 3
        assert list(source.obs_columns) == [] and source.matrix_name == "matrix"
        with pytest.raises(SourceError, match="no column 'donor'"):
            source.obs("donor")
    with open_source(write_10x(tmp_path / "2.h5", x, version=2)) as source:
        assert source.genes == ["G000", "G001", "G002"] and source.gene_columns == ["gene_ids"]
    with (
        open_source(tmp_path / "3.h5", gene_column="gene_id") as source,
        pytest.raises(SourceError) as refused,
    ):
        source.genes  # noqa: B018
    assert "gene_ids" in str(refused.value)
    vocab = build_vocab([tmp_path / "3.h5"], "gene_ids")
    assert vocab.tokens[:3] == ("E000", "E001", "E002")


def test_h5_files_that_are_refused(tmp_path: Path) -> None:
    x = counts(5, 4)
    whole = write_10x(tmp_path / "a.h5", x)

    def refused(path: Path, *parts: str, **chosen: Any) -> None:
        with pytest.raises(SourceError) as e:
            open_source(path, **chosen)
        for part in (path.name, *parts):
            assert part in str(e.value)

    refused(whole, "only AnnData has layers", "leave --layer", layer="counts")
    refused(whole, "a raw matrix", raw=True)
    two = write_10x(tmp_path / "two.h5", x, version=2, genome="hg19")
    refused(write_10x(two, x, version=2, genome="mm10"), "2 genomes", "hg19, mm10", "read_10x_h5")
    for name, node, fault in (
        ("short", "matrix/barcodes", "do not fit"),
        ("names", "matrix/features/name", "do not fit"),
        ("shape", "matrix/indptr", "do not fit together"),
    ):
        path = write_10x(tmp_path / f"{name}.h5", x)
        with h5py.File(path, "a") as f:
            values = f[node][:-1]
            del f[node]
            f[node] = values
        refused(path, fault)
    path = write_10x(tmp_path / "gone.h5", x)
    with h5py.File(path, "a") as f:
        del f["matrix/data"]
    refused(path, "no 'data' in it")
    with h5py.File(tmp_path / "molecules.h5", "w") as f:
        f["barcode_idx"] = np.arange(3)
    refused(tmp_path / "molecules.h5", "no matrix X")


def test_a_file_of_cell_ranger(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "scanpy_10x_v3_test.h5"
    with h5py.File(path) as f:
        m = f["matrix"]
        x = sp.csc_matrix((m["data"][:], m["indices"][:], m["indptr"][:]), m["shape"][:]).T
        genes = [name.decode() for name in m["features/name"][:]]
    vocab = build_vocab([path])
    quiet_pack(path, tmp_path / "out", vocab, min_genes=0)
    want = {key(0, i): cell for i, cell in enumerate(expected(x.tocsr(), genes, vocab))}
    assert len(want) == 1107
    assert_holds(tmp_path / "out", want)


ORDERS = ["by cell", "by gene", "any"]


def write_mtx(
    folder: Path,
    x: Any,
    *,
    order: str = "by cell",
    version: int = 3,
    field: str = "integer",
    end: str = "\n",
) -> Path:
    """A matrix (cells x genes) as an mtx folder: .gz and three columns, or plain and two."""
    folder.mkdir(parents=True)
    cells, genes = np.nonzero(x)
    if order == "by gene":
        by = np.lexsort((cells, genes))
    else:
        by = np.arange(len(cells))
    if order == "any":
        by = np.random.default_rng(0).permutation(by)
    form = "{:d}" if field == "integer" else "{!r}"
    lines = [f"%%MatrixMarket matrix coordinate {field} general", "%metadata_json: {}"]
    lines.append(f"{x.shape[1]} {x.shape[0]} {len(cells)}")
    for i in by:
        value = form.format(x[cells[i], genes[i]].item())
        lines.append(f"{genes[i] + 1} {cells[i] + 1} {value}")
    more = "\tGene Expression" if version == 3 else ""
    texts = {
        "matrix.mtx": lines,
        "barcodes.tsv": [f"C{i}-1" for i in range(x.shape[0])],
        "features.tsv" if version == 3 else "genes.tsv": [
            f"E{i:03d}\tG{i:03d}{more}" for i in range(x.shape[1])
        ],
    }
    for name, rows in texts.items():
        data = "".join(row + end for row in rows).encode()
        if version == 3:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return folder


def test_any_run_of_spaces_and_tabs_parts_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_mtx, "TEXT_BYTES", 3000)
    x = counts(300, 20, dtype=np.int64)
    folder = write_mtx(tmp_path / "a", x, version=2)
    path = folder / "matrix.mtx"
    head, sizes, entries = path.read_text().split("\n", 2)
    for old, new in ((" ", "\t"), (" ", "  "), ("\n", " \r\n"), ("\n", "\n \t"), ("\n", "\n\n")):
        path.write_text("\n".join((head, sizes, entries.replace(old, new))), newline="")
        with open_source(folder) as source:
            assert (dense(source) == x).all(), (old, new)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("version", [2, 3])
def test_cells_of_a_folder_come_back(tmp_path: Path, order: str, version: int) -> None:
    x = counts(41, 17, dtype=np.int64)
    x[5] = 0
    x[7, 3] = 70_000
    folder = write_mtx(tmp_path / "a", x, order=order, version=version)
    genes = [f"G{i:03d}" for i in range(17)]
    vocab = Vocab.from_genes(genes[2:])
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        manifest = quiet_pack(folder, out, vocab, min_genes=0, workers=workers)
        want = {key(0, i): cell for i, cell in enumerate(expected(x, genes, vocab))}
        assert_holds(out, want)
        first = manifest.sources[0]
        assert (first.name, first.rows, first.matched) == (str(folder), 41, 15)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("text_bytes", [40, 100, 1 << 20])
def test_blocks_of_a_folder(
    tmp_path: Path, order: str, text_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_mtx, "TEXT_BYTES", text_bytes)
    monkeypatch.setattr(sources_matrix, "BLOCK_VALUES", 40)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    x = counts(30, 12) * np.float32(0.37)
    x[:2] = x[-3:] = 0
    folder = write_mtx(tmp_path / "a", x, order=order, field="real", end="\r\n")
    with open_source(folder, scratch=tmp_path / "scratch") as source:
        assert (source.n_rows, source.n_columns) == x.shape
        assert source.n_values == np.count_nonzero(x)
        assert not source.needs_transposing
        source.transpose()
        assert sorted(source.sample(10**6)) == sorted(x[x != 0].astype(float))
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "scratch").rglob("*")}
    for scratch in (tmp_path / "scratch", None):
        with open_source(folder, scratch=scratch) as source:
            for start, stop in ((0, 30), (0, 1), (7, 19), (29, 30), (4, 4)):
                for limits in ({}, {"max_rows": 4}, {"max_values": 15}):
                    assert (dense(source, start, stop, **limits) == x[start:stop]).all()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "scratch").rglob("*")} == made
    assert not list((tmp_path / "tmp").iterdir())


def test_names_of_a_folder(tmp_path: Path) -> None:
    with open_source(write_mtx(tmp_path / "3", counts(4, 3)[:, :3].astype(int))) as source:
        assert source.genes == ["G000", "G001", "G002"]
        assert source.gene_columns == ["gene_ids", "feature_types"]
        assert source.names_in("gene_ids") == ["E000", "E001", "E002"]
    with open_source(write_mtx(tmp_path / "2", counts(4, 3).astype(int), version=2)) as source:
        assert source.gene_columns == ["gene_ids"] and not list(source.obs_columns)


@pytest.mark.parametrize("version", [2, 3])
def test_features_of_one_column_are_ids_and_names(tmp_path: Path, version: int) -> None:
    x = counts(6, 4, dtype=np.int64)
    folder = write_mtx(tmp_path / "a", x, version=version)
    name, data = "genes.tsv", "\ufeffG000\r\nG001\nG002\nG003".encode()
    if version == 3:
        name, data = "features.tsv.gz", gzip.compress(data)
    (folder / name).write_bytes(data)
    with open_source(folder) as source:
        assert source.genes == source.names_in("gene_ids") == ["G000", "G001", "G002", "G003"]
    quiet_pack(folder, tmp_path / "out", vocab_of(4), min_genes=0)
    cells = expected(x, [f"G{i:03d}" for i in range(4)], vocab_of(4))
    assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(cells)})


def test_fields_in_quotes(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "a", counts(6, 3, dtype=np.int64), version=2)
    lines = [f'"E{i}"\t"G{i:03d}"\t"Gene Expression"\n' for i in range(3)]
    (folder / "genes.tsv").write_text("".join(lines))
    with open_source(folder) as source:
        assert source.genes == ["G000", "G001", "G002"] and not source.left_out


def test_a_folder_without_values(tmp_path: Path) -> None:
    x = np.zeros((3, 4), int)
    with open_source(write_mtx(tmp_path / "a", x)) as source:
        assert (dense(source, 0, 3) == x).all() and len(source.sample(10)) == 0


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("matrix.mtx", "integer general", "pattern general"), ("first line", "integer general")),
        (("matrix.mtx", "integer general", "integer symmetric"), ("symmetric",)),
        (("matrix.mtx", "coordinate", "array"), ("array",)),
        (("matrix.mtx", "4 5 20\n", ""), ("4 features", "5 barcodes")),
        (("matrix.mtx", "4 5 20\n", "4 6 20\n"), ("6 cells", "5 barcodes")),
        (("matrix.mtx", "4 5 20\n", "4 5 21\n"), ("20 entries", "21")),
        (("matrix.mtx", "4 5 20\n", "sizes\n"), ("line with its sizes",)),
        (("matrix.mtx", "\n2 1 ", "\n0 1 "), ("outside",)),
        (("matrix.mtx", "\n2 1 ", "\n2 6 "), ("outside",)),
        (("matrix.mtx", "\n2 1 ", "\n1.5 1 "), ("invalid value '1.5'",)),
        (("matrix.mtx", "\n2 1 ", "\n2 x "), ("Row #2", "invalid value 'x'")),
        (("matrix.mtx", "\n2 1 ", "\n2 "), ("Row #2: Expected 3 columns",)),
        (("matrix.mtx", "\n2 1 ", "\n2 1 nan"), ("invalid value 'nan",)),
        (("matrix.mtx", "\n2 1 3", "\n2 1 3.5"), ("invalid value '3.5'",)),
        (("genes.tsv", "E000\tG000\n", "id\tname\nE000\tG000\n"), ("such as a header",)),
        (("genes.tsv", "G001", "G\udce9"), ("not in UTF-8",)),
    ],
)
def test_folders_that_are_refused(
    tmp_path: Path, change: tuple[str, str, str], parts: tuple[str, ...]
) -> None:
    folder = write_mtx(tmp_path / "a", np.full((5, 4), 3), version=2)
    name, old, new = change
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1), "utf-8", "surrogateescape")
    with pytest.raises(SourceError) as refused, open_source(folder) as source:
        source.sample(10)
    assert str(folder) in str(refused.value)
    assert any(part in str(refused.value) for part in parts)


def test_a_folder_that_lacks_or_cuts_a_file(tmp_path: Path) -> None:
    for name in ("barcodes.tsv.gz", "features.tsv.gz"):
        folder = write_mtx(tmp_path / name, np.full((5, 4), 3))
        (folder / name).unlink()
        with pytest.raises(SourceError, match=f"no {name.removesuffix('.gz')}"):
            open_source(folder)
    folder = write_mtx(tmp_path / "cut", counts(500, 20).astype(int))
    path = folder / "matrix.mtx.gz"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(SourceError, match="can't be read"), open_source(folder) as source:
        source.sample(10)
    with pytest.raises(SourceError, match="only AnnData has layers"):
        open_source(folder, raw=True)


@pytest.mark.parametrize("order", ORDERS)
def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_matrix, "BLOCK_VALUES", 5_000)
    monkeypatch.setattr(sources_mtx, "TEXT_BYTES", 5_000)
    peaks = []
    for n in (1600, 4800):  # the fewer fill gzip's own buffers
        x = 1 + np.random.default_rng(0).poisson(1, (n, 50))
        folder = write_mtx(tmp_path / f"{n}", x, order=order)
        tracemalloc.start()
        with open_source(folder) as source:
            total = sum(b.data.sum() for b in source.blocks(max_rows=100, max_values=5_000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == x.sum()
    # A copy of the matrix is 600 bytes a row; names and pointers of a row are about 100.
    assert peaks[1] < peaks[0] + 250 * 3200, peaks


@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_on_s3(tmp_path: Path, s3: Any, version: int) -> None:
    import s3fs

    x = counts(30, 8, dtype=np.int64)
    folder = write_mtx(tmp_path / "a", x, order="any", version=version)
    s3fs.S3FileSystem().put(str(folder), f"{s3.url}/run", recursive=True)
    with open_source(f"{s3.url}/run", scratch=tmp_path / "scratch") as source:
        assert (dense(source, 0, 30) == x).all()
    manifest = quiet_pack(f"{s3.url}/run/", tmp_path / "out", vocab_of(8))
    assert [s.name for s in manifest.sources] == [f"{s3.url}/run"]
    assert manifest.sources[0].values == np.count_nonzero(x)

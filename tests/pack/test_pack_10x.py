"""10x inputs: `.h5` files of Cell Ranger 2 and 3, mtx folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from pack_support import assert_holds, counts, expected, key, quiet_pack, write

from scshards import Vocab
from scshards.base.errors import SourceError
from scshards.pack.sources import open_source
from scshards.pack.vocabulary import build_vocab


def write_10x(path: Path, x: Any, *, version: int = 3, genome: str = "GRCh38") -> Path:
    """A matrix (cells x genes) as Cell Ranger writes it: genes G000 ..., ids E000 ..."""
    matrix = sp.csc_matrix(np.asarray(x, np.int32).T)
    n = matrix.shape[0]
    symbols, ids = ([f"{c}{i:03d}".encode() for i in range(n)] for c in "GE")
    with h5py.File(path, "a") as f:
        group = f.create_group("matrix" if version == 3 else genome)
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(matrix, name), compression="gzip")
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array([f"C{i}-1".encode() for i in range(matrix.shape[1])], "S9")
        if version == 2:
            group["gene_names"], group["genes"] = symbols, ids
        else:
            features = group.create_group("features")
            features["name"], features["id"] = symbols, ids
            features["feature_type"] = [b"Gene Expression"] * (n - 1) + [b"Antibody Capture"]
            features["genome"] = [genome.encode()] * n
            features["_all_tag_keys"] = [b"genome"]
    return path


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
        assert source.names_in("feature_types") == ["Gene Expression"] * 2 + ["Antibody Capture"]
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

    refused(whole, "no layer 'counts'", "without --layer", layer="counts")
    refused(whole, "no raw matrix", raw=True)
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
    refused(path, "can't be read")
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

"""Inputs beside each other: the same cells twice, and genes that are not the same genes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
from pack_support import (
    adata,
    counts,
    quiet_append,
    quiet_pack,
    read_back,
    tree_sums,
    vocab_of,
    write_10x,
)

from scshards import Vocab, verify
from scshards.base.errors import ConfigError, SourceError
from scshards.packing.reshard import ReshardOptions, merge
from scshards.shards.manifest import Manifest
from scshards.sources.vocabulary import build_vocab

N = 40
IDS, SYMBOLS = [f"ENSG{i:011d}" for i in range(N)], [f"G{i:03d}" for i in range(N)]


def written(
    path: Path, names: list[str], *, seed: int = 0, cells: str = "b{}x", **columns: Any
) -> Path:
    made = adata(sp.csr_matrix(counts(20, len(names), seed=seed)), genes=names)
    made.obs_names = [cells.format(i * 7 + seed) for i in range(20)]
    for column, values in columns.items():
        made.var[column] = values
    made.write_h5ad(path)
    return path


def manifest_of(root: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((root / "manifest.json").read_bytes())
    return tree


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """p1 names its genes by id, and by symbol in a column; p2 by symbol."""
    a = written(tmp_path / "p1.h5ad", IDS, feature_name=SYMBOLS)
    return a, written(tmp_path / "p2.h5ad", SYMBOLS, seed=1)


def test_inputs_of_two_kinds_of_names_are_refused(tmp_path: Path, two: tuple[Path, Path]) -> None:
    mixed = Vocab.from_genes([*IDS, *SYMBOLS])
    inputs = [f"{two[0]}::index", two[1]]
    with pytest.raises(SourceError) as refused:
        quiet_pack(inputs, tmp_path / "out", mixed)
    said = str(refused.value)
    assert f"share 0 of 40 genes: {two[0]} names them by Ensembl ids" in said
    assert "FILE::COLUMN" in said and "--allow-mixed" in said
    assert not (tmp_path / "out").exists()
    manifest = quiet_pack(inputs, tmp_path / "out", mixed, allow_mixed=True)
    told = [(s.gene_column, s.ids, s.shared) for s in manifest.sources]
    assert told == [("index", 1.0, 0.0), ("index", 0.0, 0.0)]
    alike = quiet_pack([f"{two[0]}::feature_name", two[1]], tmp_path / "alike", mixed)
    told = [(s.gene_column, s.ids, s.shared) for s in alike.sources]
    assert told == [("feature_name", 0.0, 1.0), ("index", 0.0, 1.0)]
    assert (
        Manifest.from_json((tmp_path / "alike" / "manifest.json").read_bytes()).sources
        == alike.sources
    )
    assert quiet_pack(two[1], tmp_path / "one", mixed).sources[0].shared is None


def test_what_is_added_may_name_its_genes_elsewhere(tmp_path: Path, two: tuple[Path, Path]) -> None:
    vocab = Vocab.from_genes(SYMBOLS)
    root = tmp_path / "out"
    quiet_pack(two[0], root, vocab, gene_column="feature_name")
    added = quiet_append(two[1], root)
    assert [s.gene_column for s in added.sources] == ["feature_name", "index"]
    assert verify(root, progress=False).ok
    quiet_pack([f"{two[0]}::feature_name", two[1]], tmp_path / "once", vocab)
    assert {k: (c.genes, c.values) for k, c in read_back(root).items()} == {
        k: (c.genes, c.values) for k, c in read_back(tmp_path / "once").items()
    }


def test_what_is_added_is_named_as_the_set(tmp_path: Path, two: tuple[Path, Path]) -> None:
    root = tmp_path / "out"
    quiet_pack(two[1], root, Vocab.from_genes([*IDS, *SYMBOLS]))
    with pytest.raises(SourceError, match="is in the set"):
        quiet_append(f"{two[0]}::index", root)
    quiet_append(f"{two[0]}::index", root, allow_mixed=True)


def test_an_input_by_another_name_is_known(
    tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vocab, root = Vocab.from_genes(SYMBOLS), tmp_path / "out"
    quiet_pack("p2.h5ad", root, vocab)
    identity = manifest_of(root)["options"]["record"]["sources"][0]["identity"]
    assert identity["at"] == str(two[1]) and identity["size"] == two[1].stat().st_size
    assert identity["mtime_ns"] == two[1].stat().st_mtime_ns and len(identity["cells"]) == 32
    (tmp_path / "link.h5ad").symlink_to("p2.h5ad")
    (tmp_path / "l.txt").write_text("p2.h5ad\tanother")
    before = tree_sums(root)
    for name in ("./p2.h5ad", str(two[1]), "link.h5ad", "l.txt", f"file://{two[1]}"):
        with pytest.raises(SourceError, match=r"p2\.h5ad, in the set, is the same file"):
            quiet_append(name, root)
    # A copy has another address, and the same cells.
    shutil.copy(two[1], tmp_path / "copy.h5ad")
    with pytest.raises(SourceError, match=r"cells are there already: p2.h5ad, in the set"):
        quiet_append("copy.h5ad", root)
    assert tree_sums(root) == before
    added = quiet_append(["copy.h5ad", "./p2.h5ad"], root, allow_repeats=True)
    assert sum(s.kept for s in added.sources) == 3 * added.sources[0].kept
    with pytest.raises(ConfigError, match="of this name"):
        quiet_append("p2.h5ad", root, allow_repeats=True)


def test_one_matrix_in_two_layouts(tmp_path: Path) -> None:
    x = counts(30, 12)
    h5 = write_10x(tmp_path / "m.h5", x)
    mtx = tmp_path / "mtx"
    mtx.mkdir()
    scipy.io.mmwrite(mtx / "matrix.mtx", sp.csc_matrix(np.asarray(x, np.int32).T))
    (mtx / "barcodes.tsv").write_text("".join(f"C{i}-1\n" for i in range(30)))
    (mtx / "features.tsv").write_text(
        "".join(f"E{i:03d}\tG{i:03d}\tGene Expression\n" for i in range(12))
    )
    with pytest.raises(SourceError, match="its cells are there already"):
        quiet_pack([h5, mtx], tmp_path / "out", vocab_of(12))
    manifest = quiet_pack([h5, mtx], tmp_path / "out", vocab_of(12), allow_repeats=True)
    assert manifest.sources[0].kept == manifest.sources[1].kept


@pytest.mark.parametrize(("cells", "tells"), [("cell{}", False), ("{}", False), ("{}-1", True)])
def test_numbers_in_a_row_are_no_names(tmp_path: Path, cells: str, tells: bool) -> None:
    for name in "ab":
        made = adata(sp.csr_matrix(counts(20, 6)))
        made.obs_names = [cells.format(i) for i in range(20)]
        made.write_h5ad(tmp_path / f"{name}.h5ad")
    inputs = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    if tells:
        with pytest.raises(SourceError, match="there already"):
            quiet_pack(inputs, tmp_path / "out", vocab_of(6))
    else:
        assert "cells" not in quiet_pack(inputs, tmp_path / "out", vocab_of(6)).sources[0].identity


def test_a_set_that_was_packed_earlier_says_less(tmp_path: Path, two: tuple[Path, Path]) -> None:
    root = tmp_path / "out"
    manifest = quiet_pack(two[1], root, build_vocab(two[1]))
    tree = manifest_of(root)
    assert {"identity", "gene_column"} <= tree["options"]["record"]["sources"][0].keys()
    del tree["options"]["record"]
    del tree["sha256"]
    old = Manifest.from_json(json.dumps(tree))
    assert old.sources[0].gene_column is None and not old.sources[0].identity
    (root / "manifest.json").write_bytes(old.to_json())
    with pytest.raises(ConfigError, match="of this name"):
        quiet_append(two[1], root)
    c = written(tmp_path / "c.h5ad", SYMBOLS, seed=5)
    assert [bool(s.identity) for s in quiet_append(c, root).sources] == [False, True]
    assert manifest.sources[0].identity


def test_one_input_in_two_sets_that_are_merged(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """By its address or its cells, whatever it is called there."""
    vocab = Vocab.from_genes(SYMBOLS)
    shutil.copy(two[1], tmp_path / "copy.h5ad")
    (tmp_path / "l.txt").write_text("p2.h5ad\tanother")
    for i, inputs in enumerate(
        (two[1], tmp_path / "l.txt", tmp_path / "copy.h5ad", f"{two[0]}::feature_name")
    ):
        quiet_pack(inputs, tmp_path / str(i), vocab)
    for other in (1, 2):
        with pytest.raises(ConfigError, match=f"an input of it is in {tmp_path}/0 too"):
            merge([tmp_path / "0", tmp_path / str(other)], tmp_path / "no", ReshardOptions(), False)
    merged = merge(
        [tmp_path / "0", tmp_path / "1"], tmp_path / "twice", ReshardOptions(same_names=True), False
    )
    assert [s.name for s in merged.sources] == [str(two[1]), "another"]
    merge([tmp_path / "0", tmp_path / "3"], tmp_path / "both", ReshardOptions(), False)

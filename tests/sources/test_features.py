"""Features that are not genes: antibodies and peaks are left out by their type, and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from click.testing import CliRunner
from pack_support import adata, assert_holds, counts, dense, expected, key, quiet_pack

from scshards import ShardSet, Vocab
from scshards.base.errors import ConfigError, SourceError
from scshards.cli import main
from scshards.sources.open import open_source
from scshards.sources.vocabulary import TableOptions, build_vocab, check_vocab

GENE, ADT, PEAK = "Gene Expression", "Antibody Capture", "Peaks"
NAMES = ["CD4", "CD8A", "CD4", "chr1:1-99", "ACTB"]
TYPES = [GENE, GENE, ADT, PEAK, GENE]
GENES = [0, 1, 4]
WAYS = ["h5", "mtx", "csr", "csc", "dense", "zarr", "layer", "raw"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Variable names are not unique", "ignore:Writing zarr v2", "ignore:zarr v3 autosharding",
    "ignore:Consolidated metadata",
)  # fmt: skip


def matrix() -> np.ndarray:
    x = counts(40, len(NAMES), seed=3, dtype=np.int32)
    x[:, 2] += 500  # antibodies are seen in every cell, and often
    return x


def write_input(folder: Path, way: str, x: np.ndarray, types: Any = TYPES) -> tuple[Path, Any]:
    """A file with the features NAMES, and the options that choose its matrix."""
    folder.mkdir(parents=True, exist_ok=True)
    if way == "h5":
        m = sp.csc_matrix(x.T)
        with h5py.File(folder / "a.h5", "w") as f:
            group = f.create_group("matrix")
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(m, name)
            group["shape"] = np.array(m.shape, np.int32)
            group["barcodes"] = np.array([f"C{i}-1" for i in range(len(x))], "S")
            group["features/name"] = np.array(NAMES, "S")
            group["features/id"] = np.array([f"E{i}" for i in range(len(NAMES))], "S")
            if types is not None:
                group["features/feature_type"] = np.array(types, "S")
        return folder / "a.h5", {}
    if way == "mtx":
        entries = [f"{j + 1} {i + 1} {x[i, j]}" for i, j in np.argwhere(x)]
        banner = ["%%MatrixMarket matrix coordinate integer general"]
        sizes = [f"{x.shape[1]} {len(x)} {len(entries)}"]
        (folder / "matrix.mtx").write_text("\n".join(banner + sizes + entries) + "\n")
        (folder / "barcodes.tsv").write_text("".join(f"C{i}-1\n" for i in range(len(x))))
        last = [""] * len(NAMES) if types is None else [f"\t{t}" for t in types]
        lines = [f"E{i}\t{n}{t}\n" for i, (n, t) in enumerate(zip(NAMES, last, strict=True))]
        (folder / "features.tsv").write_text("".join(lines))
        return folder, {}
    made = adata(x if way == "dense" else sp.csc_matrix(x) if way == "csc" else sp.csr_matrix(x))
    made.var = pd.DataFrame({} if types is None else {"feature_types": types}, index=NAMES)
    chosen: dict[str, Any] = {}
    if way == "layer":
        made.layers["counts"], made.X, chosen = made.X, made.X * 0.5, {"layer": "counts"}
    if way == "raw":
        made.raw, chosen = made.copy(), {"raw": True}
        made = made[:, :2].copy()
    if way == "zarr":
        made.write_zarr(folder / "a.zarr")
        return folder / "a.zarr", chosen
    made.write_h5ad(folder / "a.h5ad")
    return folder / "a.h5ad", chosen


@pytest.mark.parametrize("way", WAYS)
def test_genes_alone_are_packed(tmp_path: Path, way: str) -> None:
    x = matrix()
    path, chosen = write_input(tmp_path / "in", way, x)
    vocab = Vocab.from_genes(["CD4", "CD8A", "ACTB"])
    manifest = quiet_pack(path, tmp_path / "out", vocab, min_genes=0, **chosen)
    cells = expected(x[:, GENES], [NAMES[i] for i in GENES], vocab)
    assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(cells)})
    one = manifest.sources[0]
    assert (one.columns, one.matched, one.merged, one.unmatched_values) == (3, 3, 0, 0)
    assert one.left_out == {ADT: 1, PEAK: 1}
    assert ShardSet(tmp_path / "out").manifest.sources[0].left_out == one.left_out


@pytest.mark.parametrize("way", WAYS)
def test_other_features_are_taken_when_asked_for(tmp_path: Path, way: str) -> None:
    x = matrix()
    path, chosen = write_input(tmp_path / "in", way, x)
    with open_source(path, feature_types=[ADT, PEAK], **chosen) as source:
        assert list(source.genes) == ["CD4", "chr1:1-99"] and source.left_out == {GENE: 3}
        assert (dense(source) == x[:, 2:4]).all()
        assert (dense(source, 5, 17, max_values=7) == x[5:17, 2:4]).all()
        assert set(source.sample(10**6).tolist()) - {0} == set(x[:, 2:4].ravel().tolist()) - {0}
    vocab = Vocab.from_genes(["CD4", "CD8A", "ACTB", "chr1:1-99"])
    options = {"feature_types": [PEAK, GENE, ADT], "min_genes": 0, **chosen}
    manifest = quiet_pack(path, tmp_path / "out", vocab, **options)
    cells = expected(x, NAMES, vocab)
    assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(cells)})
    assert manifest.sources[0].left_out == {} and manifest.sources[0].merged == 1
    assert manifest.options["feature_types"] == [PEAK, GENE, ADT]


@pytest.mark.parametrize("way", ["h5", "mtx", "csr", "zarr"])
def test_features_of_which_nothing_is_said_are_genes(tmp_path: Path, way: str) -> None:
    x = matrix()
    for i, types in enumerate((None, [GENE] * 5, ["", GENE, "", GENE, ""])):
        path, _ = write_input(tmp_path / f"{i}", way, x, types)
        with open_source(path) as source:
            assert list(source.genes) == NAMES and source.left_out == {}
            assert (dense(source) == x).all()
        with pytest.raises(SourceError, match="no feature is of the type 'Peaks'"):
            open_source(path, feature_types=[PEAK])


@pytest.mark.parametrize("way", WAYS)
def test_a_file_without_gene_expression_is_refused(tmp_path: Path, way: str) -> None:
    path, chosen = write_input(tmp_path / "in", way, matrix(), [ADT, ADT, PEAK, PEAK, PEAK])
    with pytest.raises(SourceError) as refused:
        quiet_pack(path, tmp_path / "out", Vocab.from_genes(["CD4"]), **chosen)
    for part in (
        str(path),
        "'Gene Expression'",
        "3 'Peaks', 2 'Antibody",
        "--feature-type 'Peaks'",
    ):
        assert part in str(refused.value)


def test_missing_types_and_columns_of_raw(tmp_path: Path) -> None:
    made = adata(sp.csr_matrix(counts(6, 4)))
    made.var["feature_types"] = pd.Categorical([GENE, None, ADT, None])
    made.raw = made.copy()
    made.var = made.var.drop(columns="feature_types")
    made.write_h5ad(tmp_path / "a.h5ad")
    with open_source(tmp_path / "a.h5ad") as source:
        assert source.n_columns == 4
    with open_source(tmp_path / "a.h5ad", raw=True) as source:
        assert list(source.genes) == ["G000", "G001", "G003"] and source.left_out == {ADT: 1}


@pytest.mark.parametrize("way", ["csr", "csc"])
def test_values_of_other_features_decide_over_nothing(tmp_path: Path, way: str) -> None:
    """Antibodies that were normalised lie beside counts of genes; and the other way round."""
    x = matrix().astype(np.float64)
    x[:, 2:4] = -0.37
    path, _ = write_input(tmp_path / "in", way, x)
    vocab = build_vocab(path, min_cells=1)
    manifest = quiet_pack(path, tmp_path / "out", vocab, min_genes=0, values="counts")
    assert manifest.value_kind == "counts" and "chr1:1-99" not in vocab.tokens


def test_vocabularies_are_of_genes(tmp_path: Path) -> None:
    x = matrix()
    paths = [write_input(tmp_path / way, way, x)[0] for way in ("h5", "mtx", "csr")]
    assert build_vocab(paths).tokens[:3] == ("ACTB", "CD4", "CD8A")
    taken = build_vocab(paths, tables=TableOptions(feature_types=(PEAK,)))
    assert taken.tokens[0] == "chr1:1-99" and len(taken) == 4
    for report in check_vocab(build_vocab(paths), paths):
        assert (report.columns, report.matched) == (3, 3)
        assert report.left_out == {ADT: 1, PEAK: 1}


def test_the_command_line_tells_what_is_left_out(tmp_path: Path) -> None:
    paths = [str(write_input(tmp_path / way, way, matrix())[0]) for way in ("h5", "mtx")]
    vocab, out = str(tmp_path / "v.json"), str(tmp_path / "out")
    said = "2 Antibody Capture (2 inputs), 2 Peaks (2 inputs)"
    for command in (
        ["vocab", "build", *paths, "-o", vocab],
        ["vocab", "check", vocab, *paths],
        ["pack", *paths, "-o", out, "--vocab", vocab, "--allow-repeats"],
        ["info", out],
    ):
        done = CliRunner().invoke(main, command, catch_exceptions=False)
        assert done.exit_code == 0 and said in done.output, done.output
    more = ["--append", "--feature-type", ADT, "--feature-type", GENE]
    third = str(write_input(tmp_path / "third", "csr", matrix())[0])
    done = CliRunner().invoke(main, ["pack", third, "-o", out, *more])
    assert done.exit_code == 0, done.output
    assert [s.columns for s in ShardSet(out).manifest.sources] == [3, 3, 4]


def test_what_are_no_types() -> None:
    for wrong in ("Peaks", [], [""], [1]):
        with pytest.raises(ConfigError, match="are not types"):
            TableOptions(feature_types=wrong)  # type: ignore[arg-type]


def test_samples_come_from_all_over(tmp_path: Path) -> None:
    x = np.repeat(np.arange(1, 1001)[:, None], 5, axis=1).astype(np.float32)
    path, _ = write_input(tmp_path / "in", "csr", x)
    with open_source(path) as source:
        some = source.sample(320)
        assert 160 <= len(some) <= 640 and some.min() < 20 and some.max() > 980

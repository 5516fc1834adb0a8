"""Variable genes: the numbers that scanpy itself computes, and its formula written once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from click.testing import CliRunner
from loaders import loader_of

import scshards
from scshards.base.errors import ConfigError
from scshards.cells.vocab import Vocab
from scshards.cli import main
from scshards.streaming.read.options import ReadOptions

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "seurat_v3.json").read_text())
GENES = [f"g{i}" for i in range(120)]


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    out = np.zeros((len(GOLDEN["cells"]), len(GENES)))
    for row, cell in zip(out, GOLDEN["cells"], strict=True):
        for gene, count in cell:
            row[gene] = count
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, counts: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("variable")
    cells = ad.AnnData(sp.csr_matrix(counts))
    cells.var_names = GENES
    cells.obs["batch"] = np.array(list("abc"))[GOLDEN["batch"]]
    cells.obs["none"] = [None if i % 3 else "x" for i in range(len(counts))]
    cells.write_h5ad(folder / "cells.h5ad")
    (folder / "vocab.json").write_bytes(Vocab(GENES).with_specials().to_json())
    scshards.pack(
        [folder / "cells.h5ad"],
        folder / "set",
        folder / "vocab.json",
        scshards.PackOptions(obs=("batch", "none"), cells_per_shard=40),
    )
    return folder / "set"


def of_genes(found: scshards.VariableGenes, values: Any) -> list[float]:
    """Values of the genes in the order of GENES."""
    by_name = dict(zip(found.genes, np.asarray(values).tolist(), strict=True))
    return [by_name[gene] for gene in GENES]


@pytest.mark.parametrize("by", [None, "batch"])
@pytest.mark.parametrize("threads", [1, 2])
def test_scores_are_those_of_scanpy(root: Path, by: str | None, threads: int) -> None:
    expected = GOLDEN["by" if by else "all"]
    top = GOLDEN["top"]
    found = scshards.variable_genes(root, top, by=by, read=ReadOptions(threads=threads))
    assert found.cells == 180
    np.testing.assert_allclose(of_genes(found, found.scores), expected["scores"], rtol=1e-9)
    np.testing.assert_allclose(of_genes(found, found.means), expected["means"], rtol=1e-12)
    np.testing.assert_allclose(of_genes(found, found.variances), expected["variances"], rtol=1e-9)
    assert sorted(found.genes[:top]) == expected["top"]
    ranks = {g: r for g, r in zip(GENES, expected["ranks"], strict=True) if r is not None}
    assert [ranks[g] for g in found.genes[: len(ranks)]] == sorted(ranks.values())
    if by:
        assert of_genes(found, found.batches) == expected["batches"]


def test_scores_are_those_of_the_formula(root: Path, counts: np.ndarray) -> None:
    """Stuart et al. 2019, on a dense matrix: standardize by the curve, clip at sqrt(n), take variances."""
    from skmisc.loess import loess

    found = scshards.variable_genes(root, 10)
    n = len(counts)
    mean, variance = counts.mean(axis=0), counts.var(axis=0, ddof=1)
    model = loess(np.log10(mean), np.log10(variance), span=0.3, degree=2)
    model.fit()
    deviation = np.sqrt(10**model.outputs.fitted_values)
    clipped = np.minimum((counts - mean) / deviation, np.sqrt(n))
    expected = np.square(clipped).sum(axis=0) / (n - 1)
    np.testing.assert_allclose(of_genes(found, found.scores), expected, rtol=1e-9)


def test_the_command_writes_a_list_that_a_loader_takes(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "genes.txt"
    command = ["genes", str(root), "--top", "30", "--batch-by", "batch", "-o", str(file), "--json"]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    names = file.read_text().split()
    assert sorted(names) == GOLDEN["by"]["top"]
    assert [row["gene"] for row in said["genes"]] == names
    with loader_of(root, objective="counts", genes=str(file), batch_size=20) as loader:
        assert loader.genes == tuple(names)
        assert next(iter(loader)).dense().shape == (20, 30)
    plain = CliRunner().invoke(main, command[:-1], catch_exceptions=False)
    assert "30 genes of 120, by 180 cells" in plain.stdout


def test_what_can_not_be_had_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"no label of categories 'batsch'.*\n.*batch"):
        scshards.variable_genes(root, 10, by="batsch")
    with pytest.raises(ConfigError, match="at least 1"):
        scshards.variable_genes(root, 0)
    one = scshards.ChoiceOptions(take=1)
    with pytest.raises(ConfigError, match="has one cell"):
        scshards.variable_genes(root, 10, choose=one)


def test_cells_without_a_category_are_left_out(root: Path, counts: np.ndarray) -> None:
    found = scshards.variable_genes(root, 10, by="none")
    assert found.cells == 60
    np.testing.assert_allclose(of_genes(found, found.means), counts[::3].mean(axis=0))

"""Embedding a file: the model's own output, whatever the batch; the input copied; faults refused."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.sparse import csc_matrix, csr_matrix

from scshards.base.errors import ConfigError, OutputExistsError, SourceError
from scshards.cells.batch import Batch
from scshards.cells.values import bin_values
from scshards.cells.vocab import Vocab
from scshards.cli.embed import command
from scshards.model.config import ModelConfig
from scshards.model.scgpt import load_model, write_folder
from scshards.model.transformer import CellModel
from scshards.train.embed import EmbedOptions, embed

GENES = [f"G{i}" for i in range(60)]
VOCAB = Vocab.from_genes(GENES[5:] + ["OTHER"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        n_tokens=len(VOCAB),
        pad_id=VOCAB.pad_id,
        d_model=16,
        n_heads=2,
        d_hid=24,
        n_layers=2,
        max_length=40,
    )
    write_folder(str(folder), CellModel(config, seed=1), VOCAB.to_dict())
    return str(folder)


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.poisson(0.6, (70, 60)).astype(np.float32)
    x[7, 5:] = 0  # a cell without a gene of the vocabulary
    return x


def write(path: Path, x: object, **parts: object) -> Path:
    cells = anndata.AnnData(x, **parts)
    cells.var_names = GENES
    cells.obs["donor"] = [f"d{i % 3}" for i in range(cells.n_obs)]
    cells.write_h5ad(path)
    return path


def plain(checkpoint: str, x: np.ndarray) -> np.ndarray:
    """One cell at a time, written out: only for cells no longer than max_length."""
    model = load_model(checkpoint).model.eval()
    out = []
    for row in x:
        tokens = sorted((VOCAB[g], v) for g, v in zip(GENES, row, strict=True) if v and g in VOCAB)
        genes = [VOCAB.cls_id] + [t for t, _ in tokens]
        values = [-2.0] + bin_values(np.array([v for _, v in tokens]), 51).tolist()
        with torch.no_grad():
            values_BL = torch.tensor([values])
            nowhere_BL = torch.zeros(1, len(genes), dtype=torch.bool)
            v = model(
                Batch(
                    genes=torch.tensor([genes]),
                    values=values_BL,
                    targets=values_BL,
                    is_masked=nowhere_BL,
                    is_pad=nowhere_BL,
                    keys=torch.zeros(1, dtype=torch.int64),
                    labels={},
                    weight=torch.ones(1),
                )
            )
        out.append((v.cell_embeddings / v.cell_embeddings.norm())[0].numpy())
    return np.array(out)


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix, np.asarray])
def test_embeddings_are_the_models_own(
    tmp_path: Path, checkpoint: str, counts: np.ndarray, form: type
) -> None:
    source = write(tmp_path / "in.h5ad", form(counts))
    report = embed(checkpoint, str(source), tmp_path / "out.h5ad", shown=False)
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    vectors = result.obsm["X_scshards"]
    assert vectors.dtype == np.float32 and vectors.shape == (70, 16)
    assert np.abs(vectors - plain(checkpoint, counts)).max() < 1e-5
    assert (report.cells, report.matched, report.columns, report.empty_cells) == (70, 55, 60, 1)
    # Everything else of the file is as it was.
    x = result.X.toarray() if hasattr(result.X, "toarray") else result.X
    assert np.array_equal(x, counts) and result.obs["donor"].tolist() == [
        f"d{i % 3}" for i in range(70)
    ]


def test_batches_change_nothing_and_long_cells_are_sampled_by_seed(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))

    def vectors(name: str, **options: object) -> np.ndarray:
        embed(
            checkpoint, source, tmp_path / name, EmbedOptions(max_length=10, **options), shown=False
        )
        return anndata.read_h5ad(tmp_path / name).obsm["X_scshards"]

    one = vectors("a.h5ad", batch_size=7)
    assert np.abs(one - vectors("b.h5ad", batch_size=64)).max() < 1e-5
    assert np.abs(one - vectors("c.h5ad", batch_size=64, seed=1)).max() > 1e-3


def test_fractions_are_binned_like_counts_of_the_same_order(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = write(
        tmp_path / "in.h5ad", csr_matrix(np.log1p(counts)), layers={"counts": csr_matrix(counts)}
    )
    embed(checkpoint, str(source), tmp_path / "a.h5ad", shown=False)
    embed(checkpoint, str(source), tmp_path / "b.h5ad", EmbedOptions(layer="counts"), shown=False)
    a, b = (anndata.read_h5ad(tmp_path / f"{n}.h5ad").obsm["X_scshards"] for n in "ab")
    assert np.abs(a - b).max() < 1e-5


def test_what_cannot_be_is_refused_and_leaves_nothing(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))
    (tmp_path / "there.h5ad").write_bytes(b"")
    with pytest.raises(OutputExistsError):
        embed(checkpoint, source, tmp_path / "there.h5ad", shown=False)
    with pytest.raises(SourceError, match="in the model's vocabulary"):
        embed(checkpoint, source, tmp_path / "o.h5ad", EmbedOptions(min_match=0.95), shown=False)
    with pytest.raises(SourceError, match="layer"):
        embed(checkpoint, source, tmp_path / "o.h5ad", EmbedOptions(layer="nope"), shown=False)
    with pytest.raises(ConfigError):
        EmbedOptions(layer="a", raw=True)
    mtx = tmp_path / "mtx"
    mtx.mkdir()
    (mtx / "matrix.mtx").write_text(
        "%%MatrixMarket matrix coordinate integer general\n2 1 1\n1 1 3\n"
    )
    (mtx / "barcodes.tsv").write_text("A\n")
    (mtx / "genes.tsv").write_text("E1\tG7\nE2\tG8\n")
    with pytest.raises(SourceError, match="none"):
        embed(checkpoint, str(mtx), tmp_path / "o.h5ad", shown=False)
    negative = str(write(tmp_path / "negative.h5ad", csr_matrix(counts - 1)))
    with pytest.raises(SourceError, match="negative"):
        embed(checkpoint, negative, tmp_path / "o.h5ad", shown=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in.h5ad",
        "mtx",
        "negative.h5ad",
        "there.h5ad",
    ]


def test_the_command(tmp_path: Path, checkpoint: str, counts: np.ndarray) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))
    out = tmp_path / "deep" / "out.h5ad"
    result = CliRunner().invoke(command, [checkpoint, source, "-o", str(out), "--key", "X_mine"])
    assert (
        result.exit_code == 0
        and "70 cells as 16 numbers" in result.output
        and "1 cells have no gene" in result.output
    )
    with h5py.File(out) as f:
        assert f["obsm/X_mine"].shape == (70, 16)

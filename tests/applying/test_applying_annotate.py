"""Annotating cells: the class head's own word by the names of classes.json; what lacks is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from plain_bins import bin_values
from scipy.sparse import csr_matrix

from scshards.applying.annotate import AnnotateOptions, annotate
from scshards.base.errors import CheckpointError, ConfigError, SourceError
from scshards.cells.batch import Batch
from scshards.cells.vocab import Vocab
from scshards.cli.annotate import command
from scshards.model.classes import CLASSES, LabelNames, read_names, write_names
from scshards.model.config import ModelConfig
from scshards.model.scgpt import load_model, write_folder
from scshards.model.transformer import CellModel
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack

GENES = [f"G{i}" for i in range(30)]
VOCAB = Vocab.from_genes(GENES)
NAMES = ("B cell", "T cell", "other/cell")


def write_model(folder: Path, **parts: object) -> CellModel:
    config = ModelConfig(
        n_tokens=len(VOCAB), pad_id=VOCAB.pad_id, d_model=16, n_heads=2, d_hid=24, n_layers=1,
        max_length=40, **parts,
    )  # fmt: skip
    model = CellModel(config, seed=1).eval()
    write_folder(str(folder), model, VOCAB.to_dict())
    return model


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    made = anndata.AnnData(csr_matrix(rng.poisson(0.8, (40, 30)).astype(np.float32)))
    made.var_names = GENES
    made.obs["kind"] = [f"k{i % 2}" for i in range(40)]
    made.obs["predicted_cell_type"] = "by hand"
    made.write_h5ad(path := tmp_path_factory.mktemp("cells") / "in.h5ad")
    return path


def plain(checkpoint: Path, path: Path) -> np.ndarray:
    """Class probabilities, cell by cell, through `forward`; the softmax written out."""
    model = load_model(str(checkpoint)).model
    out = []
    for row in anndata.read_h5ad(path).X.toarray():
        order = sorted((VOCAB[g], v) for g, v in zip(GENES, row, strict=True) if v)
        genes = [VOCAB.cls_id, *(t for t, _ in order)]
        values = [-2.0, *bin_values(np.array([v for _, v in order]), 51).tolist()]
        nowhere = torch.zeros(1, len(genes), dtype=torch.bool)
        batch = Batch(
            genes=torch.tensor([genes]), values=torch.tensor([values]), targets=torch.tensor([values]),
            is_masked=nowhere, is_pad=nowhere, key=torch.zeros(1), labels={}, weight=torch.ones(1),
        )  # fmt: skip
        with torch.no_grad():
            logits = model(batch).class_logits[0].double().numpy()
        out.append(np.exp(logits) / np.exp(logits).sum())
    return np.array(out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, cells: Path) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = write_model(folder, n_classes=3)
    write_names(folder, CLASSES, "cell_type", NAMES)
    # A fresh head says nearly the same of every cell: what differs is made larger.
    head = model.cls_decoder.out_layer
    with torch.no_grad():
        mean = torch.tensor(np.log(plain(folder, cells)).mean(axis=0))
        head.bias.copy_(30 * (head.bias - mean))
        head.weight.mul_(30)
    write_folder(str(folder), model, VOCAB.to_dict())
    return folder


def test_annotations_are_the_class_heads_own(tmp_path: Path, checkpoint: Path, cells: Path) -> None:
    expected = plain(checkpoint, cells)
    assert len(set(expected.argmax(1))) > 1, "one class for all would tell nothing"
    out = tmp_path / "out.h5ad"
    result = CliRunner().invoke(
        command, [str(checkpoint), str(cells), "-o", str(out), "--probabilities"]
    )
    assert result.exit_code == 0, result.output
    assert "the input's own obs['predicted_cell_type'] were replaced there" in result.output
    made = anndata.read_h5ad(out)
    assert made.obs.columns.tolist() == [
        "kind",
        "predicted_cell_type",
        "predicted_cell_type_probability",
    ]
    assert made.obs["predicted_cell_type"].cat.categories.tolist() == list(NAMES)
    assert made.obs["predicted_cell_type"].tolist() == [NAMES[i] for i in expected.argmax(1)]
    assert made.obs["predicted_cell_type_probability"].dtype == np.float32
    assert np.abs(made.obs["predicted_cell_type_probability"] - expected.max(1)).max() < 1e-5
    assert np.abs(made.obsm["predicted_cell_type_probabilities"] - expected).max() < 1e-5
    assert made.obsm["X_scshards"].shape == (40, 16)
    assert made.obs["kind"].tolist() == [f"k{i % 2}" for i in range(40)]

    pack(str(cells), str(tmp_path / "shards"), VOCAB, PackOptions(workers=1), progress=False)
    sure = float(np.median(expected.max(1)))
    options = AnnotateOptions(column="class", batch_size=3, confidence=sure)
    said = annotate(
        str(checkpoint), str(tmp_path / "shards"), tmp_path / "s.h5ad", options, shown=False
    )
    counts = Counter(NAMES[i] for i in expected.argmax(1))
    assert said.classes == counts and said.n_below == (expected.max(1) < sure).sum() > 0
    shares = [line.split() for line in said.text()[0].text().splitlines()[2:]]
    assert [[n, c] for *n, c, _ in shares] == [[n.split(), str(c)] for n, c in counts.most_common()]
    assert "--confidence" not in result.output
    assert f"{(expected.max(1) < 0.5).sum()} of 40 cells" in result.output
    packed = anndata.read_h5ad(tmp_path / "s.h5ad")
    assert set(packed.obsm) == {"X_scshards"}
    assert (
        packed.obs["class"].tolist()
        == made.obs["predicted_cell_type"].iloc[packed.obs["row"]].tolist()
    )


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, cells: Path) -> Path:
    """The cells with true classes: three of four right, some unknown to the model, some missing."""
    made = anndata.read_h5ad(cells)
    right = [NAMES[i] for i in plain(checkpoint, cells).argmax(1)]
    truth = [NAMES[(NAMES.index(n) + (i % 4 == 0)) % 3] for i, n in enumerate(right)]
    truth[3:8] = ["a stranger"] * 5
    truth[8:11] = ["odd"] * 3
    truth[11:13] = [None] * 2
    made.obs["truth"] = truth
    made.obs["number"] = np.arange(40) % 3
    made.write_h5ad(path := tmp_path_factory.mktemp("labelled") / "in.h5ad")
    return path


def test_true_classes_are_compared_with_predicted_ones(
    tmp_path: Path, checkpoint: Path, labelled: Path
) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    out = tmp_path / "out.h5ad"
    asked = [str(checkpoint), str(labelled), "--truth", "truth"]
    result = CliRunner().invoke(command, [*asked, "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    obs = anndata.read_h5ad(out).obs
    known = obs["truth"].isin(NAMES)
    truth, predicted = (
        obs["truth"][known].astype(str),
        obs["predicted_cell_type"][known].astype(str),
    )
    said = json.loads(result.stdout)["truth"]
    assert (said["column"], said["n_cells"]) == ("truth", 30)
    assert said["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert 0.5 < said["accuracy"] < 0.9
    occur = sorted({*truth, *predicted}, key=NAMES.index)
    assert said["macro_f1"] == pytest.approx(
        f1_score(truth, predicted, labels=occur, average="macro", zero_division=0)
    )
    assert said["confusion"] == confusion_matrix(truth, predicted, labels=NAMES).tolist()
    assert (said["others"], said["n_without"]) == ({"a stranger": 5, "odd": 3}, 2)

    shown = CliRunner().invoke(command, [*asked, "-o", str(tmp_path / "b.h5ad")])
    share = (
        f"the class is right for {100 * said['accuracy']:.1f}% of 30 cells whose class in 'truth'"
    )
    assert share in shown.output and "most often taken for" in shown.output
    assert "does not know have 8 cells: a stranger (5), odd (3)" in shown.output
    assert "2 cells without a class there are not counted" in shown.output

    # The same of a shard set, whose cells come in another order, and of two inputs together.
    options = PackOptions(obs=("truth", "number"), valid_fraction=0.3, workers=1)
    pack(str(labelled), str(tmp_path / "shards"), VOCAB, options, progress=False)
    both = annotate(
        str(checkpoint), [str(tmp_path / "shards"), str(labelled)], tmp_path / "both",
        AnnotateOptions(truth="truth"), shown=False,
    ).truth  # fmt: skip
    assert both is not None and (both.others, both.n_without) == ({"a stranger": 10, "odd": 6}, 4)
    assert both.confusion.counts.tolist() == [[2 * n for n in row] for row in said["confusion"]]
    found = annotate(
        str(checkpoint), str(tmp_path / "shards"), tmp_path / "number.h5ad",
        AnnotateOptions(truth="number"), shown=False,
    ).truth  # fmt: skip
    assert found is not None and found.others == {"0": 14, "1": 13, "2": 13}
    assert found.text() == [
        "the model knows none of the classes in 'number'\n"
        "classes that it does not know have 40 cells: 0 (14), 1 (13), 2 (13)"
    ]


def test_without_a_column_of_true_classes_nothing_is_computed(
    tmp_path: Path, checkpoint: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(str(labelled), str(tmp_path / "shards"), VOCAB, PackOptions(obs=("truth",), workers=1),
         progress=False)  # fmt: skip
    monkeypatch.setattr(CellModel, "embed", None)  # would be called
    for cells in (labelled, tmp_path / "shards"):
        with pytest.raises(SourceError, match="no column 'trouth'") as e:
            annotate(str(checkpoint), str(cells), tmp_path / "o", AnnotateOptions(truth="trouth"),
                     shown=False)  # fmt: skip
        assert "did you mean 'truth'" in str(e.value) and not (tmp_path / "o").exists()


def test_a_checkpoint_that_lacks_classes_is_refused(tmp_path: Path, cells: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            annotate(str(folder), str(cells), tmp_path / "o.h5ad", shown=False)
        assert not (tmp_path / "o.h5ad").exists()

    (headless := tmp_path / "headless").mkdir()
    write_model(headless)
    refused(headless, "no class head")
    (folder := tmp_path / "model").mkdir()
    write_model(folder, n_classes=3)
    refused(folder, r"lacks classes\.json")
    write_names(folder, CLASSES, "cell_type", NAMES[:2])
    refused(folder, "names 2 classes, and the model tells 3 apart")
    for text, match in (
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"classes": ["a"]}', "column is None"),
        ('{"column": "c", "classes": ["a", "a", "b"]}', "'a' is there twice"),
        ('{"column": "c", "classes": [1, 2, 3]}', "list of texts"),
    ):
        (folder / "classes.json").write_text(text)
        refused(folder, match)
    with pytest.raises(ConfigError, match="obs column"):
        AnnotateOptions(column="a/b")


def test_classes_are_kept_and_read_back(tmp_path: Path) -> None:
    write_names(tmp_path, CLASSES, "cell_type", ["ä", "b"])
    assert read_names(str(tmp_path), CLASSES) == LabelNames(column="cell_type", names=("ä", "b"))
    tree = {"column": "cell_type", "classes": ["ä", "b"]}
    assert json.loads((tmp_path / "classes.json").read_text()) == tree
    with pytest.raises(ConfigError, match="there is no name"):
        write_names(tmp_path, CLASSES, "cell_type", [])

"""Runs in a report: verdicts, curves, settings, embeddings, against what the runs wrote."""

from __future__ import annotations

import dataclasses
import json
import re

import anndata
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from report_support import HOSTILE, Page, make_set

from scshards.base.errors import ConfigError, SourceError
from scshards.cli import main
from scshards.evaluation.verdict import Annotation, Evaluation, read_verdict
from scshards.report.curves import COLORS
from scshards.report.page.clouds import MOST_CELLS, Cloud, cloud_figure, of_vectors, read_cloud
from scshards.report.page.page import report
from scshards.report.page.runs import MOST_POINTS
from scshards.tasks.confusion import Confusion
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import MetricsLog
from scshards.training.save.folder import RunFolder

STEPS = range(1, 601)
VERDICT = Evaluation(
    split="valid", n_cells=9, n_masked=90, model=20.0, mvc=None, gene_mean=30.0, cell_mean=40.0
)
CLASSES = Annotation(
    split="valid", n_cells=10, n_without=0, n_other=0, class_ce=1.0, accuracy=0.7, macro_f1=0.6, majority="a",
    majority_accuracy=0.5, confusion=Confusion(("a", HOSTILE[1]), np.array([[4, 1], [2, 3]])),
)  # fmt: skip


def make_run(folder, *, lr=1e-3, far=0.0, evaluation=None):
    """A run of 600 logged steps on two ranks, evaluated each 100."""
    run = RunFolder(folder)
    run.claim(TrainConfig().tables() | {"optim": {"lr": lr}}, "shards")
    log = MetricsLog(run.metrics, 0)
    for step in STEPS:
        mse = 30 + 300 * float(np.exp(-step / 20)) + far
        log.write(
            "train", step, epoch=step / 100, loss=2 * mse, masked_mse=mse, lr=lr, cells_per_s=100.0 + step % 2,
            data_wait=0.02, memory_bytes=10**9, slowest_step_s=0.6, fastest_step_s=0.5,
        )  # fmt: skip
        if step % 100 == 0:
            log.write(
                "valid",
                step,
                masked_mse=mse + 1,
                n_masked=90,
                is_best=step == 500,
                **{"other/masked_mse": 50.0},
            )
    if evaluation is not None:
        run.write("evaluation.json", evaluation.tables())
    return str(run.path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(make_set(tmp_path_factory.mktemp("set")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one = make_run(folder / "one", evaluation=VERDICT)
    return [one, make_run(folder / "two", lr=2e-3, far=9.0, evaluation=CLASSES)]


@pytest.fixture(scope="module")
def page(root, runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "r.html"
    report(root, path, rebuild="", runs=runs, shown=False)
    return Page(path)


def test_curves_are_those_of_the_metrics(page, runs):
    rows = pd.DataFrame(page.rows("curve-masked-mse"), columns=["step", "value", "line", "kind"])
    for name, far in (("one", 0.0), ("two", 9.0)):
        held = rows[(rows.line == name) & (rows.kind == "held out")]
        assert held.step.tolist() == [100, 200, 300, 400, 500, 600]
        wanted = 31 + 300 * np.exp(-held.step / 20) + far
        np.testing.assert_allclose(held.value, wanted, rtol=1e-5)
        trained = rows[(rows.line == name) & (rows.kind == "training")]
        assert len(trained) == MOST_POINTS < len(STEPS), (
            "a long one is told by medians of stretches"
        )
        np.testing.assert_allclose(
            trained.value, 30 + 300 * np.exp(-trained.step / 20) + far, rtol=0.08
        )
        other = rows[rows.line == f"{name}, other"]
        assert set(other.value) == {50.0} and len(other) == 6
    assert rows[rows.line == "each gene's mean"].value.tolist() == [30.0, 30.0]
    assert "Best model of one: step 500; of two: step 500." in page.text


def test_rates_and_ranks(page):
    one, _ = page.facts["runs"]
    assert one["cells_per_s"] == 100.5 and one["data_wait"] == 0.02
    assert (
        one["rank_spread"] == pytest.approx(0.2) and one["step"] == 600 and one["best_step"] == 500
    )
    assert {value for _, value, *_ in page.rows("rank-spread")} == {0.2}


def test_verdicts_in_plain_words(page):
    assert "The model is better than each gene&#x27;s mean: 20 against 30, 33.3% less" in page.text
    share = {(a, b): (s, n) for a, b, s, n in page.rows("confusion-2")}
    assert share["a", HOSTILE[1]] == (0.2, 1) and share[HOSTILE[1], HOSTILE[1]] == (0.6, 3)
    assert HOSTILE[1] not in page.text.split('<script type="application/json"')[0]
    assert "The model is better than always saying" in page.text


def test_settings_that_differ(page):
    section = page.text.split('id="settings"')[1].split("</section>")[0]
    rows = re.findall(r"<tr>(<th scope=.row.*?)</tr>", section)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r) for r in rows]
    assert found == [["optim.lr", "0.0001", "0.001", "0.002"]]


def test_a_bad_run_is_warned_of(root, tmp_path):
    worse = dataclasses.replace(VERDICT, model=31.0)
    runs = [make_run(tmp_path / "bad", evaluation=worse), make_run(tmp_path / "new")]
    made = report(root, tmp_path / "r.html", rebuild="", runs=runs, shown=False)
    assert made.warnings[0].startswith("bad predicts no better than means")
    assert "new was not compared with the baselines" in made.warnings[1]
    with pytest.raises(ConfigError, match="not the folder of a run"):
        report(root, tmp_path / "r.html", rebuild="", runs=[str(tmp_path)], shown=False)


def test_a_verdict_is_read_as_it_was_written():
    assert read_verdict(json.loads(json.dumps(VERDICT.tables()))) == VERDICT
    found = read_verdict(json.loads(json.dumps(CLASSES.tables())))
    assert found is not None and found.tables() == CLASSES.tables()
    assert read_verdict({}) is None and read_verdict({"confusion": [[1]], "classes": []}) is None


def test_a_cloud_holds_all_cells_by_any_label():
    rng = np.random.default_rng(2)
    n = MOST_CELLS + 500
    labels = {
        "kind": rng.choice([f"k{i}" for i in range(14)], n),
        "depth": rng.uniform(0, 100, n),
        "barcode": np.array([f"b{i}" for i in range(n)]),
        "one": np.full(n, "same"),
    }
    figure = cloud_figure(
        Cloud(title="t", at=rng.normal(size=(n, 2)), axes=("x", "y"), labels=labels), "cloud"
    )
    assert list(figure.choices) == ["kind", "depth"], "what tells no cells apart is no choice"
    assert len(figure.choices["kind"]) == MOST_CELLS
    names = list(dict.fromkeys(row[2] for row in figure.choices["kind"]))
    counted = pd.Series(labels["kind"]).value_counts()
    assert set(names[:9]) == set(counted.index[:9]) and names[9] == "5 others"
    assert len(names) <= len(COLORS)
    assert figure.told is not None
    assert dict(figure.told[1]["kind"]) == counted.to_dict()
    assert (
        sum(size for _, size in figure.told[1]["depth"]) == n and len(figure.told[1]["depth"]) == 5
    )


def test_an_embedding_of_a_file(tmp_path):
    rng = np.random.default_rng(1)
    data = anndata.AnnData(
        np.ones((50, 3), np.float32),
        pd.DataFrame({"k": list("ab") * 25}, index=map(str, range(50))),
    )
    data.obsm["X_scshards"] = rng.normal(size=(50, 8)).astype(np.float32)
    data.obsm["X_umap"] = rng.normal(size=(50, 2))
    data.write_h5ad(tmp_path / "cells.h5ad")
    cloud = read_cloud(str(tmp_path / "cells.h5ad"), "X_umap")
    np.testing.assert_array_equal(cloud.at, data.obsm["X_umap"])
    assert cloud.labels["k"].tolist() == list("ab") * 25
    cloud = read_cloud(str(tmp_path / "cells.h5ad"), None)
    x = data.obsm["X_scshards"] - data.obsm["X_scshards"].mean(axis=0)
    _, vectors = np.linalg.eigh(x.T @ x)
    np.testing.assert_allclose(np.abs(cloud.at), np.abs(x @ vectors[:, ::-1][:, :2]), atol=1e-4)
    with pytest.raises(SourceError, match="X_tsne"):
        read_cloud(str(tmp_path / "cells.h5ad"), "X_tsne")
    assert of_vectors("t", data.obsm["X_scshards"], {}).axes[0].startswith("PC 1 (")


def test_options_that_need_others_are_refused(root, tmp_path):
    for extra in (["--layout", "X_umap"], ["--embed-cells", "5"]):
        ran = CliRunner().invoke(main, ["report", root, "-o", str(tmp_path / "r.html"), *extra])
        assert ran.exit_code == 2 and "there is none" in ran.output

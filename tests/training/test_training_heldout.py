"""Held-out sets by name, probes of embeddings, and the best model by any figure of theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from finetune_support import FINE, pack_cells
from train_support import read_tensors

from scshards.applying.evaluate import evaluate_run
from scshards.base.errors import ConfigError
from scshards.cells.vocab import Vocab
from scshards.model.scgpt import load_model
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack
from scshards.shards.manifest import Manifest
from scshards.shards.shardset import ShardSet
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train

SHORT = ("run.steps=12", "run.eval_every=4", "run.log_every=4", "run.save_every=4")
ANNOTATE = ("task.name=annotate", "task.label=kind", "run.steps=80", "run.eval_every=20")
INTEGRATE = ("task.name=integrate", "task.label=kind", "task.domain=donor")
PROBE = ("evaluate.probe=kind", "evaluate.probe_cells=150")


def settings(*more: str) -> list[str]:
    return [*FINE, *SHORT, *more]


def valid_lines(shards: str, run: Path, *more: str) -> list[dict]:
    train(shards, run, TrainConfig.read(None, settings(*more)), shown=False)
    return [m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "valid"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> str:
    return pack_cells(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """Other cells of the same genes, with a class more, and categories in another order."""
    root = pack_cells(tmp_path_factory.mktemp("other"), kinds=4, seed=8, donors=("b", "a"))
    file = Path(root, "manifest.json")
    # As they come: codes a, b are called b, a now, so that a mapping by code would be seen.
    text = file.read_text().replace('"k0"', '"zz"').replace('"k1"', '"k0"').replace('"zz"', '"k1"')
    file.write_bytes(Manifest.from_json(text).to_json())
    return root


def test_each_set_has_the_score_that_evaluate_finds(cells, other, tmp_path):
    more = [f"evaluate.sets.other.root={other}", "evaluate.sets.seen.split=train"]
    lines = valid_lines(cells, tmp_path / "run", *more)
    assert [m["step"] for m in lines] == [4, 8, 12]
    best = next(m for m in reversed(lines) if m["is_best"])
    for name, root, split in (
        ("other/", other, "valid"),
        ("seen/", cells, "train"),
        ("", cells, "valid"),
    ):
        found = evaluate_run(str(tmp_path / "run"), root, split=split, device="cpu", shown=False)
        assert best[f"{name}masked_mse"] == pytest.approx(found.model, rel=1e-5)
        assert best[f"{name}mvc_mse"] == pytest.approx(found.mvc, rel=1e-5)
        assert (best[f"{name}n_masked"], best[f"{name}n_cells"]) == (found.n_masked, found.n_cells)
    alone = valid_lines(cells, tmp_path / "alone")
    assert alone == [{k: v for k, v in m.items() if "/" not in k} for m in lines]
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["evaluate"]["sets"]["other"] == {"root": other, "split": "valid"}


def test_of_large_sets_some_cells_are_scored_the_same_every_time(cells, other, tmp_path):
    more = [f"evaluate.sets.other.root={other}", "evaluate.sets.seen.split=train"]
    lines = valid_lines(cells, tmp_path / "run", *more, "evaluate.cells=30")
    assert [m[f"{name}n_cells"] for m in lines for name in ("", "other/", "seen/")] == [30] * 9
    assert len({m["n_masked"] for m in lines}) == 1
    few, every = valid_lines(cells, tmp_path / "few", "evaluate.cells=29"), 10**9
    assert [m["n_masked"] for m in few] < [m["n_masked"] for m in lines]
    whole = valid_lines(cells, tmp_path / "whole", f"evaluate.cells={every}")
    assert whole == valid_lines(cells, tmp_path / "all")
    with pytest.raises(ConfigError, match=r"evaluate\.cells"):
        valid_lines(cells, tmp_path / "run", *more, "run.steps=16", "evaluate.cells=31")
    with pytest.raises(ConfigError, match="at least 1"):
        TrainConfig.read(None, ["evaluate.cells=0"])


def test_classes_of_another_set_go_by_name_and_unknown_ones_are_counted(
    cells, other, tmp_path, capsys
):
    run = tmp_path / "run"
    more = ("run.steps=200", "run.eval_every=50", "optim.lr=1e-2")
    asked = TrainConfig.read(None, settings(*ANNOTATE, *more, f"evaluate.sets.other.root={other}"))
    summary = train(cells, run, asked)
    last = [m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "valid"][-1]
    shardset = ShardSet(other)
    names = shardset.manifest.labels["kind"].categories
    codes = np.concatenate([shardset.index(s)["obs.kind"] for s in shardset.shards("valid")])
    unknown = int((codes == names.index("k3")).sum())
    assert unknown > 5 and last["other/n_other"] == unknown
    assert last["other/n_labelled"] == int((codes >= 0).sum()) - unknown
    assert last["other/n_cells"] == int((codes >= 0).sum())
    assert (
        f"other: {unknown} cells of classes that the model does not know" in capsys.readouterr().err
    )
    assert last["accuracy"] > 0.9, "else the next number says nothing"
    # k0 and k1 have changed names there, so that only k2 is right where codes go by name.
    swapped = int(np.isin(codes, [names.index("k0"), names.index("k1")]).sum())
    share = 1 - swapped / last["other/n_labelled"]
    assert last["other/accuracy"] == pytest.approx(share, abs=0.15)
    best = next(m for m in reversed(read_metrics(run / "metrics.jsonl")) if m.get("is_best"))
    assert summary.best["other/accuracy"] == best["other/accuracy"]
    found = evaluate_run(str(run), other, device="cpu", shown=False)
    assert (found.n_cells, found.n_other) == (last["other/n_labelled"], unknown)
    assert found.accuracy == pytest.approx(best["other/accuracy"])
    most = int((codes == names.index(found.majority)).sum())
    assert found.majority_accuracy == pytest.approx(most / found.n_cells)
    assert f"{unknown} of other classes are left out" in str(found.text())
    assert (
        f"valid:      cross-entropy of classes {best['class_ce']:.4g}, accuracy" in summary.text()
    )
    assert f"other:      cross-entropy of classes {best['other/class_ce']:.4g}" in summary.text()


def test_a_set_of_an_integration_is_measured_too(cells, other, tmp_path):
    more = [*INTEGRATE, "run.eval_every=12", f"evaluate.sets.other.root={other}"]
    (line,) = valid_lines(cells, tmp_path / "run", *more)
    for name in ("avg_bio", "asw_domain", "pca_avg_bio"):
        assert -0.5 <= line[f"other/{name}"] <= 1 and line[f"other/{name}"] != line[name]
    found = evaluate_run(str(tmp_path / "run"), other, device="cpu", shown=False)
    assert line["other/masked_mse"] == pytest.approx(found.model, rel=1e-5)
    assert line["other/avg_bio"] == pytest.approx(found.figures["avg_bio"], abs=1e-6)


def test_a_probe_is_scikit_learns_on_the_published_models_embeddings(cells, tmp_path):
    from loaders import loader_of
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import f1_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    lines = valid_lines(cells, tmp_path / "run", "evaluate.probe=kind", "run.eval_every=12")
    model = load_model(str(tmp_path / "run")).model
    x, y = {}, {}
    for split in ("train", "valid"):
        loader = loader_of(
            cells, split=split, objective="none", max_length=60, shuffle=False, drop_last=False,
            batch_size=400, where="`kind` == `kind`",
        )  # fmt: skip
        (batch,) = loader
        rows = batch.weight > 0
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(model(batch).cell_embeddings[rows], dim=1)
        x[split], y[split] = vectors.double().numpy(), batch.labels["kind"][rows].numpy()
    assert lines[-1]["probe_cells"] == len(y["valid"])
    knn = KNeighborsClassifier(10, metric="cosine", algorithm="brute").fit(x["train"], y["train"])
    scaled = StandardScaler().fit(x["train"])
    ridge = RidgeClassifier(0.01 * len(y["train"])).fit(scaled.transform(x["train"]), y["train"])
    said = {"knn": knn.predict(x["valid"]), "linear": ridge.predict(scaled.transform(x["valid"]))}
    for name, predicted in said.items():
        right = np.mean(predicted == y["valid"])
        assert lines[-1][f"{name}_accuracy"] == pytest.approx(right, abs=0.015)  # one cell
        f1 = f1_score(y["valid"], predicted, average="macro")
        assert lines[-1][f"{name}_macro_f1"] == pytest.approx(f1, abs=0.02)


@pytest.mark.parametrize(
    "task",
    [(), ("task.objective=generate",), INTEGRATE, ("task.name=annotate", "task.label=donor")],
)
def test_a_label_that_can_be_learned_scores_far_above_chance(cells, tmp_path, task):
    """Kinds set the rates of all genes; a third of the cells is of each."""
    (line,) = valid_lines(cells, tmp_path / "run", *task, *PROBE, "run.eval_every=12")
    assert line["linear_accuracy"] > 0.7 and line["knn_accuracy"] > 0.5
    n = sum(
        int((ShardSet(cells).index(s)["obs.kind"] >= 0).sum())
        for s in ShardSet(cells).shards("valid")
    )
    assert line["probe_cells"] == min(150, n)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_find_what_one_does(cells, other, tmp_path, two_ranks, parallel):
    """And agree on the best model, by a figure that only the first of them knows."""
    more = [*INTEGRATE, "task.domain_norm=false", "task.similarity_weight=0", "run.eval_every=6",
            "optim.eps=1e-2", *PROBE, f"evaluate.sets.other.root={other}",
            "evaluate.best_by=linear_accuracy"]  # fmt: skip
    one = valid_lines(cells, tmp_path / "one", *more)
    what = [[str(tmp_path / "two"), settings(*more, f"run.parallel={parallel}")]]
    assert two_ranks.run("train_worker:runs", cells, what) == 2 * [[""]]
    two = [m for m in read_metrics(tmp_path / "two" / "metrics.jsonl") if m["kind"] == "valid"]
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a.keys() == b.keys() and {"other/avg_bio", "knn_accuracy"} <= a.keys()
        for name, value in a.items():
            near = 0.02 if "accuracy" in name or "f1" in name else 1e-4
            assert b[name] == pytest.approx(value, rel=near, abs=1e-3), name


def _best(lines: list[dict], figure: str, sign: int) -> list[bool]:
    """Where a value is better than all before it."""
    best, out = None, []
    for m in lines:
        out.append(best is None or sign * m[figure] > sign * best)
        best = m[figure] if out[-1] else best
    return out


@pytest.mark.parametrize(
    ("by", "field", "sign"),
    [
        ("macro_f1", "macro_f1", 1),
        ("linear_accuracy", "linear_accuracy", 1),
        ("seen/loss", "seen/class_ce", -1),
        ("class_ce", "class_ce", -1),
    ],
)
def test_the_best_model_is_that_of_the_figure_asked_for(cells, tmp_path, by, field, sign):
    more = [*ANNOTATE, *PROBE, "evaluate.sets.seen.split=train", f"evaluate.best_by={by}",
            "optim.lr=2e-2", "run.save_every=20", "run.keep_last=9"]  # fmt: skip
    run = tmp_path / "run"
    summary = train(cells, run, TrainConfig.read(None, settings(*more)), shown=False)
    lines = [m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "valid"]
    assert [m["is_best"] for m in lines] == _best(lines, field, sign)
    best = next(m for m in reversed(lines) if m["is_best"])
    assert (summary.best_step, summary.best_by) == (best["step"], by)
    assert summary.best[by] == best[field] and summary.best_loss == best["class_ce"]
    step = read_tensors(run / "checkpoints" / f"step-{best['step']:08d}")
    loaded = load_model(str(run)).model.state_dict()
    assert all(v.equal(step[k]) for k, v in loaded.items())
    words = {
        "macro_f1": "macro F1",
        "linear_accuracy": "linear accuracy",
        "seen/loss": "cross-entropy of classes of seen",
        "class_ce": "cross-entropy of classes",
    }
    assert f"best:       step {best['step']}, by {words[by]} (best_model.pt)" in summary.text()


def test_a_run_that_goes_on_keeps_its_best_and_may_look_at_other_cells(cells, other, tmp_path):
    more = [*ANNOTATE, "evaluate.best_by=accuracy", "evaluate.sets.seen.split=train"]
    whole = valid_lines(cells, tmp_path / "a", *more)
    valid_lines(cells, tmp_path / "b", *more, "run.steps=40", "optim.schedule=constant")
    shutil.rmtree(tmp_path / "b")
    valid_lines(cells, tmp_path / "b", *more)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000080")
    saved = tmp_path / "b" / "checkpoints" / "step-00000076" / "state.json"
    state = json.loads(saved.read_text())
    assert state["best"]["accuracy"] == max(m["accuracy"] for m in whole[:-1])
    assert valid_lines(cells, tmp_path / "b", *more) == whole

    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000080")
    changed = [*ANNOTATE, "evaluate.best_by=seen/accuracy", f"evaluate.sets.seen.root={other}"]
    last = valid_lines(cells, tmp_path / "b", *changed)[-1]
    assert last["seen/accuracy"] < whole[-1]["seen/accuracy"] and "seen/n_other" in last
    assert last["is_best"], "no figure of these cells is known of a model before"


def test_what_an_evaluation_can_not_look_at_is_refused_before_anything_is_written(
    cells, other, tmp_path
):
    def refused(match: str, *more: str) -> str:
        with pytest.raises(ConfigError, match=match) as e:
            valid_lines(cells, tmp_path / "run", *more)
        assert not (tmp_path / "run").exists()
        return str(e.value)

    said = refused("no evaluation has the figure 'acuracy'", *ANNOTATE, "evaluate.best_by=acuracy")
    assert "choose one of loss, class_ce, accuracy, macro_f1" in said
    said = refused("'a/loss'", "evaluate.best_by=a/loss", "evaluate.sets.b.split=train", *PROBE)
    assert "knn_accuracy, knn_macro_f1, linear_accuracy" in said and "b/loss, b/masked_mse" in said
    refused(
        "another vocabulary",
        f"evaluate.sets.a.root={_packed(other, tmp_path / 'renamed', first='H00')}",
    )
    refused("no split 'tset'", "evaluate.sets.a.split=tset")
    refused("valid is the name of", "evaluate.sets.valid.split=train")
    refused("letters, digits", 'evaluate.sets={"a/b" = {split = "train"}}')
    refused("the cells of valid", "evaluate.sets.a={}")
    refused("unknown key 'rot'", f"evaluate.sets.a.rot={other}")
    refused("did you mean 'kind'", "evaluate.probe=kindd")
    refused("holds numbers", "evaluate.probe=age")
    refused("at least two classes", "evaluate.probe=same")
    refused("only of evaluate.probe", "evaluate.probe_cells=7")
    halved = _packed(other, tmp_path / "halved", factor=0.5, values="float")
    refused("its values are float, and the model is trained on counts",
            f"evaluate.sets.a.root={halved}", "data.values=log1p", "data.n_bins=0")  # fmt: skip
    strange = pack_cells(tmp_path / "strange", donors=("a", "z"))
    refused("not trained on these domains: z", *INTEGRATE, f"evaluate.sets.a.root={strange}")
    refused(
        "no label column 'donor'",
        *INTEGRATE,
        f"evaluate.sets.a.root={_packed(cells, tmp_path / 'unlabelled', obs=('kind',))}",
    )


def _packed(root: str, to: Path, *, first: str = "G00", factor: float = 1.0, **options) -> str:
    """The cells of a shard set packed anew: the first gene is called otherwise, values are scaled."""
    file = anndata.read_h5ad(Path(root).parent / "cells.h5ad")
    file.X = file.X * np.float32(factor)
    file.var_names = [first, *file.var_names[1:]]
    to.mkdir()
    file.write_h5ad(to / "cells.h5ad")
    asked = {"obs": ("kind", "donor"), "valid_fraction": 0.25, "workers": 1} | options
    genes = Vocab.from_genes([*file.var_names])
    pack(str(to / "cells.h5ad"), str(to / "shards"), genes, PackOptions(**asked), progress=False)
    return str(to / "shards")

"""Runs of every task on a small shard set: what they learn, write, say and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from finetune_support import FINE, GENES, pack_cells
from loaders import loader_of

from scshards.applying.evaluate import Annotation, Evaluation, evaluate_run
from scshards.base.errors import ConfigError
from scshards.cli import main
from scshards.model.classes import CLASSES, DOMAINS, read_names
from scshards.model.scgpt import load_model
from scshards.shards.manifest import Manifest
from scshards.shards.shardset import ShardSet
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train

ANNOTATE = ("task.name=annotate", "task.label=kind")
INTEGRATE = ("task.name=integrate", "task.label=kind", "task.domain=donor")
GENERATE = ("task.objective=generate", "task.cell_prompt_after=6")
SHORT = ("run.steps=12", "run.eval_every=12", "run.log_every=4", "run.save_every=12")


def _config(*settings: str) -> TrainConfig:
    return TrainConfig.read(None, [*FINE, *SHORT, *settings])


def _train(shards: str, run: Path, *settings: str) -> list[dict]:
    train(shards, run, _config(*settings), shown=False)
    return read_metrics(run / "metrics.jsonl")


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> str:
    return pack_cells(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def annotated(cells, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("annotated") / "run"
    _train(cells, run, *ANNOTATE, "run.steps=200", "run.eval_every=50", "optim.lr=1e-2")
    return run


@pytest.fixture(scope="module")
def integrated(cells, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("integrated") / "run"
    extra = ("model.explicit_zero_prob=true", "data.include_zero_genes=5")
    _train(cells, run, *INTEGRATE, *extra)
    return run


def test_annotate_learns_and_names_its_classes(cells, annotated):
    lines = read_metrics(annotated / "metrics.jsonl")
    valid = [m for m in lines if m["kind"] == "valid"]
    assert max(m["accuracy"] for m in valid) > 0.9 and max(m["macro_f1"] for m in valid) > 0.9
    best = min(m["class_ce"] for m in valid)
    assert [m["class_ce"] for m in valid if m["is_best"]][-1] == best
    names = read_names(annotated, CLASSES)
    assert (names.column, names.names) == ("kind", ("k0", "k1", "k2"))
    assert load_model(str(annotated)).model.config.n_classes == 3


def test_annotation_against_the_loaded_model_and_the_cells_one_by_one(cells, annotated):
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    found = evaluate_run(str(annotated), cells, batch_size=16, device="cpu", shown=False)
    assert isinstance(found, Annotation)
    model = load_model(str(annotated)).model
    loader = loader_of(
        cells, split="valid", objective="none", max_length=60, shuffle=False, drop_last=False,
        batch_size=1,
    )  # fmt: skip
    truth, predicted, ce = [], [], []
    for batch in loader:
        with torch.no_grad():
            logits = model(batch).class_logits[0].double()
        code = int(batch.labels["kind"][0])
        if code >= 0:
            truth.append(code)
            predicted.append(int(logits.argmax()))
            ce.append(-float(logits.log_softmax(dim=0)[code]))
    assert found.n_cells == len(truth) > 40
    assert found.n_without == len(list(loader)) - len(truth)
    assert found.accuracy == pytest.approx(np.mean(np.equal(truth, predicted)))
    assert found.class_ce == pytest.approx(np.mean(ce), rel=1e-4)
    right, of, f1, cells = precision_recall_fscore_support(truth, predicted, labels=[0, 1, 2])
    counts = confusion_matrix(truth, predicted, labels=[0, 1, 2])
    told = found.tables()
    assert told["confusion"] == counts.tolist()
    assert told["classes"] == [
        {
            "name": f"k{i}",
            "cells": cells[i],
            "precision": right[i],
            "recall": of[i],
            "f1": pytest.approx(f1[i]),
        }
        for i in range(3)
    ]
    assert found.macro_f1 == pytest.approx(f1.mean())
    majority = ("k0", "k1", "k2").index(found.majority)
    assert found.majority_accuracy == pytest.approx(np.mean(np.equal(truth, majority)))
    assert json.loads((annotated / "evaluation.json").read_text()) == found.tables()


def test_classes_go_by_name_and_not_by_code(annotated, tmp_path):
    """A shard set whose categories k0 and k1 have changed names: its code 0 is called k1."""
    other = pack_cells(tmp_path, seed=6)
    first = evaluate_run(str(annotated), other, device="cpu", shown=False)
    manifest = Path(other) / "manifest.json"
    text = manifest.read_text()
    assert '"k0"' in text and '"k1"' in text
    text = text.replace('"k0"', '"swap"').replace('"k1"', '"k0"').replace('"swap"', '"k1"')
    manifest.write_bytes(Manifest.from_json(text).to_json())
    swapped = evaluate_run(str(annotated), other, device="cpu", shown=False)
    assert first.accuracy > 0.9
    # What is called k0 is k1 and the other way about: both are wrong now, k2 is as right as before.
    assert swapped.accuracy < 0.6
    for name in ("k0", "k1", "k2"):
        text = text.replace(f'"{name}"', f'"x{name}"')
    manifest.write_bytes(Manifest.from_json(text).to_json())
    strange = evaluate_run(str(annotated), other, device="cpu", shown=False)
    assert (strange.n_cells, strange.n_other) == (0, first.n_cells)
    assert strange.accuracy == strange.majority_accuracy == 0


def test_integrate_writes_each_loss_and_its_scores_beside_pca(cells, integrated):
    lines = read_metrics(integrated / "metrics.jsonl")
    terms = {"masked_mse", "mvc_mse", "zero_nll", "mvc_zero_nll", "similarity", "domain_ce"}
    for line in lines:
        assert terms <= set(line) and all(line[t] is not None for t in terms)
    weights = {"similarity": 10.0}
    loss = sum(weights.get(t, 1.0) * lines[0][t] for t in terms)
    assert lines[0]["loss"] == pytest.approx(loss, rel=1e-6)
    valid = lines[-1]
    for name in ("avg_bio", "nmi", "ari", "asw", "asw_domain"):
        assert -0.5 <= valid[name] <= 1 and -0.5 <= valid[f"pca_{name}"] <= 1
    assert valid["pca_avg_bio"] > 0.8, "kinds differ in their counts, and PCA sees it"
    assert valid["metric_cells"] == valid["n_cells"] - _without(cells, "valid")
    names = read_names(integrated, DOMAINS)
    assert (names.column, names.names) == ("donor", ("a", "b"))


def _without(root: str, split: str) -> int:
    shardset = ShardSet(root)
    return sum(int((shardset.index(s)["obs.kind"] < 0).sum()) for s in shardset.shards(split))


def test_pca_is_of_log_normalised_counts(cells, integrated):
    """PCA's scores from the h5ad file itself, by anndata and numpy."""
    import anndata
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import normalized_mutual_info_score, silhouette_score

    file = anndata.read_h5ad(Path(cells).parent / "cells.h5ad")
    shardset = ShardSet(cells)
    rows = np.sort(np.concatenate([shardset.index(s)["row"] for s in shardset.shards("valid")]))
    kinds = file.obs["kind"].cat.codes.to_numpy()[rows]
    rows, kinds = rows[kinds >= 0], kinds[kinds >= 0]
    counts = file.X[rows].toarray().astype(np.float64)
    logged = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    x = PCA(50, random_state=0).fit_transform(logged)
    found = read_metrics(integrated / "metrics.jsonl")[-1]
    assert found["pca_asw"] == pytest.approx((silhouette_score(x, kinds) + 1) / 2, rel=1e-4)
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict(x)
    assert found["pca_nmi"] == pytest.approx(
        normalized_mutual_info_score(kinds, clusters), abs=0.01
    )


def test_evaluating_an_integration_scores_its_best_model(cells, integrated):
    found = evaluate_run(str(integrated), cells, batch_size=16, device="cpu", shown=False)
    assert isinstance(found, Evaluation)
    valid = read_metrics(integrated / "metrics.jsonl")[-1]
    assert found.model == pytest.approx(valid["masked_mse"], rel=1e-5)
    for name in ("avg_bio", "asw_domain", "pca_avg_bio"):
        assert found.figures[name] == pytest.approx(valid[name], abs=1e-6)


def test_generate_trains_and_its_second_pass_begins_when_told(cells, tmp_path):
    lines = _train(cells, tmp_path / "run", *GENERATE)
    assert [m["prompt_mse"] is None for m in lines if m["kind"] == "train"] == [True, False, False]
    assert lines[-1]["kind"] == "valid" and lines[-1]["n_unknown"] > 100
    found = evaluate_run(str(tmp_path / "run"), cells, batch_size=16, device="cpu", shown=False)
    assert isinstance(found, Evaluation) and found.what == "unknown"
    assert found.model == pytest.approx(lines[-1]["unknown_mse"], rel=1e-5)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["training_tasks"], args["mask_ratio"]) == ("both", [0.25, 0.5, 0.75])


def test_starting_from_a_checkpoint_takes_its_shape_weights_and_says_so(cells, tmp_path, capsys):
    pre, run = tmp_path / "pre", tmp_path / "run"
    _train(cells, pre)
    config = TrainConfig.read(
        None, [*SHORT, "run.batch_size=16", "run.device=cpu", "data.lanes=4", "data.max_length=60",
               "optim.lr=1e-9", f"task.start={pre}", "model.dropout=0.1", *ANNOTATE],
    )  # fmt: skip
    assert (config.model.d_model, config.model.n_layers, config.model.dropout) == (16, 1, 0.1)
    train(cells, run, config)
    said = capsys.readouterr().err
    assert f"starts from {pre}" in said and "fresh: cls_decoder" in said
    assert "15 train cells have none and are not trained on" in said
    theirs, ours = (load_model(str(r)).model.state_dict() for r in (pre, run))
    assert set(theirs) < set(ours)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_a_class_head_of_other_classes_starts_fresh(cells, annotated, tmp_path, capsys):
    settings = (f"task.start={annotated}", "optim.lr=1e-9", *ANNOTATE)
    train(cells, tmp_path / "same", _config(*settings))
    assert "fresh: nothing" in capsys.readouterr().err
    names = annotated / "classes.json"
    before = names.read_text()
    try:
        names.write_text(before.replace('"k0"', '"x"'))
        train(cells, tmp_path / "other", _config(*settings))
    finally:
        names.write_text(before)
    assert "fresh: cls_decoder" in capsys.readouterr().err
    trained, same, other = (
        load_model(str(r)).model.cls_decoder.out_layer.weight
        for r in (annotated, tmp_path / "same", tmp_path / "other")
    )
    torch.testing.assert_close(same, trained, rtol=0, atol=1e-6)
    assert (other - trained).abs().max() > 1e-3


def test_a_stopped_annotation_goes_on_as_if_it_had_not_been(cells, tmp_path):
    short = ("run.steps=12", "run.save_every=4", "optim.schedule=constant")
    whole = _train(cells, tmp_path / "a", *ANNOTATE, *short)
    _train(cells, tmp_path / "b", *ANNOTATE, *short, "run.steps=4")
    again = _train(cells, tmp_path / "b", *ANNOTATE, *short)
    a, b = (load_model(str(tmp_path / r)).model.state_dict() for r in "ab")
    assert all(a[n].equal(b[n]) for n in a)
    assert again[-1]["class_ce"] == whole[-1]["class_ce"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("task.name=annotate",), "needs the label column"),
        (("task.name=annotate", "task.label=kindd"), "did you mean 'kind'"),
        (("task.name=annotate", "task.label=age"), "holds numbers"),
        (("task.name=annotate", "task.label=same"), "only 'one'"),
        (("task.name=integrate",), "needs the label column that holds the domains"),
        (("task.name=integrate", "task.domain=door"), "did you mean 'donor'"),
        (("task.name=integrate", "task.domain=same"), "at least two domains"),
        (("task.label=kind",), "means nothing to the task pretrain"),
        (("task.domain=donor", *ANNOTATE), "means nothing to the task annotate"),
        (("task.objective=generate", *ANNOTATE), "means nothing to the task annotate"),
        (("task.name=anotate",), "'annotate'"),
        (("run.batch_size=4096", *ANNOTATE), "fewer than one global batch"),
        (("run.batch_size=192", *INTEGRATE), "largest domain"),
        (("model.value_style=category",), "data.pad_value=51"),
        (("task.start=/nowhere",), "lacks args.json"),
        (("task.metric_cells=-1", *INTEGRATE), "at least 0"),
    ],
)
def test_what_can_not_be_trained_says_why_and_writes_nothing(cells, tmp_path, settings, said):
    with pytest.raises(Exception, match=said) as e:
        train(cells, tmp_path / "run", _config(*settings), shown=False)
    assert isinstance(e.value, ValueError)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_genes_is_refused(cells, tmp_path):
    _train(cells, tmp_path / "pre")
    vocab = tmp_path / "pre" / "vocab.json"
    tokens = json.loads(vocab.read_text())
    renamed = {f"ENS{t}" if t in GENES else t: i for t, i in tokens.items()}
    vocab.write_text(json.dumps(renamed))
    with pytest.raises(ConfigError, match="vocabulary has 3 of the shard set's 63 tokens") as e:
        train(
            cells,
            tmp_path / "run",
            _config(f"task.start={tmp_path / 'pre'}", *ANNOTATE),
            shown=False,
        )
    assert "--vocab" in str(e.value) and not (tmp_path / "run").exists()


def test_small_domains_are_left_out_aloud(tmp_path, capsys):
    shards = pack_cells(tmp_path / "c", n=200, donors=("a", "b", "c"), missing=0)
    train(shards, tmp_path / "run", _config(*INTEGRATE, "run.batch_size=48", "run.steps=2"))
    said = capsys.readouterr().err
    counts = dict.fromkeys("abc", 0)
    shardset = ShardSet(shards)
    for shard in shardset.shards("train"):
        for code in shardset.index(shard)["obs.donor"]:
            counts["abc"[code]] += 1
    small = [f"{d} ({n})" for d, n in counts.items() if n < 48]
    assert small and f"not trained on: {', '.join(small)}" in said


def test_a_domain_that_the_model_does_not_know_is_refused(integrated, tmp_path):
    other = pack_cells(tmp_path, donors=("a", "z"))
    with pytest.raises(ConfigError, match="not trained on these domains: z"):
        evaluate_run(str(integrated), other, device="cpu", shown=False)


def test_the_command_takes_a_task_and_evaluate_shows_it(cells, annotated, integrated, tmp_path):
    run = tmp_path / "run"
    options = [f"--set={s}" for s in (*FINE, *SHORT, "task.label=kind")]
    done = CliRunner().invoke(
        main, ["train", cells, "-o", str(run), "--task", "annotate", *options]
    )
    assert done.exit_code == 0, done.output
    assert "cross-entropy of classes" in done.output
    assert json.loads((run / "config.json").read_text())["config"]["task"]["name"] == "annotate"
    shown = CliRunner().invoke(main, ["evaluate", str(annotated), cells, "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "macro F1" in shown.output and "always 'k" in shown.output
    shown = CliRunner().invoke(main, ["evaluate", str(integrated), cells, "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "avg_bio" in shown.output and "masked MSE" in shown.output

"""A published model: what is in its folder and in its card, who reads it, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner, Result
from finetune_support import FINE, pack_cells

from scshards import ShardSet
from scshards.applying.annotate import annotate
from scshards.applying.embed import embed
from scshards.applying.evaluate import evaluate_run
from scshards.applying.options import AnnotateOptions, EmbedOptions
from scshards.applying.publish import CARD, publish
from scshards.base.errors import CheckpointError, ConfigError, OutputExistsError
from scshards.base.storage import Storage
from scshards.cli import main
from scshards.model.scgpt import load_model, write_folder
from scshards.model.weights import read_tensors, write_tensors
from scshards.training.config import TrainConfig
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train

FILES = {"model.safetensors", "args.json", "vocab.json", "classes.json", CARD}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A shard set, a run that annotates it, evaluated, and the run's model published."""
    home = tmp_path_factory.mktemp("home")
    shards = pack_cells(home / "cells")
    config = TrainConfig.read(
        None,
        [
            *FINE,
            "task.name=annotate",
            "task.label=kind",
            "run.steps=12",
            "run.eval_every=6",
            f"run.checkpoints={home}/elsewhere",
            "optim.freeze=['value_encoder']",
        ],
    )
    train(shards, home / "run", config, shown=False)
    evaluate_run(str(home / "run"), shards, device="cpu", shown=False)
    publish(str(home / "run"), home / "model")
    return home


def card(folder: Path) -> tuple[Any, str]:
    _, head, text = (folder / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_the_folder_has_the_model_and_says_what_it_is(home):
    assert {p.name for p in (home / "model").iterdir()} == FILES
    head, text = card(home / "model")
    assert head == {"library_name": "scshards", "tags": ["single-cell", "scGPT", "annotate"]}
    manifest = ShardSet(home / "cells" / "shards").manifest
    assert manifest.fingerprint("train") in text and "cells.h5ad (320 cells)" in text
    for split in ("train", "valid"):
        assert f"{manifest.cells(split)} {split}" in text
    evaluation = json.loads((home / "run" / "evaluation.json").read_text())
    valid = [m for m in read_metrics(home / "run" / "metrics.jsonl") if m.get("is_best")]
    for figures in (evaluation, valid[-1]):
        for name in ("accuracy", "class_ce"):
            assert f"| {name} | {figures[name]:.4g} |" in text
    assert f"at step {valid[-1]['step']}:" in text
    assert "| optim.lr | 0.005 |" in text and '| optim.freeze | ["value_encoder"] |' in text
    assert "optim.eps" not in text, "a default"
    assert load_model(str(home / "model")).args["scshards"]["step"] == valid[-1]["step"]


def test_no_path_and_no_secret_goes_with_it(home, tmp_path):
    """Of folders on a disk the last name is left; an address in a store, which has no keys, is whole."""
    for path in (home / "model").iterdir():
        assert str(home).encode() not in path.read_bytes(), path.name
    settings = load_model(str(home / "model")).args["scshards"]["config"]
    assert settings["run"]["checkpoints"] == "elsewhere"
    about = json.loads((home / "run" / "config.json").read_text())
    about["config"]["run"]["checkpoints"] = "s3://host/bucket"
    about["config"]["evaluate"]["sets"] = {"old": {"root": "lab/secret/cells", "split": "valid"}}
    about["config"]["data"]["cache_dir"] = "/scratch/me/cache"
    about["config"]["data"]["cache_size"] = "1 GB"
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("best_model.pt", "vocab.json", "classes.json"):
        (copy / name).write_bytes((home / "run" / name).read_bytes())
    args = json.loads((home / "run" / "args.json").read_text())
    # Earlier versions wrote what they were given.
    with_keys = {"checkpoints": "s3://key:secret@host/bucket?token=abc"}
    args["scshards"]["config"] = about["config"] | {"run": about["config"]["run"] | with_keys}
    (copy / "args.json").write_text(json.dumps(args))
    (copy / "config.json").write_text(json.dumps(about))
    publish(str(copy), tmp_path / "model")
    told = (tmp_path / "model" / CARD).read_text() + (tmp_path / "model" / "args.json").read_text()
    assert "s3://host/bucket" in told and '"cache"' in told
    assert not re.search("secret|token=|abc|/scratch", told) and '"cells"' in told
    assert "There are none: nothing was evaluated." in told


def test_it_embeds_and_annotates_as_the_run_does(home, tmp_path):
    cells, found = str(home / "cells" / "cells.h5ad"), {}
    for name in ("run", "model"):
        of = tmp_path / name
        embed(str(home / name), cells, f"{of}.e.h5ad", EmbedOptions(device="cpu"), shown=False)
        annotate(str(home / name), cells, f"{of}.h5ad", AnnotateOptions(device="cpu"), shown=False)
        table = anndata.read_h5ad(f"{of}.h5ad").obs
        found[name] = (anndata.read_h5ad(f"{of}.e.h5ad").obsm["X_scshards"], table)
    assert np.array_equal(found["run"][0], found["model"][0])
    assert found["run"][1].equals(found["model"][1])
    assert set(found["run"][1]["predicted_kind"]) <= {"k0", "k1", "k2"}


def test_a_run_starts_from_it_as_from_the_run(home, tmp_path):
    told = []
    for name in ("run", "model"):
        done = call(
            *("train", home / "cells" / "shards", "-o", tmp_path / name, "--task", "annotate"),
            *("--start", home / name, "--set", "task.label=kind", "--set", "run.steps=1"),
            *("--set", "run.batch_size=16", "--set", "data.lanes=4", "--set", "run.device=cpu"),
        )
        assert done.exit_code == 0, done.output
        assert "fresh: nothing" in done.stderr
        told.append(load_model(str(tmp_path / name)).model.state_dict())
    assert all(t.equal(told[1][n]) for n, t in told[0].items())


def test_plain_torch_reads_it_by_the_lines_of_its_card(home, monkeypatch):
    _, text = card(home / "model")
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) == 15 and "scshards" not in code
    monkeypatch.chdir(home / "model")
    space: dict[str, Any] = {}
    with torch.no_grad():
        exec(code, space)
        model = load_model(str(home / "model")).model
        encoded = model.encoder(space["genes"]) + model.value_encoder(space["values"])
        x = encoded
        for layer in model.transformer_encoder.layers:
            from scshards.model.layout import Padded

            x = layer(x, Padded(torch.zeros(space["genes"].shape, dtype=torch.bool)))
    expected = torch.nn.functional.normalize(x[:, 0], dim=1)
    assert space["cells"].shape == (1, 16)
    torch.testing.assert_close(space["cells"], expected, rtol=0, atol=1e-5)


def test_the_same_model_is_the_same_bytes_and_nothing_is_overwritten(home, tmp_path):
    done = call("publish", home / "run", "-o", tmp_path / "again", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    for name in FILES:
        data = (tmp_path / "again" / name).read_bytes()
        assert data == (home / "model" / name).read_bytes() and said["files"][name] == len(data)
    before = (tmp_path / "again" / CARD).stat().st_mtime_ns
    done = call("publish", home / "run", "-o", tmp_path / "again")
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit | OutputExistsError)
    assert "there is something already" in done.output
    assert (tmp_path / "again" / CARD).stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="not the folder of a run"):
        publish(str(home / "model"), tmp_path / "other")
    assert {p.name for p in tmp_path.iterdir()} == {"again"}


def test_weights_that_are_not_finite_are_not_published(home, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("args.json", "vocab.json", "classes.json", "config.json"):
        (copy / name).write_bytes((home / "run" / name).read_bytes())
    state = torch.load(home / "run" / "best_model.pt", weights_only=True)
    state["decoder.fc.0.bias"][2] = torch.inf
    torch.save(state, copy / "best_model.pt")
    with pytest.raises(CheckpointError, match=r"decoder\.fc\.0\.bias"):
        publish(str(copy), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_object_store_has_it_whole(home, s3):
    target = f"{s3.url}/models/m"
    publish(str(home / "run"), target)
    storage = Storage(target)
    assert set(storage.list()) == FILES
    ours, theirs = (load_model(str(f)).model.state_dict() for f in (home / "model", target))
    assert all(t.equal(theirs[n]) for n, t in ours.items())
    with pytest.raises(OutputExistsError):
        publish(str(home / "run"), target)


def test_a_run_of_an_earlier_version_says_that_it_did_not_note_its_cells(home, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for path in (home / "run").glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    args = json.loads((copy / "args.json").read_text())
    del args["scshards"]["shards"]
    (copy / "args.json").write_text(json.dumps(args))
    publish(str(copy), tmp_path / "model")
    assert "did not write down on which cells" in card(tmp_path / "model")[1]


STATE = {
    "a": torch.arange(6.0).view(2, 3),
    "b.c": torch.tensor(3),
    "half": torch.ones(5).to(torch.bfloat16),
    "none": torch.zeros(0, 4),
}


def test_tensors_come_back_to_the_bit_and_other_libraries_read_them(tmp_path):
    data = write_tensors(STATE)
    found = read_tensors(data, "m")
    theirs = safetensors.torch.load(data)
    for name, tensor in STATE.items():
        assert found[name].equal(tensor) and found[name].dtype == tensor.dtype
        assert theirs[name].equal(tensor)
    assert read_tensors(safetensors.torch.save(STATE), "m").keys() == STATE.keys(), "without a sum"


def test_each_flipped_bit_is_refused_or_changes_no_tensor():
    data = write_tensors(STATE)
    refused = 0
    for at in range(len(data)):
        for bit in (0, 6):
            spoiled = bytearray(data)
            spoiled[at] ^= 1 << bit
            try:
                found = read_tensors(bytes(spoiled), "m")
            except CheckpointError as e:
                assert e.where == "m" and e.advice
                refused += 1
                continue
            assert found.keys() == STATE.keys(), at
            assert all(t.equal(found[n]) and t.dtype == found[n].dtype for n, t in STATE.items()), (
                at
            )
    assert refused > len(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"encoder.enc_norm.bias": torch.full((16,), torch.nan)}, "not finite"),
        (lambda s: s | {"encoder.enc_norm.bias": torch.zeros(4)}, r"\[4\] instead of \[16\]"),
        (lambda s: s | {"encoder.enc_norm.bias": torch.zeros(16).long()}, "int64 instead of"),
        (lambda s: {n: t for n, t in s.items() if "enc_norm" not in n}, "missing: encoder"),
        (lambda s: s | {"x": torch.zeros(2).to(torch.float8_e4m3fn)}, "float8"),
        (lambda s: s | {"more": torch.zeros(2)}, "unexpected: more"),
    ],
)
def test_tensors_of_others_are_bounded_as_those_of_best_model(home, tmp_path, change, said):
    for name in ("args.json", "vocab.json"):
        (tmp_path / name).write_bytes((home / "model" / name).read_bytes())
    state = safetensors.torch.load_file(home / "model" / "model.safetensors")
    safetensors.torch.save_file(change(state), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said) as e:
        load_model(str(tmp_path))
    assert "model.safetensors" in str(e.value)


def test_best_model_goes_before_and_one_of_them_is_needed(home, tmp_path):
    loaded = load_model(str(home / "model"))
    write_folder(str(tmp_path), loaded.model, loaded.vocab)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    load_model(str(tmp_path))
    (tmp_path / "best_model.pt").unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks best_model\.pt"):
        load_model(str(tmp_path))

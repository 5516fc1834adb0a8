"""Damaged weights, and numbers that are not finite: refused by name wherever weights come in or go out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from finetune_support import pack_cells
from scipy.sparse import csr_matrix
from torch import Tensor
from train_support import small_batch, small_config, small_model, take

from scshards.applying.embed import embed as embed_cells
from scshards.applying.evaluate import Score, evaluate_run, validate
from scshards.base.errors import CheckpointError, ScshardsError
from scshards.cells.vocab import Vocab
from scshards.cli import annotate, embed, evaluate
from scshards.cli import train as train_command
from scshards.model.classes import CLASSES, write_names
from scshards.model.config import ModelConfig
from scshards.model.scgpt import write_folder
from scshards.model.transformer import CellModel
from scshards.ranks.ranks import Ranks
from scshards.tasks.finetune import IntegrateTask
from scshards.tasks.pretrain import MaskTask
from scshards.training import heldout
from scshards.training.heldout import Evaluated
from scshards.training.log.metrics import read_metrics
from scshards.training.loop import train
from scshards.training.save.checkpoint import Checkpoints, TrainState, complete
from scshards.training.save.store import INDEX
from scshards.training.step import Stepper

ALONE = Ranks(0, 1, torch.device("cpu"))
GENES = [f"G{i:02d}" for i in range(60)]
WEIGHT = "transformer_encoder.layers.0.linear1.weight"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack_cells(tmp_path_factory.mktemp("cells"), n=120)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """An annotator of two steps: what every command here takes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = small_config("task.name=annotate", "task.label=kind", "run.steps=2")
    train(shards, folder, config, shown=False)
    return folder


@pytest.fixture
def spoilt(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "spoilt"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = torch.load(folder / "best_model.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "best_model.pt")


def flip(folder: Path) -> None:
    """One bit of one weight: the highest of its exponent."""
    file = folder / "best_model.pt"
    data = bytearray(file.read_bytes())
    raw = torch.load(file, weights_only=True)[WEIGHT].numpy().tobytes()
    data[data.index(raw) + 3] ^= 0x40
    file.write_bytes(data)
    assert not torch.load(file, weights_only=True)[WEIGHT].abs().max() < 1e9, "torch says nothing"


def nan(folder: Path) -> None:
    edit(folder, lambda state: state[WEIGHT][1].fill_(torch.nan))


@pytest.mark.parametrize(
    ("damage", "said"), [(flip, "don't have their checksum"), (nan, f"infinity in {WEIGHT}")]
)
@pytest.mark.parametrize("verb", ["embed", "annotate", "evaluate", "train"])
def test_every_command_refuses_damaged_weights(
    spoilt: Path,
    shards: str,
    tmp_path: Path,
    verb: str,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    damage(spoilt)
    before = sorted(p.name for p in spoilt.iterdir())
    out = tmp_path / "out"
    start = ["--task", "annotate", "--set", "task.label=kind", "--set", f"task.start={spoilt}"]
    command, given = {
        "embed": (embed.command, [str(spoilt), shards, "-o", str(out)]),
        "annotate": (annotate.command, [str(spoilt), shards, "-o", str(out)]),
        "evaluate": (evaluate.command, [str(spoilt), shards]),
        "train": (train_command.command, [shards, "-o", str(out), *start]),
    }[verb]
    result = CliRunner().invoke(command, given)
    assert isinstance(result.exception, CheckpointError), result.output
    assert said in str(result.exception) and "best_model.pt" in str(result.exception.where)
    assert not out.exists()
    assert sorted(p.name for p in spoilt.iterdir()) == before


@pytest.mark.parametrize("verb", ["embed", "annotate"])
@pytest.mark.parametrize("kind", ["source", "shards"])
def test_results_that_are_not_finite_are_refused(
    tmp_path: Path, shards: str, verb: str, kind: str
) -> None:
    vocab = Vocab.from_genes(GENES)
    config = ModelConfig(
        n_tokens=len(vocab), pad_id=vocab.pad_id, d_model=16, n_heads=2, d_hid=16, n_layers=1,
        n_classes=2, max_length=80,
    )  # fmt: skip
    model = CellModel(config, seed=1)
    with torch.no_grad():
        model.encoder.embedding.weight[vocab["G07"]] = 3e38  # finite, but not its sum
    write_folder(str(tmp_path / "model"), model, vocab.to_dict())
    write_names(tmp_path / "model", CLASSES, "kind", ["a", "b"])
    counts = np.zeros((30, 60), np.float32)
    counts[:, 3] = 2
    counts[21, 7] = 1
    cells = anndata.AnnData(csr_matrix(counts))
    cells.var_names = GENES
    cells.write_h5ad(tmp_path / "in.h5ad")
    given = str(tmp_path / "in.h5ad") if kind == "source" else shards
    where = "in.h5ad, row 21" if kind == "source" else "cell 000000-"
    command = {"embed": embed.command, "annotate": annotate.command}[verb]
    result = CliRunner().invoke(
        command, [str(tmp_path / "model"), given, "-o", str(tmp_path / "out")]
    )
    assert isinstance(result.exception, ScshardsError), result.output
    assert "NaN or infinity" in str(result.exception) and where in str(result.exception.where)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5ad", "model"]
    # The others are embedded as ever.
    anndata.read_h5ad(tmp_path / "in.h5ad")[:21].copy().write_h5ad(tmp_path / "fine.h5ad")
    embed_cells(
        str(tmp_path / "model"), str(tmp_path / "fine.h5ad"), tmp_path / "out.h5ad", shown=False
    )


def test_an_evaluation_that_is_not_finite_names_the_cells(spoilt: Path, shards: str) -> None:
    edit(spoilt, lambda state: state["encoder.embedding.weight"][7].fill_(3e38))
    before = (spoilt / "evaluation.json").exists()
    with pytest.raises(ScshardsError, match=r"NaN or infinity for the cells 000000-\d{10}"):
        evaluate_run(str(spoilt), shards, shown=False)
    assert (spoilt / "evaluation.json").exists() == before


def test_the_cells_of_a_batch_that_are_not_finite_are_told_from_the_others() -> None:
    batches = [small_batch(4), small_batch(4, seed=1)]
    batches[1].values[2, 1] = torch.nan
    score = validate(MaskTask(small_model()), batches, ALONE)
    assert score is not None
    assert score.not_finite == ("000007-0000000002",)
    assert score.tables()["not_finite"] == ["000007-0000000002"]
    fine = validate(MaskTask(small_model()), batches[:1], ALONE)
    assert fine is not None and fine.not_finite == () and "not_finite" not in fine.tables()


def test_what_is_not_finite_is_never_the_best() -> None:
    def is_best(value: float, best: float | None, *cells: str, by: str = "loss") -> bool:
        found = Evaluated(line={}, figures={by: value}, not_finite=cells)
        return found.is_better_than({by: best}, by, ("masked_mse",))

    assert is_best(2.0, None) and is_best(2.0, 3.0) and is_best(2.0, 3.0, by="other/masked_mse")
    assert is_best(0.9, 0.8, by="accuracy") and not is_best(0.7, 0.8, by="accuracy")
    assert not is_best(2.0, 2.0) and not is_best(0.8, 0.8, by="other/accuracy")
    assert not is_best(torch.nan, None) and not is_best(torch.nan, 0.5, by="accuracy")
    assert not is_best(1.0, 2.0, "a"), "of some cell what it computes is not finite"
    # A run from before has such a best.
    assert is_best(2.0, torch.nan)


def test_a_run_goes_on_after_an_evaluation_that_is_not_finite(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def judged(*given: object, **more: object) -> Score | None:
        score = validate(*given, **more)
        assert score is not None
        seen.append(1)
        bad = {"loss": torch.nan, "terms": dict.fromkeys(score.terms, torch.nan)}
        first = dataclasses.replace(score, not_finite=("000000-0000000003",), **bad)
        return first if len(seen) == 1 else score

    monkeypatch.setattr(heldout, "validate", judged)
    summary = train(shards, tmp_path / "run", small_config())
    assert summary.step == summary.best_step == 20 and summary.best_loss < 1e9
    first, last = (m for m in read_metrics(tmp_path / "run/metrics.jsonl") if m["kind"] == "valid")
    assert first["masked_mse"] is None and first["not_finite"] == ["000000-0000000003"]
    assert (first["is_best"], last["is_best"]) == (False, True)
    assert "step 10: on held-out cells the model computes NaN" in capsys.readouterr().err


def test_a_step_that_is_left_out_leaves_running_statistics_as_they_were() -> None:
    model = small_model(n_domains=2, domain_norm=True)
    task = IntegrateTask(model, "batch", codes=[0, 1, 0, 1])
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    stepper = Stepper(
        task, sgd, small_config("optim.max_skipped=3"), ALONE, micro_batch=2, total_steps=9
    )
    before = {n: b.clone() for n, b in model.named_buffers()}
    bad = small_batch(4)
    bad.values[3, 1] = torch.nan  # in the second micro-batch: the first was measured already
    assert take(stepper, bad, 0).skip is not None
    after = dict(model.named_buffers())
    assert before.keys() == after.keys() and all(b.equal(after[n]) for n, b in before.items())
    assert take(stepper, small_batch(4), 1).skip is None
    assert not any(b.equal(after[n]) for n, b in before.items())


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    tensors = {"model/w": torch.ones(3), "model/n": torch.tensor(7), "optimizer/w/m": torch.ones(3)}
    with Checkpoints(tmp_path, ALONE, keep_last=1) as checkpoints:
        checkpoints.save(TrainState(step=1), tensors)
    tensors["optimizer/w/m"][1] = torch.inf
    with (
        pytest.raises(CheckpointError, match=r"after step 2 .* no checkpoint .*: optimizer/w/m\n"),
        Checkpoints(tmp_path, ALONE, keep_last=1) as checkpoints,
    ):
        checkpoints.save(TrainState(step=2), tensors)
    assert complete(tmp_path) == ["step-00000001"]


def test_a_checkpoint_that_is_not_finite_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"model/v": torch.ones(2), "model/w": torch.tensor([1.0, torch.nan])}
    with monkeypatch.context() as older:  # a version that did not look
        older.setattr("scshards.training.save.checkpoint.not_finite", lambda tensors: [])
        with Checkpoints(tmp_path, ALONE, keep_last=1) as checkpoints:
            checkpoints.save(TrainState(step=1), tensors)
    with pytest.raises(CheckpointError, match="NaN or infinity: model/w") as e:
        Checkpoints(tmp_path, ALONE, keep_last=1).load("step-00000001", tensors)
    assert "step-00000001" in str(e.value.where) and "remove this folder" in str(e.value.advice)


def test_pieces_that_are_not_all_of_a_tensor(tmp_path: Path) -> None:
    tensors = {"model/w": torch.ones(4, 3)}
    with Checkpoints(tmp_path, ALONE, keep_last=1) as checkpoints:
        checkpoints.save(TrainState(step=1), tensors)
    file = tmp_path / "step-00000001" / INDEX
    index = json.loads(file.read_text())
    index["tensors"]["model/w"]["pieces"] = []
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="the pieces of model/w are not all of it"):
        Checkpoints(tmp_path, ALONE, keep_last=1).load("step-00000001", tensors)

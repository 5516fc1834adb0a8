"""Fine-tuning on real cells beside simple methods; tools/finetune_real calls it.

sc_mixology's five cell lines on two CEL-seq2 plates: one has Ensembl ids, one symbols, and other genes.

    annotate    trained on one plate (singlets), tested on the other, beside logistic regression on
                log-normalised counts of the same cells and genes; both ways round
    integrate   both plates, avg_bio of the valid cells beside that of PCA

The genes are the 1,200 of highest variance (on the training plate; of integrate, on the first), weights
are fresh, and singlets alone are taken. All settings are below. Logistic regression sees all genes that
the two plates share.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from scshards.base.progress import table
from scshards.cells.vocab import Vocab
from scshards.pack.run import PackOptions, pack
from scshards.train.config import TrainConfig
from scshards.train.evaluate import Annotation, Evaluation, evaluate_run
from scshards.train.loop import train

PLATES = {
    "p1": "scmix_celseq2_5cl_p1_ensembl_csr.h5ad",
    "p2": "scmix_celseq2_5cl_p2_symbol_csr.h5ad",
}
N_GENES = 1200

SHARED = (
    "data.max_length=1201",
    "data.lanes=4",
    "model.d_model=64",
    "model.n_heads=4",
    "model.d_hid=64",
    "model.n_layers=1",
    "model.dropout=0.0",
    "run.device=cpu",
    "run.save_every=100000",
)
ANNOTATE = (
    "task.name=annotate",
    "task.label=line",
    "data.tie_break=random",
    "optim.lr=1e-3",
    "optim.weight_decay=0.1",
    "run.batch_size=8",
    "run.epochs=80",
    "run.eval_every=40",
)
INTEGRATE = (
    "task.name=integrate",
    "task.label=line",
    "task.domain=plate",
    "optim.lr=2e-3",
    "run.batch_size=16",
    "run.epochs=30",
    "run.eval_every=100000",
)


@dataclasses.dataclass(frozen=True)
class Row:
    what: str
    seed: int
    scores: tuple[str, str]
    seconds: float


def cells_of(file: Path, plate: str) -> anndata.AnnData:
    """The singlets of a file, symbols as names of genes, each once, and `line` and `plate` in obs."""
    cells = anndata.read_h5ad(file)
    if "feature_name" in cells.var:
        cells.var_names = cells.var["feature_name"].astype(str)
    cells = cells[:, ~cells.var_names.duplicated()].copy()
    cells = cells[cells.obs["demuxlet_cls"] == "SNG"].copy()
    kept = anndata.AnnData(cells.X, var=cells.var[[]])
    kept.obs_names = [f"{plate}-{i}" for i in range(kept.n_obs)]
    kept.obs["line"] = cells.obs["cell_line_demuxlet"].astype(str).to_numpy()
    kept.obs["plate"] = plate
    return kept


def log_normalised(cells: anndata.AnnData) -> np.ndarray:
    """log(1 + counts scaled to 10,000), float64 [cells, genes]."""
    counts = cells.X.toarray().astype(np.float64)
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def variable_genes(cells: anndata.AnnData) -> Vocab:
    """The genes of highest variance, which is what scGPT's fine-tuning takes too."""
    order = np.argsort(-log_normalised(cells).var(axis=0), kind="stable")[:N_GENES]
    return Vocab.from_genes(sorted(cells.var_names[order]))


def packed(
    folder: Path, name: str, inputs: list[anndata.AnnData], vocab: Vocab, valid: float
) -> str:
    """A shard set of these cells."""
    (folder / name).mkdir()
    for i, cells in enumerate(inputs):
        cells.write_h5ad(folder / name / f"{i}.h5ad")
    options = PackOptions(
        obs=("line", "plate"),
        valid_fraction=valid,
        cells_per_shard=100,
        workers=1,
        min_match=0.01,
    )
    pack(str(folder / name), str(folder / f"{name}.shards"), vocab, options, progress=False)
    return str(folder / f"{name}.shards")


def logistic(train_on: anndata.AnnData, test_on: anndata.AnnData) -> float:
    """Accuracy of logistic regression on log(1 + counts scaled to 10,000) of the shared genes."""
    genes = train_on.var_names.intersection(test_on.var_names)

    model = LogisticRegression(max_iter=2000).fit(
        log_normalised(train_on[:, genes]), train_on.obs["line"].astype(str)
    )
    return float(
        (model.predict(log_normalised(test_on[:, genes])) == test_on.obs["line"].astype(str)).mean()
    )


def run(shards: str, folder: Path, *settings: str) -> tuple[Path, float]:
    """A run, and its seconds."""
    began = time.perf_counter()
    train(shards, folder, TrainConfig.read(None, settings), shown=False)
    return folder, time.perf_counter() - began


def measure(data: Path, work: Path, seeds: int, fast: bool) -> list[Row]:
    """All figures."""
    plates = {name: cells_of(data / file, name) for name, file in PLATES.items()}
    rows = []

    def settings(task: tuple[str, ...], seed: int) -> list[str]:
        kept = [s for s in (*SHARED, *task) if not (fast and s.startswith("run.epochs"))]
        return [*kept, *(("run.steps=3",) if fast else ()), f"run.seed={seed}"]

    for trained, tested in (("p1", "p2"), ("p2", "p1")):
        home = work / f"from_{trained}"
        home.mkdir()
        vocab = variable_genes(plates[trained])
        training = packed(home, "train", [plates[trained]], vocab, 0.15)
        testing = packed(home, "test", [plates[tested]], vocab, 0.0)
        regression = logistic(plates[trained], plates[tested])
        for seed in range(seeds):
            fine, seconds = run(training, home / str(seed), *settings(ANNOTATE, seed))
            found = evaluate_run(str(fine), testing, split="train", device="cpu", shown=False)
            assert isinstance(found, Annotation)
            what = f"annotate {trained} to {tested}, {found.n_cells} cells: "
            model = (f"{found.accuracy:.4f}", f"{regression:.4f}")
            rows.append(Row(what + "accuracy", seed, model, seconds))
            rows.append(Row(what + "macro F1", seed, (f"{found.macro_f1:.4f}", ""), seconds))
    both = packed(work, "both", list(plates.values()), variable_genes(plates["p1"]), 0.4)
    for seed in range(seeds):
        fine, seconds = run(both, work / str(seed), *settings(INTEGRATE, seed))
        scored = evaluate_run(str(fine), both, device="cpu", shown=False)
        assert isinstance(scored, Evaluation)
        f: dict[str, Any] = scored.figures
        for name in ("avg_bio", "nmi", "ari", "asw", "asw_domain"):
            what = f"integrate, {f['metric_cells']} valid cells: {name}"
            found_and_pca = (f"{f[name]:.4f}", f"{f[f'pca_{name}']:.4f}")
            rows.append(Row(what, seed, found_and_pca, seconds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="tools/finetune_real")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="three steps of each: does it run?")
    options = parser.parse_args()
    data = os.environ.get("SCSHARDS_REAL_DATA")
    if not data:
        raise SystemExit("set SCSHARDS_REAL_DATA to the folder with the h5ad files")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(Path(data), Path(work), options.seeds, options.fast)
    lines = [(r.what, r.seed, *r.scores, f"{r.seconds:.0f} s") for r in rows]
    print(table(("task", "seed", "scshards", "logistic regression / PCA", "training"), lines))


if __name__ == "__main__":
    main()

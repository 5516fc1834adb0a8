"""Fine-tuning on real cells beside simple methods; tools/finetune_real calls it.

sc_mixology's cell lines, in six files with other genes each: two CEL-seq2 plates of five lines (p1 has
Ensembl ids, p2 symbols; singlets alone are taken), and four plates of mixtures of three of the lines, of
which the wells with cells of one line are taken (mix).

    annotate    trained on some files, tested on others, beside logistic regression on log-normalised
                counts of the same cells
    integrate   p1 and p2, avg_bio of held-out cells beside that of PCA

    fresh       from fresh weights
    full        from a model pretrained on the same train cells: all weights are trained
    frozen      from that model: what makes a cell embedding is frozen
    lora        from that model: frozen, with adapters

All settings are below. Those of fresh annotate were chosen on p1 to p2 and p2 to p1; after a first look
at mix, with 600 steps, the 60 epochs that had been chosen there were taken for all. Those of integrate
were chosen with seed 0, while looking at avg_bio of these held-out cells. Pretraining has integrate's
data and optimizer for both tasks, chosen on p1 to p2: with fresh annotate's data that model learnt no
more than each gene's mean, embedded all cells alike, and a linear probe of it was right by chance.

In fresh annotate the model knows the 1,200 genes of highest variance among those that all training files
measure, whether the tested files measure them or not; elsewhere it knows 300, and sees which are 0.
Logistic regression sees all genes that all files in question share, PCA the 300 of integrate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from scshards.applying.annotate import annotate
from scshards.applying.evaluate import Evaluation, evaluate_run
from scshards.applying.options import AnnotateOptions
from scshards.cells.vocab import Vocab
from scshards.packing.pack import PackOptions, pack
from scshards.training.config import TrainConfig
from scshards.training.loop import train

PLATES = {
    "p1": "scmix_celseq2_5cl_p1_ensembl_csr.h5ad",
    "p2": "scmix_celseq2_5cl_p2_symbol_csr.h5ad",
}
MIXTURES = [f"scmix_cellmix{i}_ensembl_csr.h5ad" for i in (1, 2, 3, 4)]
MIXED_LINES = ["H1975", "H2228", "HCC827"]
"""Columns of obs of the mixtures: how many cells of each line a well has."""

FOLDS = (
    (("p1",), "p2"),
    (("p2",), "p1"),
    (("p1", "p2"), "mix"),
    (("p1", "mix"), "p2"),
    (("p2", "mix"), "p1"),
)
"""What annotate is trained and tested on."""

N_GENES, N_INTEGRATED = 1200, 300
"""Genes of annotate and integrate."""

SHARED = (
    "data.lanes=4",
    "model.d_model=64",
    "model.n_heads=4",
    "model.d_hid=64",
    "model.n_layers=1",
    "model.dropout=0.0",
    "run.device=cpu",
    "run.batch_size=16",
    "run.eval_every=100000",
    "run.save_every=100000",
)
ANNOTATE = (
    "task.name=annotate",
    "task.label=line",
    # Each cell comes as another 300 of its genes every time, so that none can be relied on alone.
    # Annotating then shows all of them.
    "data.max_length=301",
    "data.tie_break=random",
    "model.mvc=false",
    "optim.lr=1e-3",
    "run.epochs=60",
)
INTEGRATE = (
    "task.name=integrate",
    "task.label=line",
    "task.domain=plate",
    # Cells see every gene, as in scGPT's integration: which ones are 0 tells lines apart best.
    f"data.max_length={2 * N_INTEGRATED + 1}",
    f"data.include_zero_genes={N_INTEGRATED}",
    "model.explicit_zero_prob=true",
    # Elastic similarity is left out: with it (weight 10) seed 0 has the same avg_bio to 0.002.
    "task.similarity_weight=0",
    "optim.lr=3e-3",
    "optim.clip=10",
    "optim.schedule=wsd",
    "run.steps=1000",
)


PRETRAIN = tuple(s for s in INTEGRATE if not s.startswith("task."))
"""Of the model that full, frozen and lora start from, one for each shard set, of seed 0."""

STARTED = {
    "annotate": (
        *(s for s in ANNOTATE if s.startswith("task.")),
        *(s for s in INTEGRATE if s.startswith("data.")),
        "model.mvc=false",
        "optim.lr=1e-3",
        "run.epochs=30",
    ),
    "integrate": INTEGRATE,
}
"""What is done with that model."""

PRETRAINED = "pretrained"
"""What its row is called."""

FREEZE = 'optim.freeze=["encoder", "value_encoder", "transformer_encoder"]'
VARIANTS: dict[str, tuple[str, ...]] = {
    "fresh": (),
    "full": (),
    "frozen": (FREEZE, "optim.lr=3e-3"),
    "lora": ("optim.lora_rank=8", "optim.lora_feed_forward=true", "optim.lr=3e-3"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A run that is done: its folder, how many parameters were trained, in which time."""

    folder: Path
    trained: int
    seconds: float


def singlets(file: Path, plate: str) -> anndata.AnnData:
    """The singlets of a plate of five lines."""
    cells = anndata.read_h5ad(file)
    kept = cells[cells.obs["demuxlet_cls"] == "SNG"]
    return prepared(kept, kept.obs["cell_line_demuxlet"].astype(str).to_numpy(), plate)


def pure_wells(file: Path, plate: str) -> anndata.AnnData:
    """The wells of a plate of mixtures whose cells are all of one line."""
    cells = anndata.read_h5ad(file)
    per_line = cells.obs[MIXED_LINES].to_numpy()
    pure = (per_line > 0).sum(axis=1) == 1
    return prepared(cells[pure], np.array(MIXED_LINES)[per_line[pure].argmax(axis=1)], plate)


def prepared(cells: anndata.AnnData, lines: np.ndarray, plate: str) -> anndata.AnnData:
    """Symbols as names of genes, each once, and `line` and `plate` in obs."""
    cells = cells.copy()
    if "feature_name" in cells.var:
        cells.var_names = cells.var["feature_name"].astype(str)
    cells = cells[:, ~cells.var_names.duplicated()]
    kept = anndata.AnnData(cells.X.copy(), var=cells.var[[]])
    kept.obs_names = [f"{plate}-{i}" for i in range(kept.n_obs)]
    kept.obs["line"] = lines
    kept.obs["plate"] = plate
    return kept


def log_normalised(cells: anndata.AnnData) -> np.ndarray:
    """log(1 + counts scaled to 10,000), float64 [cells, genes]."""
    counts = cells.X.toarray().astype(np.float64)
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def shared_genes(files: list[anndata.AnnData]) -> anndata.AnnData:
    """All cells of the files, with the genes that each of them has."""
    return anndata.concat(files, join="inner")


def variable_genes(files: list[anndata.AnnData], n: int) -> Vocab:
    """Of the genes that all files have, those of highest variance; so does scGPT."""
    cells = shared_genes(files)
    order = np.argsort(-log_normalised(cells).var(axis=0), kind="stable")[:n]
    return Vocab.from_genes(sorted(cells.var_names[order]))


def written(folder: Path, files: list[anndata.AnnData]) -> list[str]:
    """The files as h5ad in a folder; those that are there stay, as what is packed of them does."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.h5ad" for i in range(len(files))]
    for path, cells in zip(paths, files, strict=True):
        if not path.exists():
            cells.write_h5ad(path)
    return list(map(str, paths))


def packed(folder: Path, files: list[anndata.AnnData], vocab: Vocab, valid: float) -> str:
    """A shard set of these cells."""
    options = PackOptions(
        obs=("line", "plate"),
        valid_fraction=valid,
        cells_per_shard=100,
        workers=1,
        min_match=0.01,
    )
    pack(written(folder / "files", files), str(folder / "shards"), vocab, options, progress=False)
    return str(folder / "shards")


def logistic(
    train_on: list[anndata.AnnData], test_on: list[anndata.AnnData]
) -> tuple[float, float]:
    """Accuracy and macro F1 of logistic regression on log(1 + counts scaled to 10,000)."""
    genes = shared_genes([*train_on, *test_on]).var_names
    fit, test = (shared_genes(files)[:, genes] for files in (train_on, test_on))
    model = LogisticRegression(max_iter=2000).fit(log_normalised(fit), fit.obs["line"].astype(str))
    return compared(test.obs["line"].astype(str), model.predict(log_normalised(test)))


def compared(truth: Any, said: Any) -> tuple[float, float]:
    """Accuracy, and the mean F1 over the classes that a cell has or is given."""
    truth, said = np.asarray(truth), np.asarray(said)
    return float((truth == said).mean()), float(f1_score(truth, said, average="macro"))


def annotated(run_folder: Path, files: list[str]) -> tuple[Any, Any]:
    """The lines of the files' cells, and what `scshards annotate` says of them, shown all genes."""
    options = AnnotateOptions(max_length=N_GENES + 1, min_match=0.01, device="cpu", threads=1)
    truth, said = [], []
    for i, file in enumerate(files):
        out = run_folder / f"annotated{i}.h5ad"
        out.unlink(missing_ok=True)
        annotate(str(run_folder), file, out, options, shown=False)
        obs = anndata.read_h5ad(out).obs
        truth += obs["line"].astype(str).tolist()
        said += obs["predicted_line"].astype(str).tolist()
    return truth, said


def run(shards: str, folder: Path, *settings: str) -> Made:
    """A run, which goes on, or is left as it is, where it is there already."""
    done = train(shards, folder, TrainConfig.read(None, settings), shown=False)
    return Made(folder=folder, trained=done.trained, seconds=done.seconds)


def fitted(task: str, shards: str, home: Path, variant: str, seed: int, fast: bool) -> Made:
    """The model of a task and a variant."""
    if variant == PRETRAINED:
        return run(shards, home / PRETRAINED, *settings(PRETRAIN, 0, fast))
    own = {"annotate": ANNOTATE, "integrate": INTEGRATE}[task]
    if variant != "fresh":
        start = fitted(task, shards, home, PRETRAINED, 0, fast).folder
        own = (*STARTED[task], f"task.start={start}")
    more = VARIANTS[variant]
    return run(shards, home / variant / str(seed), *settings((*own, *more), seed, fast))


def settings(task: tuple[str, ...], seed: int, fast: bool) -> list[str]:
    """All settings of a run."""
    kept = [s for s in (*SHARED, *task) if not (fast and s.startswith(("run.steps", "run.epochs")))]
    return [*kept, *(("run.steps=3",) if fast else ()), f"run.seed={seed}"]


def annotation(
    files: dict[str, list[anndata.AnnData]], work: Path, asked: argparse.Namespace
) -> list[tuple[object, ...]]:
    """Accuracy and macro F1 of each fold and variant, over all seeds."""
    rows: list[tuple[object, ...]] = []
    for names, tested in [FOLDS[i] for i in asked.fold or range(len(FOLDS))]:
        train_on, test_on = [f for name in names for f in files[name]], files[tested]
        home = work / f"{'_'.join(names)}_to_{tested}"
        many, few = (
            packed(home / f"{n} genes", train_on, variable_genes(train_on, n), 0.0)
            for n in (N_GENES, N_INTEGRATED)
        )
        test_files = written(home / "test", test_on)
        what = (
            f"{' + '.join(names)}, {tested}",
            f"{sum(f.n_obs for f in train_on)}, {sum(f.n_obs for f in test_on)}",
        )
        for variant in asked.variant or VARIANTS:
            found, made = [], []
            for seed in range(asked.seeds):
                shards = many if variant == "fresh" else few
                made.append(fitted("annotate", shards, home, variant, seed, asked.fast))
                found.append(compared(*annotated(made[-1].folder, test_files)))
            accuracies = ", ".join(f"{accuracy:.3f}" for accuracy, _ in found)
            lowest = f"{min(f1 for _, f1 in found):.3f}"
            rows.append((*what, variant, *cost(made), accuracies, lowest))
        if (home / PRETRAINED).exists():
            made = [fitted("annotate", few, home, PRETRAINED, 0, asked.fast)]
            rows.append((*what, PRETRAINED, *cost(made), "", ""))
        accuracy, f1 = logistic(train_on, test_on)
        rows.append((*what, "logistic regression", "", "", f"{accuracy:.3f}", f"{f1:.3f}"))
        told([row for row in rows if row[:2] == what])
    return rows


def integration(
    plates: list[anndata.AnnData], work: Path, asked: argparse.Namespace
) -> list[tuple[object, ...]]:
    """avg_bio and what it is made of, of each variant and seed."""
    rows: list[tuple[object, ...]] = []
    home = work / "both"
    shards = packed(home, plates, variable_genes(plates, N_INTEGRATED), 0.4)
    names = ("avg_bio", "nmi", "ari", "asw", "asw_domain")
    pca: tuple[str, ...] = ()
    for variant in asked.variant or VARIANTS:
        for seed in range(asked.seeds):
            made = fitted("integrate", shards, home, variant, seed, asked.fast)
            scored = evaluate_run(str(made.folder), shards, device="cpu", shown=False)
            assert isinstance(scored, Evaluation)
            f: dict[str, Any] = scored.figures
            rows.append((variant, seed, *cost([made]), *(f"{f[name]:.3f}" for name in names)))
            pca = tuple(f"{f[f'pca_{name}']:.3f}" for name in names)
            told(rows[-1:])
    if (home / PRETRAINED).exists():
        made = fitted("integrate", shards, home, PRETRAINED, 0, asked.fast)
        rows.append((PRETRAINED, 0, *cost([made]), *("" for _ in names)))
    return [*rows, ("PCA", "", "", "", *pca)]


def cost(made: list[Made]) -> tuple[str, str]:
    """Parameters that were trained; seconds of training, the least and the most."""
    least, most = (f(round(m.seconds) for m in made) for f in (min, max))
    seconds = f"{least} s" if least == most else f"{least} to {most} s"
    return f"{made[0].trained:,}", seconds


def told(rows: list[tuple[object, ...]]) -> None:
    """Rows as soon as they are known, on standard error."""
    for row in rows:
        print(*row, sep=" | ", file=sys.stderr)


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="tools/finetune_real")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=("annotate", "integrate"), help="one of them only")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="some of them only")
    folds = range(len(FOLDS))
    parser.add_argument("--fold", type=int, choices=folds, action="append", help="as in FOLDS")
    parser.add_argument("--work", type=Path, help="keep runs here, and take those that are there")
    parser.add_argument("--fast", action="store_true", help="three steps of each: does it run?")
    asked = parser.parse_args()
    data = Path(os.environ.get("SCSHARDS_REAL_DATA") or "")
    if not os.environ.get("SCSHARDS_REAL_DATA"):
        raise SystemExit("set SCSHARDS_REAL_DATA to the folder with the h5ad files")
    torch.set_num_threads(1)
    files = {name: [singlets(data / file, name)] for name, file in PLATES.items()}
    files["mix"] = [pure_wells(data / file, f"mix{i}") for i, file in enumerate(MIXTURES)]
    with contextlib.ExitStack() as stack:
        work = asked.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if asked.task != "integrate":
            rows = annotation(files, work, asked)
            scores = ("accuracy, by seed", "macro F1, lowest")
            about = ("trained on, tested on", "cells", "variant", "trained", "training")
            print(table((*about, *scores), rows), end="\n\n")
        if asked.task != "annotate":
            scores = ("avg_bio", "NMI", "ARI", "ASW", "asw_domain")
            rows = integration([*files["p1"], *files["p2"]], work, asked)
            print(table(("variant", "seed", "trained", "training", *scores), rows))


if __name__ == "__main__":
    main()

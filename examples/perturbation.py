"""A perturbation model on sets of cells: what a perturbation does in a line where nobody has tried it.

    python examples/perturbation.py -o run-perturbation

Makes cells of some lines under some perturbations, packs them sorted by both, holds out some pairs of
line and perturbation, trains a small model on sets beside their controls, and predicts the mean response
of the pairs that were held out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from scshards import (
    CellLoader,
    CollateOptions,
    PackOptions,
    ReadOptions,
    SetBatch,
    SetOptions,
    Vocab,
)
from scshards.packing.pack import pack

CONTROL = "non-targeting"
GENES, SIZE = 200, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a folder for cells and shards"
    )
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shards, lines, perturbations = args.out / "shards", 6, 20
    if not (shards / "manifest.json").exists():
        make_cells(args.out / "cells.h5ad", lines, perturbations, cells=160)
        options = PackOptions(
            obs=("cell_line", "perturbation", "batch"), shuffle=False, cells_per_shard=2000, workers=1
        )  # fmt: skip
        vocab = Vocab.from_genes([f"G{i:03d}" for i in range(GENES)])
        pack([args.out / "cells.h5ad"], shards, vocab, options, progress=False)
    # Each line lacks two perturbations, which all other lines have; cell-load's TOML says which.
    splits = args.out / "splits.toml"
    splits.write_text(
        "".join(
            f"[fewshot.line{i}]\ntest = ['P{2 * i + 1:02d}', 'P{2 * i + 2:02d}']\n"
            for i in range(lines)
        )
    )

    def loader(part: str, **options: object) -> CellLoader:
        sets = SetOptions(
            by=["cell_line", "perturbation"], size=SIZE, control=CONTROL, match=["cell_line", "batch"],
            holdout=splits, part=part,
        )  # fmt: skip
        collate = CollateOptions(objective="counts")
        return CellLoader(shards, sets=sets, collate=collate, read=ReadOptions(lanes=16), **options)

    train = loader("train", batch_size=8)
    test = loader("test", batch_size=8, drop_last=False, fixed_epoch=True)
    trained = f"{train.sets.groups} pairs to train on, {train.sets.sets} sets"
    print(f"{trained}; {test.sets.groups} held out")

    torch.manual_seed(0)
    model = ResponseModel(len(train.labels["perturbation"].categories))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(train) * args.epochs)
    for epoch in range(args.epochs):
        losses = []
        for batch in train:
            predicted_SG = model(batch)
            loss = (predicted_SG - response(batch)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: {len(losses)} batches, loss {np.mean(losses):.4f}")

    model.eval()
    seen = mean_responses(train, model)
    held = mean_responses(test, model)

    def mean_of(line: str | None = None, perturbation: str | None = None) -> np.ndarray:
        """The mean response of the training pairs of a line, or of a perturbation."""
        mine = [x for (a, b), (x, _) in seen.items() if line == a or perturbation == b]
        return np.mean(mine, axis=0)

    print(f"mean response of {len(held)} held-out pairs: correlation over genes, squared error")
    for name, predicted in (
        ("model", [guess for _, guess in held.values()]),
        ("mean of the line's training perturbations", [mean_of(line=line) for line, _ in held]),
        ("mean of the perturbation in other lines", [mean_of(perturbation=p) for _, p in held]),
    ):
        true = [x for x, _ in held.values()]
        r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(true, predicted, strict=True)])
        error = np.mean([np.square(a - b).mean() for a, b in zip(true, predicted, strict=True)])
        print(f"{name}: {r:.3f}, {error:.5f}")


class ResponseModel(nn.Module):
    """The mean change of log expression that a perturbation makes, from controls and its identity."""

    def __init__(self, perturbations: int, width: int = 64) -> None:
        super().__init__()
        self.identity = nn.Embedding(perturbations, width)
        self.state = nn.Sequential(nn.Linear(GENES, width), nn.GELU())
        self.change = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, GENES)
        )

    def forward(self, batch: SetBatch) -> Tensor:
        """The response of each set, float32 [S, G]."""
        state_SW = (
            self.state(log_expression(batch.controls)).view(len(batch), batch.size, -1).mean(1)
        )
        identity_SW = self.identity(batch.groups["perturbation"].clamp(min=0))
        return self.change(torch.cat([state_SW, identity_SW], dim=1))


def log_expression(cells: object) -> Tensor:
    """log(1 + counts per thousand), float32 [cells, G]."""
    scale_B1 = 1e3 / cells.library.clamp(min=1)[:, None]
    return torch.log1p(cells.dense() * scale_B1)


def response(batch: SetBatch) -> Tensor:
    """What the perturbation did to the mean of each set, float32 [S, G]."""
    own, beside = (
        log_expression(x).view(len(batch), batch.size, -1).mean(1)
        for x in (batch.cells, batch.controls)
    )
    return own - beside


def mean_responses(loader: CellLoader, model: nn.Module) -> dict[tuple[str, str], tuple]:
    """{(line, perturbation): the mean response of its sets, and what the model makes of them}."""
    found = defaultdict(list)
    with torch.no_grad():
        for batch in loader:
            true, guess = response(batch).numpy(), model(batch).numpy()
            names = zip(*(batch.groups.text(x) for x in ("cell_line", "perturbation")), strict=True)
            for i, name in enumerate(names):
                if batch.weight[i]:  # not one that only fills up the last batch
                    found[name].append((true[i], guess[i]))
    return {name: tuple(np.mean(x, axis=0)) for name, x in sorted(found.items())}


def make_cells(path: Path, lines: int, perturbations: int, cells: int) -> None:
    """Cells whose perturbations change genes' logs as much in every line, and a little more or less."""
    rng = np.random.default_rng(0)
    of_line = rng.normal(0, 1, (lines, GENES))
    changes = rng.normal(0, 0.8, (perturbations + 1, GENES))
    changes[rng.random(changes.shape) < 0.85] = 0
    changes[0] = 0
    counts, obs = [], []
    for line in range(lines):
        for p in range(perturbations + 1):
            n = cells * 3 if p == 0 else cells
            batch = rng.integers(0, 3, n)
            noise = rng.normal(0, 0.05, GENES) * (p > 0)
            logs = (
                of_line[line] + changes[p] + noise + 0.1 * batch[:, None] * np.sin(np.arange(GENES))
            )
            logs = logs + rng.normal(0, 0.3, (n, GENES))
            rates = np.exp(logs)
            rates *= rng.lognormal(7.3, 0.3, (n, 1)) / rates.sum(axis=1, keepdims=True)
            counts.append(sp.csr_matrix(rng.poisson(rates), dtype=np.float32))
            name = CONTROL if p == 0 else f"P{p:02d}"
            obs += [(f"line{line}", name, f"b{b}") for b in batch]
    frame = pd.DataFrame(obs, columns=["cell_line", "perturbation", "batch"], dtype="category")
    frame.index = frame.index.astype(str)
    genes = pd.DataFrame(index=[f"G{i:03d}" for i in range(GENES)])
    anndata.AnnData(sp.vstack(counts).tocsr(), obs=frame, var=genes).write_h5ad(path)


if __name__ == "__main__":
    main()

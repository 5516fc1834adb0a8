"""scvi-tools trains its SCVI on CellLoader: raw counts of variable genes, streamed from a shard set.

    python examples/scvi_model.py shards --batch donor                # pip install "scshards[examples]"
    python examples/scvi_model.py shards --batch donor --beside       # and from memory, for comparison

The data module is what `SCVI.train(datamodule=...)` takes. Cells come as small integers and become dense
on the device that trains. With --beside the same cells, genes and splits are exported to AnnData, and
scvi-tools' own loader trains another model on them: both end at the same loss, but for chance.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import lightning.pytorch as pl
import numpy as np
import scvi
import torch

from scshards import (
    CellLoader,
    CollateOptions,
    CountsBatch,
    ExportOptions,
    ShardSet,
    export,
    variable_genes,
)


class Cells(pl.LightningDataModule):
    """The streams of a shard set, and what SCVI asks of a data module.

    Parameters
    ----------
    root
        A shard set with the splits train and valid.
    genes
        Those that the model sees.
    batch
        The label of categories that the model is to correct for.
    batch_size
        Cells of a batch, on each rank.
    """

    def __init__(self, root: str, genes: list[str], batch: str, batch_size: int = 128) -> None:
        super().__init__()
        self.root, self.batch = root, batch
        collate = CollateOptions(objective="counts", genes=tuple(genes))
        self.options: dict[str, Any] = {"batch_size": batch_size, "collate": collate}
        manifest = ShardSet(root).manifest
        self.categories = list(manifest.labels[batch].categories)
        self.n_obs, self.n_vars = manifest.cells("train"), len(genes)
        self.n_batch = len(self.categories)
        self.genes = np.array(genes)

    def train_dataloader(self) -> CellLoader:
        return CellLoader(self.root, split="train", **self.options)

    def val_dataloader(self) -> CellLoader:
        once = {"shuffle": False, "drop_last": False, "fixed_epoch": True}
        return CellLoader(self.root, split="valid", **self.options, **once)

    def on_after_batch_transfer(self, batch: CountsBatch, _: int) -> dict[str, torch.Tensor]:
        """What SCVI's module takes, on the device where the batch is."""
        x, codes = batch.dense(), batch.labels[self.batch][:, None]
        if not self.trainer.training and bool((batch.weight == 0).any()):
            # Rows that only fill up the last batch: scvi-tools counts every row as a cell.
            x, codes = x[batch.weight > 0], codes[batch.weight > 0]
        return {"X": x, "batch": codes, "labels": torch.zeros_like(codes)}

    def embedding(self, split: str, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """The cells of a split, once each, for `SCVI.get_latent_representation(dataloader=...)`."""
        once = {"shuffle": False, "drop_last": False, "fixed_epoch": True}
        for batch in CellLoader(self.root, split=split, **self.options, **once):
            here = batch.to(device)
            is_cell = here.weight > 0
            codes = here.labels[self.batch][:, None][is_cell]
            yield {"X": here.dense()[is_cell], "batch": codes, "labels": torch.zeros_like(codes)}

    @property
    def registry(self) -> dict[str, Any]:
        """What SCVI knows of its data: the shape that scvi-tools' own data modules give it."""
        none: dict[str, Any] = {"data_registry": {}, "state_registry": {}, "summary_stats": {}}

        def of_obs(key: str, **state: Any) -> dict[str, Any]:
            return {
                "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{key}"},
                "state_registry": state,
            }

        codes = of_obs(
            "batch", categorical_mapping=np.array(self.categories), original_key=self.batch
        )
        labels = of_obs("labels", categorical_mapping=np.array([0]), original_key=None)
        genes = {"n_obs": self.n_obs, "n_vars": self.n_vars, "column_names": self.genes}
        return {
            "scvi_version": scvi.__version__,
            "model_name": "SCVI",
            "setup_args": {
                "layer": None,
                "batch_key": self.batch,
                "labels_key": None,
                "size_factor_key": None,
                "categorical_covariate_keys": None,
                "continuous_covariate_keys": None,
            },
            "field_registries": {
                "X": {
                    "data_registry": {"attr_name": "X", "attr_key": None},
                    "state_registry": genes,
                    "summary_stats": {"n_vars": self.n_vars, "n_cells": self.n_obs},
                },
                "batch": codes | {"summary_stats": {"n_batch": self.n_batch}},
                "labels": labels | {"summary_stats": {"n_labels": 1}},
                "size_factor": none,
                "extra_categorical_covs": none | {"summary_stats": {"n_extra_categorical_covs": 0}},
                "extra_continuous_covs": none | {"summary_stats": {"n_extra_continuous_covs": 0}},
            },
            "setup_method_name": "setup_datamodule",
        }


def train(model: scvi.model.SCVI, epochs: int, **data: Any) -> float:
    """The loss on held-out cells, minus the ELBO of each on average, after so many epochs."""
    model.train(
        max_epochs=epochs,
        accelerator="cpu",
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        logger=None,
        **data,
    )
    return float(np.ravel(model.history["elbo_validation"].iloc[-1])[0])


def in_memory(root: str, genes: list[str]) -> tuple[anndata.AnnData, list[np.ndarray]]:
    """The cells of both splits as AnnData, and the rows of each."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for split in ("train", "valid"):
            file = Path(folder) / f"{split}.h5ad"
            export(root, file, ExportOptions(to="h5ad", splits=(split,)), progress=False)
            parts.append(anndata.read_h5ad(file)[:, genes].copy())
    cells = anndata.concat(parts, index_unique="-")
    rows = np.arange(len(cells))
    return cells, [rows[: len(parts[0])], rows[len(parts[0]) :], rows[:0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="a shard set with the splits train and valid")
    parser.add_argument("--batch", required=True, help="the label that the model corrects for")
    parser.add_argument("--top", type=int, default=4000, help="variable genes that it sees")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--beside", action="store_true", help="train scvi's own loader too")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    genes = list(variable_genes(args.root, args.top).genes[: args.top])
    shape: dict[str, Any] = {"n_latent": 10, "gene_likelihood": "nb"}

    scvi.settings.seed = 0
    cells = Cells(args.root, genes, args.batch, args.batch_size)
    model = scvi.model.SCVI(registry=cells.registry, **shape)
    streamed = train(model, args.epochs, datamodule=cells)
    print(f"streamed: {len(genes)} genes, {args.epochs} epochs, held-out loss {streamed:.2f}")
    latent = model.get_latent_representation(
        dataloader=cells.embedding("valid", torch.device("cpu"))
    )
    print(f"latent space of the held-out cells: {latent.shape[0]} x {latent.shape[1]}")

    if args.beside:
        scvi.settings.seed = 0
        loaded, rows = in_memory(args.root, genes)
        scvi.model.SCVI.setup_anndata(loaded, batch_key=args.batch)
        own = train(
            scvi.model.SCVI(loaded, **shape),
            args.epochs,
            batch_size=args.batch_size,
            datasplitter_kwargs={"external_indexing": rows},
        )
        print(f"from memory, scvi's own loader: held-out loss {own:.2f}")


if __name__ == "__main__":
    main()

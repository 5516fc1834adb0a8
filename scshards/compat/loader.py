"""scGPT's prepare_dataloader, over a dictionary in memory or over the stream. See compat."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch, key_text
from scshards.compat.data import SeqDataset
from scshards.compat.tokens import random_mask_value
from scshards.streaming.loader import CellLoader
from scshards.streaming.options import PARTS, by_part


def prepare_dataloader(
    data_pt: Mapping[str, Tensor] | str | os.PathLike[str] | CellLoader,
    batch_size: int,
    shuffle: bool = False,
    intra_domain_shuffle: bool = False,
    drop_last: bool = False,
    num_workers: int = 0,
    per_seq_batch_sample: bool = False,
    *,
    config: Any = None,
    batch_column: str | None = None,
    celltype_column: str | None = None,
    split: str = "train",
    **options: Any,
) -> DataLoader[dict[str, Tensor]] | StreamLoader:
    """Batches of scGPT's dictionaries; iterate once for each epoch.

    Orders are keyed by seed, epoch and pass: no global generator is touched, and a second pass has
    another order than the first.

    Parameters
    ----------
    data_pt
        A dictionary of `prepare_data`; the root of a shard set; or a CellLoader of Batches, whose own
        options decide then.
    batch_size
        Cells in a batch; of a CellLoader, its own.
    shuffle
        Whether cells come in random order; with `per_seq_batch_sample`, whether batches do. A shard set
        that is not shuffled gives the same batches in every pass.
    intra_domain_shuffle
        With `per_seq_batch_sample`: whether cells of a domain come in random order.
    drop_last
        Whether a last batch (of each domain) with fewer cells is left out.
    num_workers
        Processes that gather rows; threads that prepare batches of a shard set (0: 2 of them).
    per_seq_batch_sample
        Whether each batch has cells of one domain.
    config
        Of a shard set: has `mask_ratio`, `mask_value`, `pad_value`, `max_seq_len`, `n_bins`, and `seed`
        (0 without). Values are binned, and `<cls>` has the value 0, as scGPT's trainer has it.
    batch_column, celltype_column
        Labels of a shard set that become "batch_labels" (all 0 without) and "celltype_labels" (left out
        without): the codes of its manifest's categories.
    split
        Of a shard set.
    options
        More for a shard set: CellLoader's, and fields of ChoiceOptions, CollateOptions and ReadOptions.

    Raises
    ------
    ConfigError
        For options that do not go with what is loaded.
    """
    if isinstance(data_pt, Mapping):
        given = {"config": config, "batch_column": batch_column, "celltype_column": celltype_column}
        extra = [k for k, v in (given | options).items() if v is not None]
        if extra:
            raise ConfigError(f"only a shard set takes {', '.join(extra)}")
        return _in_memory(
            data_pt, batch_size, shuffle, intra_domain_shuffle, drop_last, num_workers,
            per_seq_batch_sample,
        )  # fmt: skip
    if isinstance(data_pt, CellLoader):
        if options or batch_size != data_pt.batch_size:
            raise ConfigError(
                "a CellLoader has its own options and batch_size",
                advice=f"give batch_size={data_pt.batch_size}, or the root of the shard set",
            )
        return StreamLoader(data_pt, config, batch_column, celltype_column)
    if config is None:
        raise ConfigError("a shard set needs config: how cells are masked, binned and cut")
    if getattr(config, "include_zero_gene", False) and "include_zero_genes" not in options:
        raise ConfigError(
            "include_zero_gene of a stream is a number of genes",
            advice="give include_zero_genes=N, or set config.include_zero_gene to False",
        )
    if per_seq_batch_sample and batch_column is None:
        raise ConfigError("per_seq_batch_sample needs batch_column")
    shuffles = shuffle or (per_seq_batch_sample and intra_domain_shuffle)
    asked: dict[str, Any] = {
        "threads": num_workers or None,
        "domain_by": batch_column if per_seq_batch_sample else None,
        "objective": "none",
        "max_length": config.max_seq_len,
        "n_bins": config.n_bins,
        "pad_value": float(config.pad_value),
        "mask_value": float(config.mask_value),
        "cls_value": 0.0,
    } | options
    tables, of_loader = by_part(asked)
    if "sets" in tables or of_loader.get("sets") is not None:
        raise ConfigError(
            "scGPT's trainer knows no sets of cells", advice="use CellLoader(sets=...)"
        )
    parts: dict[str, Any] = {part: PARTS[part](**table) for part, table in tables.items()}
    loader = CellLoader(
        data_pt,
        split=split,
        batch_size=batch_size,
        shuffle=shuffles,
        drop_last=drop_last,
        **{"seed": int(getattr(config, "seed", 0)), "fixed_epoch": not shuffles} | of_loader,
        **parts,
    )
    return StreamLoader(loader, config, batch_column, celltype_column)


class StreamLoader:
    """A CellLoader whose batches are scGPT's dictionaries, on the CPU.

    "gene_ids" int64, "values" and "target_values" float32 [B, L], "batch_labels" int64 [B] and, with a
    column for it, "celltype_labels" int64 [B]. Rows that only fill up a batch are left out.

    Parameters
    ----------
    loader
        Gives Batches. Where it hides values itself (objective="mask"), these are the masks; otherwise
        `random_mask_value` hides them, keyed by its seed, epoch and the cells.
    config
        `mask_ratio`, `mask_value` and `pad_value`, for a loader that hides nothing.
    batch_column, celltype_column
        As of prepare_dataloader.
    """

    def __init__(
        self,
        loader: CellLoader,
        config: Any = None,
        batch_column: str | None = None,
        celltype_column: str | None = None,
    ) -> None:
        self.loader, self._config = loader, config
        self._hides = loader.state_dict()["collate"]["objective"] == "mask"
        self._columns = {"batch_labels": batch_column, "celltype_labels": celltype_column}
        for column in self._columns.values():
            if column is not None and column not in loader.labels:
                raise ConfigError(
                    f"the shard set has no label {column!r}",
                    where=loader.shardset.storage.at(""),
                    advice="it has: " + (", ".join(loader.labels) or "none"),
                )
            if column is not None and loader.labels[column].kind == "number":
                raise ConfigError(f"the label {column!r} holds numbers, not categories")

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = iter(self.loader)
        epoch = batches.position.epoch
        for batch in batches:
            if not isinstance(batch, Batch):
                raise ConfigError(
                    f"the loader makes a {type(batch).__name__}, and scGPT's dictionaries hold whole, "
                    "padded cells",
                    advice="make it with objective='mask' or 'none', and neither pack nor collate "
                    "on the device",
                )
            yield self._dictionary(batch, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be of this epoch; see CellLoader."""
        self.loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; see CellLoader."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on where a state was taken."""
        self.loader.load_state_dict(state)

    def _dictionary(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        is_cell = batch.weight > 0
        keys = batch.key[is_cell]
        targets = batch.targets[is_cell]
        out = {
            "gene_ids": batch.genes[is_cell].long(),
            "values": self._hidden(batch, is_cell, targets, keys, epoch),
            "target_values": targets,
        }
        for name, column in self._columns.items():
            if column is not None:
                out[name] = self._label(batch.labels[column][is_cell], column, keys)
        if self._columns["batch_labels"] is None:
            out["batch_labels"] = torch.zeros(len(keys), dtype=torch.int64)
        return out

    def _hidden(
        self, batch: Batch, is_cell: Tensor, targets: Tensor, keys: Tensor, epoch: int
    ) -> Tensor:
        if self._hides:
            return batch.values[is_cell]
        if self._config is None:
            raise ConfigError(
                "the loader hides no value, and there is no config that says how many"
            )
        return random_mask_value(
            targets,
            mask_ratio=self._config.mask_ratio,
            mask_value=self._config.mask_value,
            pad_value=self._config.pad_value,
            seed=self.loader.seed,
            epoch=epoch,
            name=self.loader.split,
            rows=keys.numpy(),
        )

    def _label(self, codes: Tensor, column: str, keys: Tensor) -> Tensor:
        missing = torch.nonzero(codes < 0)
        if len(missing):
            raise ConfigError(
                f"a cell has no {column!r}",
                where=f"cell {key_text(int(keys[missing[0, 0]]))}",
                advice="leave such cells out with where=, or pack them without",
            )
        return codes.long()


class DomainBatches(Sampler[list[int]]):
    """Row numbers of each batch, of one domain or of all; another order in each pass.

    What scGPT's SubsetsBatchSampler does, which can be iterated only once.

    Parameters
    ----------
    subsets
        int [n] each: the rows of each domain; one of all rows when batches are mixed.
    shuffle_rows, shuffle_batches
        Whether rows of a subset, and batches of all subsets, come in random order.
    key
        Of the orders.
    """

    def __init__(
        self,
        subsets: list[NDArray[np.int64]],
        batch_size: int,
        *,
        shuffle_rows: bool,
        shuffle_batches: bool,
        drop_last: bool,
        key: int,
    ) -> None:
        self._subsets, self._batch_size, self._drop_last = subsets, batch_size, drop_last
        self._shuffle_rows, self._shuffle_batches, self._key = shuffle_rows, shuffle_batches, key
        self._passes = 0

    def __len__(self) -> int:
        size = self._batch_size
        return sum(len(s) // size if self._drop_last else -(-len(s) // size) for s in self._subsets)

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for i, rows in enumerate(self._subsets):
            if self._shuffle_rows:
                rows = rows[seeds.permutation(seeds.key(self._key, self._passes, i), len(rows))]
            size = self._batch_size
            stop = len(rows) // size * size if self._drop_last else len(rows)
            batches += [rows[j : j + size].tolist() for j in range(0, stop, size)]
        if self._shuffle_batches:
            order = seeds.permutation(seeds.key(self._key, self._passes, "batches"), len(batches))
            batches = [batches[j] for j in order]
        self._passes += 1
        return iter(batches)


def _in_memory(
    data_pt: Mapping[str, Tensor],
    batch_size: int,
    shuffle: bool,
    intra_domain_shuffle: bool,
    drop_last: bool,
    num_workers: int,
    per_seq_batch_sample: bool,
) -> DataLoader[dict[str, Tensor]]:
    labels = data_pt["batch_labels"].numpy()
    key = seeds.key(getattr(data_pt, "seed", 0), "compat", "order", getattr(data_pt, "epoch", 0))
    if per_seq_batch_sample:
        subsets = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        rows, batches = intra_domain_shuffle, shuffle
    else:
        subsets, rows, batches = [np.arange(len(labels))], shuffle, False
    return DataLoader(
        SeqDataset(dict(data_pt)),
        batch_sampler=DomainBatches(
            subsets,
            batch_size,
            shuffle_rows=rows,
            shuffle_batches=batches,
            drop_last=drop_last,
            key=key,
        ),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Else torch's global generator gives the workers' seed.
        generator=torch.Generator().manual_seed(key >> 1),
    )

"""scGPT's prepare_data: an epoch's dictionaries, from tokenized cells in memory. See compat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from scshards.base.errors import ConfigError
from scshards.compat.tokens import random_mask_value

TASKS = ("annotation", "integration", "perturb")


class SeqData(dict[str, Tensor]):
    """Tensors of the same length under scGPT's names; knows what orders of it are keyed by."""

    seed = 0
    epoch = 0


class SeqDataset(Dataset[dict[str, Tensor]]):
    """A dictionary of tensors as a dataset: item i is the dictionary of their rows i."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return int(self.data["gene_ids"].shape[0])

    def __getitem__(self, idx: Any) -> dict[str, Tensor]:
        return {k: v[idx] for k, v in self.data.items()}


def prepare_data(
    tokenized_train: dict[str, Tensor],
    tokenized_valid: dict[str, Tensor],
    train_batch_labels: NDArray[np.integer],
    valid_batch_labels: NDArray[np.integer],
    config: Any,
    epoch: int,
    train_celltype_labels: NDArray[np.integer] | None = None,
    valid_celltype_labels: NDArray[np.integer] | None = None,
    sort_seq_batch: bool = False,
) -> tuple[SeqData, SeqData]:
    """Mask the values for an epoch; the dictionaries of the training and the validation cells.

    Parameters
    ----------
    tokenized_train, tokenized_valid
        "genes" int64 and "values" float32 [N, L], of `tokenize_and_pad_batch`.
    train_batch_labels, valid_batch_labels
        int [N]: each cell's domain (scGPT's batch).
    config
        Has `task`, `mask_ratio`, `mask_value`, `pad_value`, and `seed` (0 without).
    epoch
        Masks of training cells are of this epoch. Those of validation cells are the same in every
        epoch, so that losses can be compared.
    train_celltype_labels, valid_celltype_labels
        int [N]: each cell's class, for the task "annotation".
    sort_seq_batch
        Whether cells are put in order of their domains.

    Returns
    -------
    tuple of dict
        "gene_ids" int64, "values" (masked) and "target_values" float32 [N, L], "batch_labels" int64 [N]
        and, for "annotation", "celltype_labels" int64 [N].

    Raises
    ------
    ConfigError
        For a task that is none of TASKS, or without the labels that it needs.
    """
    if config.task not in TASKS:
        raise ConfigError(f"the task is {config.task!r}", advice=f"use one of {', '.join(TASKS)}")
    seed, made = int(getattr(config, "seed", 0)), []
    for name, tokenized, domains, classes in (
        ("train", tokenized_train, train_batch_labels, train_celltype_labels),
        ("valid", tokenized_valid, valid_batch_labels, valid_celltype_labels),
    ):
        values = random_mask_value(
            tokenized["values"],
            mask_ratio=config.mask_ratio,
            mask_value=config.mask_value,
            pad_value=config.pad_value,
            seed=seed,
            epoch=epoch if name == "train" else 0,
            name=name,
        )
        data = SeqData(
            gene_ids=tokenized["genes"],
            values=values,
            target_values=tokenized["values"],
            batch_labels=torch.from_numpy(np.asarray(domains)).long(),
        )
        data.seed, data.epoch = seed, epoch
        if config.task == "annotation":
            if classes is None:
                raise ConfigError(f"the task annotation needs {name}_celltype_labels")
            data["celltype_labels"] = torch.from_numpy(np.asarray(classes)).long()
        if sort_seq_batch:
            order = torch.from_numpy(np.argsort(np.asarray(domains), kind="stable"))
            for key in data:
                data[key] = data[key][order]
        made.append(data)
    return made[0], made[1]

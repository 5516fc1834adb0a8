"""Geneformer's own way: a Hugging Face data set of ranked tokens, collated and masked in torch.

    python tools/bench_stream_datasets.py RANKED FOLDER CORES BATCH_SIZE   prints figures as JSON

RANKED is an npz of `tokens` and `indptr`, rows of ranked tokens; FOLDER gets the data set that is made
of it on the first call. The collator does what transformers' DataCollatorForLanguageModeling does with
Geneformer's precollator: lists are padded, made tensors, and masked by BERT's rule. It needs datasets
and torch, but nothing of scshards: tools/bench_stream runs it with another Python where its own has
none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

SPECIALS = 4
"""Special tokens, which come first in Geneformer's dictionary; RANKED has genes alone, from 0 on."""


def main(ranked: Path, folder: Path, cores: int, batch_size: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import datasets
    import torch

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    if not folder.exists():
        make(ranked, folder)
    cells = datasets.load_from_disk(str(folder))
    loader = torch.utils.data.DataLoader(
        cells, batch_size, shuffle=True, num_workers=cores, collate_fn=collate
    )
    batches = iter(loader)
    next(batches)
    start, processor = time.perf_counter(), sum(os.times()[:4])
    done = sum(len(batch["input_ids"]) for batch in batches)
    seconds = time.perf_counter() - start
    del batches  # its workers end, and are counted
    processor = sum(os.times()[:4]) - processor
    figures = {
        "cells/s": done / seconds,
        "µs of processor a cell": 1e6 * processor / done,
        "cells": done,
    }
    print(json.dumps(figures))


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists of tokens -> input_ids, attention_mask and labels, int64 [B, L]."""
    import torch

    n_tokens, mask, pad = 40_000, 1, 0
    longest = max(len(e["input_ids"]) for e in examples)
    rows = [e["input_ids"] + [pad] * (longest - len(e["input_ids"])) for e in examples]
    seen = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    inputs, attention = torch.tensor(rows), torch.tensor(seen)
    labels = inputs.clone()
    chance = torch.full(labels.shape, 0.15)
    chance.masked_fill_(inputs < SPECIALS, 0.0)
    hidden = torch.bernoulli(chance).bool()
    labels[~hidden] = -100
    is_mask = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & hidden
    inputs[is_mask] = mask
    is_other = torch.bernoulli(torch.full(labels.shape, 0.5)).bool() & hidden & ~is_mask
    inputs[is_other] = torch.randint(n_tokens, labels.shape)[is_other]
    return {"input_ids": inputs, "attention_mask": attention, "labels": labels}


def make(ranked: Path, folder: Path) -> None:
    """Write the rows as Geneformer's tokenizer writes cells: lists of tokens, and how long each is."""
    import datasets
    import numpy as np

    with np.load(ranked) as held:
        tokens, indptr = held["tokens"] + SPECIALS, held["indptr"]
    rows = [tokens[a:z].tolist() for a, z in pairwise(indptr)]
    made = datasets.Dataset.from_dict({"input_ids": rows, "length": [len(r) for r in rows]})
    made.save_to_disk(str(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))

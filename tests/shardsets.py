"""Small shard sets made straight from the shard floor, with every value known. Used by the tests of shards and stream."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scshards.base.storage import Storage
from scshards.cells.tokenizer import TokenRows
from scshards.cells.vocab import Vocab
from scshards.shards.index import write_index
from scshards.shards.manifest import LabelInfo, Manifest, ShardInfo, SourceInfo
from scshards.shards.members import encode_rows
from scshards.shards.tar import build_tar, seal


@dataclass
class Known:
    """A shard set and the cells that were put in, by key."""

    root: Path
    vocab: Vocab
    genes: dict[int, np.ndarray]
    values: dict[int, np.ndarray]
    donor: dict[int, int]
    age: dict[int, float]


def encode_cell(
    genes: Any, values: Any, labels: dict[str, int | float] | None = None, *, kind: str = "counts"
) -> bytes:
    """The member of one cell; codes are ints, numbers are floats."""
    rows = TokenRows(
        indptr=np.array([0, len(genes)], np.int64),
        genes=np.array(genes, np.int32),
        values=np.array(values, np.uint64 if kind == "counts" else np.float32),
    )
    columns = {
        n: np.array([v], np.float64 if isinstance(v, float) else np.int64)
        for n, v in (labels or {}).items()
    }
    return bytes(encode_rows(rows, columns)[0])


def make_set(
    root: Path,
    shard_cells: list[int],
    *,
    n_genes: int = 40,
    longest: int = 12,
    kind: str = "counts",
    compression: str = "none",
    seed: int = 0,
    top: int = 30,
    split: str = "train",
    url: str | None = None,
    categories: tuple[str, ...] = ("a", "b", "c"),
    columns: tuple[str, ...] = ("donor", "age"),
    donors: np.ndarray | None = None,
) -> Known:
    """Write shards of the given sizes; cells are random, keys are consecutive rows of source 0.

    `url` writes to another store than the folder `root`; `categories` are those of `donor`; `columns`
    are the labels that are kept; `donors` are the codes of all cells, at random unless given.
    """
    rng = np.random.default_rng(seed)
    storage = Storage(url or root)
    vocab = Vocab([f"g{i}" for i in range(n_genes)]).with_specials()
    known = Known(root, vocab, {}, {}, {}, {})
    shards = []
    row = n_bytes = 0
    for i, cells in enumerate(shard_cells):
        lengths = rng.integers(1, longest + 1, cells)
        genes = [np.sort(rng.choice(n_genes, n, replace=False)).astype(np.int32) for n in lengths]
        if kind == "counts":
            values = [rng.integers(1, top + 1, n).astype(np.uint64) for n in lengths]
        else:
            values = [rng.uniform(0.1, 9, n).astype(np.float32) for n in lengths]
        donor = rng.integers(-1, len(categories), cells)
        if donors is not None:
            donor = donors[row : row + cells]
        age = rng.uniform(20, 80, cells)
        rows = TokenRows(
            indptr=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            genes=np.concatenate(genes),
            values=np.concatenate(values),
        )
        made = {"donor": donor, "age": age}
        labels = {name: made[name] for name in columns}
        payload, ends = encode_rows(rows, labels)
        sizes = np.diff(np.concatenate(([0], ends)))
        keys = np.arange(row, row + cells)
        tar, offsets = build_tar(payload, ends - sizes, sizes, np.zeros(cells, np.int64), keys)
        stored, chunks = seal(tar, offsets, compression)
        index = write_index(
            offset=offsets,
            size=sizes,
            n_genes=lengths,
            total=np.array([v.sum() for v in values], float),
            source=np.zeros(cells, np.int64),
            row=keys,
            labels={name: made[name] for name in columns},
        )
        name = f"{split}/{i:06d}"
        path = name + (".tar" if compression == "none" else ".tar.zst")
        storage.write(path, stored.tobytes())
        storage.write(f"{name}.parquet", index)
        shards.append(
            ShardInfo(
                path=path,
                cells=cells,
                tokens=int(lengths.sum()),
                max_genes=int(lengths.max()),
                bytes=len(stored),
                sha256=hashlib.sha256(stored).hexdigest(),
                index_path=f"{name}.parquet",
                index_bytes=len(index),
                index_sha256=hashlib.sha256(index).hexdigest(),
                chunks=chunks,
            )
        )
        for k in range(cells):
            known.genes[row + k] = genes[k]
            known.values[row + k] = values[k]
            known.donor[row + k] = int(donor[k])
            known.age[row + k] = float(age[k])
        row += cells
        n_bytes += len(payload)
    storage.write("vocab.json", vocab.to_json())
    kinds = {
        "donor": LabelInfo(kind="category", categories=categories),
        "age": LabelInfo(kind="number"),
    }
    manifest = Manifest(
        vocab_size=len(vocab), vocab_fingerprint=vocab.fingerprint, value_kind=kind, compression=compression,
        labels={name: kinds[name] for name in columns},
        splits={split: tuple(shards)},
        sources=(
            SourceInfo(name="made", rows=row, kept=row, dropped={}, columns=n_genes, matched=n_genes, unmatched=0,
                       merged=0, values=sum(s.tokens for s in shards), unmatched_values=0, bytes=n_bytes),
        ),
        options={"seed": seed},
    )  # fmt: skip
    storage.write("manifest.json", manifest.to_json())
    return known

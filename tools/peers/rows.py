"""Cells out of h5ad files, and batches of sparse rows: for peers without a format of cells."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

BLOCK = 2048
"""Cells read at once."""


def blocks(files: list[Path]) -> Iterator[tuple[Any, Any, Any]]:
    """indptr, gene indices and counts (uint16) of blocks of cells, in the order of the files."""
    import h5py
    import numpy as np

    for file in files:
        with h5py.File(file) as opened:
            x = opened["X"]
            if x.attrs["shape"][1] > 1 << 16:
                raise ValueError(f"{file}: more genes than 16 bits can number")
            indptr = x["indptr"][:]
            for first in range(0, len(indptr) - 1, BLOCK):
                ends = indptr[first : first + BLOCK + 1]
                part = slice(int(ends[0]), int(ends[-1]))
                genes = x["indices"][part].astype(np.uint16)
                yield ends - ends[0], genes, x["data"][part].astype(np.uint16)


def cells(files: list[Path]) -> Iterator[tuple[Any, Any]]:
    """Genes and counts of each cell, uint16."""
    for indptr, genes, counts in blocks(files):
        for a, z in pairwise(indptr.tolist()):
            yield genes[a:z], counts[a:z]


def n_cells(files: list[Path]) -> int:
    """How many cells there are."""
    import h5py

    total = 0
    for file in files:
        with h5py.File(file) as opened:
            total += int(opened["X"].attrs["shape"][0])
    return total


def n_genes(file: Path) -> int:
    """How many genes a file has."""
    import h5py

    with h5py.File(file) as opened:
        return int(opened["X"].attrs["shape"][1])


def batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Cells of `genes` and `values`, arrays or tensors, as rows one behind another, in tensors.

    Of tensors, since a worker hands these over in shared memory and pickles all else. The first is as
    long as the batch: loaders that count samples look there.
    """
    import numpy as np
    import torch

    lengths = torch.tensor([len(example["genes"]) for example in examples])
    indptr = torch.zeros(len(examples) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=indptr[1:])

    def joined(name: str) -> Any:
        return torch.from_numpy(np.concatenate([np.asarray(e[name]) for e in examples]))

    found = {"lengths": lengths, "indptr": indptr}
    return {**found, "genes": joined("genes"), "values": joined("values")}


def size(made: dict[str, Any]) -> int:
    """Cells of a batch of `batch`."""
    return len(made["indptr"]) - 1


def stored(made: dict[str, Any]) -> int:
    """Values of a batch of `batch`."""
    return len(made["genes"])


def csr_size(made: Any) -> int:
    """Cells of a sparse matrix."""
    return int(made.shape[0])


def csr_stored(made: Any) -> int:
    """Values of a sparse matrix: scipy's or torch's."""
    return int(made.nnz if hasattr(made, "nnz") else made.values().numel())

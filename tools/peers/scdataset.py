"""scDataset over backed h5ad files: blocks of rows, batches fetched at once, DataLoader's workers."""

from __future__ import annotations

from typing import Any

from peers import rows
from peers.contract import COUNTS, Peer, Work, serve

BLOCK, FETCH = 64, 2
"""Rows read in one piece, and batches fetched at once: 2,048 rows, as many as in its quick start."""


def loader(work: Work) -> Any:
    """AnnCollection of backed files, as in its quick start, rows kept sparse."""
    import anndata
    from anndata.experimental import AnnCollection
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    collection = AnnCollection([anndata.read_h5ad(file, backed="r") for file in work.files])
    made = scDataset(
        collection,
        BlockShuffling(block_size=BLOCK),
        batch_size=work.batch,
        fetch_factor=FETCH,
        fetch_transform=_in_memory,
        batch_transform=_tensors,
    )
    return DataLoader(
        made,
        batch_size=None,
        num_workers=work.threads,
        prefetch_factor=FETCH + 1 if work.threads else None,
        persistent_workers=work.threads > 0,
    )


def _in_memory(fetched: Any) -> Any:
    return fetched.to_adata().X


def _tensors(csr: Any) -> dict[str, Any]:
    """Tensors, which a worker hands over in shared memory."""
    import torch

    parts = {"indptr": csr.indptr, "genes": csr.indices, "values": csr.data}
    return {name: torch.from_numpy(part) for name, part in parts.items()}


PEER = Peer(
    title="scDataset",
    packages=("scdataset", "anndata", "torch"),
    requires=("torch==2.13.0", "scdataset", "anndata"),
    stores={COUNTS: ()},
    imports=("scdataset", "anndata", "torch"),
    ways={
        COUNTS: f"`AnnCollection` of backed h5ad files, blocks of {BLOCK} rows, {FETCH} batches "
        "fetched at once, DataLoader's workers, rows kept sparse"
    },
    better="It needs no conversion: h5ad files are read as they are, or anything else that can be "
    "indexed. Weights and classes are strategies of sampling.",
    loader=loader,
    cells=rows.size,
    tokens=rows.stored,
)

if __name__ == "__main__":
    serve(PEER)

"""BioNeMo-SCDL: CSR in memory-mapped arrays, one row at a time, DataLoader's workers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from peers import rows
from peers.contract import COUNTS, Peer, Work, serve


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """What its convert_h5ad_to_scdl does."""
    from bionemo.scdl.io.single_cell_collection import SingleCellCollection

    with tempfile.TemporaryDirectory(dir=folder) as parts:
        collection = SingleCellCollection(parts)
        collection.load_h5ad_multi(str(files[0].parent), max_workers=threads, use_X_not_raw=True)
        collection.flatten(str(folder / store), destroy_on_copy=True)


def loader(work: Work) -> Any:
    """Its data set in torch's DataLoader, by its own collate function: torch's CSR."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader

    return DataLoader(
        SingleCellMemMapDataset(work.stores["memmap"]),
        batch_size=work.batch,
        shuffle=True,
        collate_fn=collate_sparse_matrix_batch,
        num_workers=work.threads,
        persistent_workers=work.threads > 0,
    )


PEER = Peer(
    title="BioNeMo-SCDL",
    packages=("bionemo-scdl", "torch"),
    requires=("torch==2.13.0", "bionemo-scdl"),
    stores={COUNTS: ("memmap",)},
    imports=("bionemo.scdl.io.single_cell_memmap_dataset", "torch.utils.data"),
    ways={
        COUNTS: "memory-mapped arrays, DataLoader's shuffle and workers, `collate_sparse_matrix_batch`"
    },
    better="Any row can be taken by its number, so a shuffle is over all cells at once, and one "
    "cell costs one read. Neighbours of cells can come along.",
    convert=convert,
    loader=loader,
    cells=rows.csr_size,
    tokens=rows.csr_stored,
)

if __name__ == "__main__":
    serve(PEER)

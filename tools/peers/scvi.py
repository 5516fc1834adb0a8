"""scvi-tools' AnnDataLoader: all cells in memory, as its models train."""

from __future__ import annotations

from typing import Any

from peers import rows
from peers.contract import COUNTS, Peer, Work, serve


def loader(work: Work) -> Any:
    """The loader of its models over one AnnData in memory, which gives sparse tensors when asked."""
    import anndata
    from scvi import REGISTRY_KEYS
    from scvi.data import AnnDataManager
    from scvi.data.fields import LayerField
    from scvi.dataloaders import AnnDataLoader

    adata = anndata.concat([anndata.read_h5ad(file) for file in work.files], index_unique="-")
    manager = AnnDataManager([LayerField(REGISTRY_KEYS.X_KEY, None, is_count_data=True)])
    manager.register_fields(adata)
    return AnnDataLoader(
        manager,
        batch_size=work.batch,
        shuffle=True,
        load_sparse_tensor=True,
        num_workers=work.threads,
        persistent_workers=work.threads > 0,
    )


PEER = Peer(
    title="scvi-tools",
    packages=("scvi-tools", "anndata", "torch"),
    requires=("torch==2.13.0", "scvi-tools"),
    stores={COUNTS: ()},
    imports=("scvi.dataloaders",),
    ways={COUNTS: "`AnnDataLoader(load_sparse_tensor=True)` over one AnnData in memory"},
    better="It needs no conversion and reads no disk after the start, and it feeds scvi-tools' "
    "models as they are. All cells have to fit into memory.",
    loader=loader,
    cells=lambda batch: rows.csr_size(batch["X"]),
    tokens=lambda batch: rows.csr_stored(batch["X"]),
)

if __name__ == "__main__":
    serve(PEER)

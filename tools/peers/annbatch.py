"""annbatch: sparse rows of its own pre-shuffled, sharded zarr, as it reads it on a local disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers import rows
from peers.contract import COUNTS, Peer, Work, serve


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """Its collection of shuffled cells."""
    _set_threads(threads)
    from annbatch import DatasetCollection

    DatasetCollection(str(folder / store)).add_adatas([str(f) for f in files], shuffle=True)


def loader(work: Work) -> Any:
    """Its loader, whose threads are its own: it advises against torch's DataLoader."""
    _set_threads(work.threads)
    from annbatch import DatasetCollection, Loader

    made = Loader(batch_size=work.batch, shuffle=True)
    made.use_collection(DatasetCollection(work.stores["collection.zarr"], mode="r"))
    return made


def _set_threads(threads: int) -> None:
    import os

    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import zarr

    # Its documentation calls this pipeline essential on local disks.
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    zarr.config.set({"threading.max_workers": threads})


PEER = Peer(
    title="annbatch",
    packages=("annbatch", "zarrs", "zarr", "anndata"),
    requires=("annbatch[zarrs]", "numba"),
    python="3.12",
    stores={COUNTS: ("collection.zarr",)},
    imports=("annbatch", "zarrs"),
    ways={
        COUNTS: "pre-shuffled sharded zarr, zarrs' codecs, default chunks; scipy's CSR on the CPU"
    },
    better="Its files are AnnData in zarr, which scanpy and anndata open as they are. With a GPU "
    "it gathers, shuffles and widens rows there, which nothing here measures, and classes can be "
    "weighted.",
    convert=convert,
    loader=loader,
    cells=lambda batch: rows.csr_size(batch["X"]),
    tokens=lambda batch: rows.csr_stored(batch["X"]),
)

if __name__ == "__main__":
    serve(PEER)

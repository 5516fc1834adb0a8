"""LitData: optimized chunks of two arrays a cell, its own streaming loader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import mixed, rows
from peers.contract import COUNTS, MASKED, Peer, Work, serve


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """`optimize`, a file an input. It empties folders of caches, which must be named."""
    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        if not os.environ.get(name):
            raise RuntimeError(f"{name} is not set: litdata would empty a folder of its own choice")
    import litdata

    litdata.optimize(
        fn=_cells,
        inputs=[str(f) for f in files],
        output_dir=str(folder / store),
        num_workers=threads,
        chunk_bytes="64MB",
    )


def _cells(name: str) -> Iterator[dict[str, Any]]:
    for genes, values in rows.cells([Path(name)]):
        yield {"genes": genes, "values": values}


def loader(work: Work) -> Any:
    """Its data set and its loader, whose state it keeps."""
    import litdata

    options: dict[str, Any] = {}
    if work.is_remote:
        _allow_http()
        options = {
            "cache_dir": f"{work.scratch}/chunks",
            "storage_options": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        }
    made = litdata.StreamingDataset(
        work.stores["chunks"], shuffle=True, drop_last=True, seed=42, **options
    )
    return litdata.StreamingDataLoader(
        made,
        batch_size=work.batch,
        num_workers=work.threads,
        persistent_workers=work.threads > 0,
        collate_fn=mixed.collator(work),
    )


def _allow_http() -> None:
    """Let its downloads in the background reach the server of the benchmark, which has no certificate.

    They take neither settings nor the environment's word for that.
    """
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS = {**downloader._OBSTORE_CLIENT_OPTIONS, "allow_http": True}


PEER = Peer(
    title="LitData",
    packages=("litdata", "torch"),
    requires=("torch==2.13.0", "litdata", "h5py"),
    stores={COUNTS: ("chunks",), MASKED: ("chunks",)},
    remote=(COUNTS,),
    imports=("litdata",),
    ways={
        COUNTS: "`optimize` into chunks of 64 MB of two uint16 arrays a cell, "
        "`StreamingDataset(shuffle=True)`, StreamingDataLoader's workers; from S3 with an empty "
        "local cache",
        MASKED: "the same, with scGPT's DataCollator in the workers",
    },
    better="Samples of any kind, written by any Python function in parallel, streams that are "
    "mixed, and reading of raw files as they lie in a bucket.",
    convert=convert,
    loader=loader,
    cells=mixed.cells,
    tokens=mixed.tokens,
    save=lambda made: made.state_dict(),
    load=lambda made, state: made.load_state_dict(state),
)

if __name__ == "__main__":
    serve(PEER)

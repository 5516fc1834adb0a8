"""MosaicML Streaming: MDS shards of two arrays a cell, as Tahoe-x1's pretraining reads them."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any

from peers import mixed, rows
from peers.contract import COUNTS, MASKED, Peer, Work, serve


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """MDS shards of the default size."""
    from streaming import MDSWriter

    columns = {"genes": "ndarray:uint16", "values": "ndarray:uint16"}
    with MDSWriter(out=str(folder / store), columns=columns) as writer:
        for genes, values in rows.cells(files):
            writer.write({"genes": genes, "values": values})


def loader(work: Work) -> Any:
    """Its data set and its loader, whose state it keeps."""
    from streaming import StreamingDataLoader, StreamingDataset

    place, remote = work.stores["mds"], None
    if work.is_remote:
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        place, remote = f"{work.scratch}/mds", place
    made = StreamingDataset(local=place, remote=remote, shuffle=True, batch_size=work.batch)
    return StreamingDataLoader(
        made,
        batch_size=work.batch,
        num_workers=work.threads,
        drop_last=True,
        persistent_workers=work.threads > 0,
        collate_fn=mixed.collator(work),
    )


PEER = Peer(
    title="MosaicML Streaming",
    packages=("mosaicml-streaming", "torch"),
    requires=("torch==2.13.0", "mosaicml-streaming", "h5py"),
    stores={COUNTS: ("mds",), MASKED: ("mds",)},
    remote=(COUNTS,),
    imports=("streaming",),
    ways={
        COUNTS: "MDS shards of two uint16 arrays a cell, `StreamingDataset(shuffle=True)`, "
        "StreamingDataLoader's workers; from S3 with an empty local cache",
        MASKED: "the same, with scGPT's DataCollator in the workers",
    },
    better="Samples of any kind, streams that are mixed by weight, an order that is the same for "
    "any number of ranks, and any sample by its number. It is used in training of language models "
    "at large scale.",
    convert=convert,
    loader=loader,
    cells=mixed.cells,
    tokens=mixed.tokens,
    save=lambda made: made.state_dict(),
    load=lambda made, state: made.load_state_dict(state),
)


def _without_pictures() -> None:
    """Let it be imported where torchvision is not: it asks for it, and only its pictures need it.

    pip has no torchvision for torch's builds for the CPU, and that for CUDA fails beside them.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for part in ("", ".datasets", ".transforms", ".transforms.functional"):
            name = f"torchvision{part}"
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


if __name__ == "__main__":
    _without_pictures()
    serve(PEER)

"""Stock webdataset: tars of one msgpack a cell, arrays as their bytes, read as it documents."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peers import mixed, rows
from peers.contract import COUNTS, MASKED, Peer, Work, serve

SHARDS = 8
SHUFFLE_BUFFER = 1000
"""Samples in webdataset's buffer: what its own examples take."""


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """Tars of as many cells each."""
    n = rows.n_cells(files)
    write(folder / store, rows.cells(files), n, SHARDS)


def write(folder: Path, cells: Iterable[tuple[Any, Any]], n: int, shards: int) -> None:
    """What a user of stock webdataset would write, of uint16 genes and counts."""
    import msgpack
    import webdataset as wds

    folder.mkdir()
    pattern = f"file:{folder}/%06d.tar"
    with wds.ShardWriter(pattern, maxcount=-(-n // shards), verbose=0) as writer:
        for i, (genes, counts) in enumerate(cells):
            packed = msgpack.packb({"genes": genes.tobytes(), "values": counts.tobytes()})
            writer.write({"__key__": f"{i:08d}", "mp": packed})


def read(sample: dict[str, Any]) -> dict[str, Any]:
    """A decoded sample's arrays."""
    import numpy as np

    cell = sample["mp"]
    return {name: np.frombuffer(cell[name], np.uint16) for name in ("genes", "values")}


def samples(urls: list[str]) -> Any:
    """Shuffled shards, a shuffle buffer, decoded cells."""
    import webdataset as wds

    shuffled = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE_BUFFER)
    return shuffled.decode().map(read)


def local_urls(folder: Path) -> list[str]:
    """The tars of a folder."""
    return sorted(str(path) for path in folder.glob("*.tar"))


def batches(
    urls: list[str], collate: Callable[[list[dict[str, Any]]], Any], batch_size: int
) -> Iterator[Any]:
    """Batches in this process."""
    yield from samples(urls).batched(batch_size, collation_fn=collate, partial=False)


def loader(work: Work) -> Any:
    """WebLoader's workers, each with shards of its own."""
    import webdataset as wds

    place = work.stores["tars"]
    if work.is_remote:
        # It has no reader of S3: its documentation pipes a command's output.
        aws = Path(sys.executable).with_name("aws")
        names = [f"{place}/{i:06d}.tar" for i in range(SHARDS)]
        urls = [f"pipe:{aws} s3 cp {name} - --endpoint-url {_endpoint()}" for name in names]
    else:
        urls = local_urls(Path(place))
    made = samples(urls).batched(work.batch, collation_fn=mixed.collator(work), partial=False)
    return wds.WebLoader(
        made, batch_size=None, num_workers=work.threads, persistent_workers=work.threads > 0
    )


def _endpoint() -> str:
    return os.environ["AWS_ENDPOINT_URL"]


PEER = Peer(
    title="webdataset",
    packages=("webdataset", "torch"),
    requires=("torch==2.13.0", "webdataset", "msgpack", "h5py", "awscli"),
    stores={COUNTS: ("tars",), MASKED: ("tars",)},
    remote=(COUNTS,),
    imports=("webdataset",),
    ways={
        COUNTS: "tars of one msgpack a cell, shards shuffled, a buffer of 1,000 cells, WebLoader's "
        "workers; from S3 by `pipe:aws s3 cp`",
        MASKED: "the same, with scGPT's DataCollator in the workers",
    },
    better="It is the format that everybody reads, of any Python object: a map or a filter is a "
    "line of Python, and nothing is compiled. A pass starts as soon as its buffer has a thousand "
    "cells.",
    convert=convert,
    loader=loader,
    cells=mixed.cells,
    tokens=mixed.tokens,
)

if __name__ == "__main__":
    serve(PEER)

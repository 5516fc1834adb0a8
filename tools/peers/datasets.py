"""Hugging Face datasets: Arrow rows of lists, DataLoader's workers; Geneformer's and scGPT's way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import mixed, ranked, rows
from peers.contract import COUNTS, MASKED, RANKED, Peer, Work, serve


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """Genes and counts of each cell, or its ranked tokens, from a generator."""
    import datasets
    from datasets import Features, Sequence, Value

    datasets.disable_progress_bars()
    kinds = {"genes": Sequence(Value("uint16")), "values": Sequence(Value("uint16"))}
    if store == "ranked":
        kinds = {"input_ids": Sequence(Value("int64")), "length": Value("int64")}
    cache = folder / f"{store}.cache"
    made = datasets.Dataset.from_generator(
        _rows,
        features=Features(kinds),
        gen_kwargs={"names": [str(f) for f in files], "store": store},
        cache_dir=str(cache),
    )
    made.save_to_disk(str(folder / store))
    shutil.rmtree(cache)


def _rows(names: list[str], store: str) -> Iterator[dict[str, Any]]:
    files = list(map(Path, names))
    if store == "ranked":
        yield from ranked.cells(files)
    else:
        yield from ({"genes": g, "values": v} for g, v in rows.cells(files))


def loader(work: Work) -> Any:
    """A data set in torch's DataLoader: numpy arrays, or for Geneformer's collator lists."""
    import datasets
    from torch.utils.data import DataLoader

    datasets.disable_progress_bars()
    made = datasets.load_from_disk(work.stores["ranked" if work.kind == RANKED else "arrow"])
    if work.kind != RANKED:
        made = made.with_format("numpy")
    return DataLoader(
        made,
        work.batch,
        shuffle=True,
        drop_last=True,
        num_workers=work.threads,
        persistent_workers=work.threads > 0,
        collate_fn=mixed.collator(work),
    )


PEER = Peer(
    title="datasets",
    packages=("datasets", "pyarrow", "torch"),
    requires=("torch==2.13.0", "datasets", "h5py"),
    stores={COUNTS: ("arrow",), MASKED: ("arrow",), RANKED: ("ranked",)},
    imports=("datasets", "torch.utils.data"),
    ways={
        COUNTS: "Arrow rows of lists, numpy format, DataLoader's shuffle and workers",
        MASKED: "the same, with scGPT's DataCollator in the workers, as scGPT's own data bank is read",
        RANKED: "cells that were ranked before, as Geneformer's tokenizer writes them, and its "
        "collator",
    },
    better="Any row can be taken by its number, so a shuffle is over all cells at once, and `map` "
    "and `filter` of Python functions are kept on disk. Hugging Face's Trainer takes it as it is.",
    convert=convert,
    loader=loader,
    cells=mixed.cells,
    tokens=mixed.tokens,
)

if __name__ == "__main__":
    serve(PEER)

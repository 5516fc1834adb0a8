"""Shard sets in webdataset pipelines: cells, a filter, batches, and stock webdataset alone.

    python examples/webdataset_pipeline.py shards --where "source == 'Blood'"

webdataset gives whole shards to ranks and workers, so their numbers of steps differ, and it does not
resume in the middle of an epoch; CellLoader and CellDataset do both.
"""

from __future__ import annotations

import argparse

import webdataset

from scshards import CollateOptions
from scshards.streaming import wds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "root", help="a shard set: a folder or an address such as s3://bucket/shards"
    )
    parser.add_argument(
        "--where", help='cells to keep, such as "n_genes > 500"', default="n_genes > 5"
    )
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    # A webdataset pipeline of decoded cells; shards in another order each epoch, cells through a buffer.
    cells = wds.pipeline(args.root, split="train").shuffle(1000)
    cell = next(iter(cells))
    print(f"{cell['__key__']}: {len(cell['genes'])} genes, labels {cell['labels']}")

    # Its own methods go on from there; batches need no decoded cells.
    batches = (
        wds.pipeline(args.root, split="train", decode=False)
        .shuffle(1000)
        .compose(
            wds.Where(args.root, args.where),
            wds.Collate(args.root, batch_size=16, collate=CollateOptions(max_length=200)),
        )
    )
    loader = webdataset.WebLoader(batches, batch_size=None, num_workers=args.workers)
    for epoch in range(2):
        sizes = [len(batch) for batch in loader]
        print(f"epoch {epoch}: {sum(sizes)} cells that match in {len(sizes)} batches")

    # The stages in a pipeline of one's own, here over half the shards.
    shards = wds.Shards(args.root, shuffle=False)
    half = webdataset.DataPipeline(
        webdataset.SimpleShardList(shards.urls[::2]),
        webdataset.split_by_worker,
        wds.Open(args.root),
        webdataset.tariterators.tar_file_expander,
        webdataset.tariterators.group_by_keys,
        wds.Decode(shards.value_kind),
    )
    print(f"every second shard: {sum(1 for _ in half)} cells")

    # Plain tars on local disk need nothing of scshards but the decoding.
    if shards.urls[0].endswith(".tar") and "://" not in shards.urls[0]:
        stock = webdataset.WebDataset(shards.urls, shardshuffle=False)
        genes = sum(len(s["genes"]) for s in stock.compose(wds.Decode(shards.value_kind)))
        print(f"stock webdataset: {genes} values")


if __name__ == "__main__":
    main()

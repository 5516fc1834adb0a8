"""tiledbsoma-ml: rows of a SOMA experiment, fetched in large blocks that are shuffled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peers import rows
from peers.contract import COUNTS, Peer, Work, serve

MEASUREMENT, LAYER = "RNA", "data"
CHUNK, CAPACITY = 64, 1 << 16
"""Rows that its shuffle leaves together, and values of a tile."""


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """An experiment of all files, made as tiledbsoma's documentation does."""
    import tiledbsoma
    import tiledbsoma.io as io

    uri = str(folder / store)
    names = [str(file) for file in files]
    # As its guidelines for this loader have it: tiles of a shuffle chunk by all genes.
    tiles = {"soma_dim_0": {"tile": CHUNK}, "soma_dim_1": {"tile": rows.n_genes(files[0])}}
    layout = {"tiledb": {"create": {"capacity": CAPACITY, "dims": tiles}}}
    io.from_h5ad(uri, names[0], MEASUREMENT, ingest_mode="schema_only", platform_config=layout)
    registered = io.register_h5ads(
        uri, names, measurement_name=MEASUREMENT, obs_field_name="obs_id", var_field_name="var_id"
    )
    with tiledbsoma.Experiment.open(uri) as experiment:
        context = experiment.context
    registered.prepare_experiment(uri, context=context)
    for name in names:
        io.from_h5ad(
            uri, name, MEASUREMENT, registration_mapping=registered, platform_config=layout
        )


def loader(work: Work) -> Any:
    """Its DataLoader with rows kept sparse and its defaults: read-ahead, 65,536 rows fetched at once."""
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

    context = tiledbsoma.SOMATileDBContext(tiledb_config=_config() if work.is_remote else {})
    experiment = tiledbsoma.Experiment.open(work.stores["experiment"], context=context)
    query = experiment.axis_query(MEASUREMENT)
    made = ExperimentDataset(
        query, layer_name=LAYER, batch_size=work.batch, shuffle=True, seed=0, return_sparse_X=True
    )
    return experiment_dataloader(made)


def _config() -> dict[str, Any]:
    scheme, _, place = os.environ["AWS_ENDPOINT_URL"].partition("://")
    return {
        "vfs.s3.scheme": scheme,
        "vfs.s3.endpoint_override": place,
        "vfs.s3.use_virtual_addressing": "false",
        "vfs.s3.region": os.environ["AWS_DEFAULT_REGION"],
        "vfs.s3.aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "vfs.s3.aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
    }


PEER = Peer(
    title="tiledbsoma-ml",
    packages=("tiledbsoma-ml", "tiledbsoma", "torch"),
    requires=("torch==2.13.0", "tiledbsoma-ml"),
    stores={COUNTS: ("experiment",)},
    remote=(COUNTS,),
    imports=("tiledbsoma_ml",),
    ways={
        COUNTS: "a SOMA experiment tiled as its guidelines say, `ExperimentDataset(shuffle=True, "
        "return_sparse_X=True)`, no workers: TileDB has threads of its own"
    },
    better="Queries of cells and genes are made when it reads, from S3 and of the whole Census, "
    "with no file written before.",
    convert=convert,
    loader=loader,
    cells=lambda batch: rows.csr_size(batch[0]),
    tokens=lambda batch: rows.csr_stored(batch[0]),
    next_epoch=lambda made, epoch: made.dataset.set_epoch(epoch),
)

if __name__ == "__main__":
    serve(PEER)

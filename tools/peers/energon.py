"""Megatron-Energon: stock webdataset's tars, prepared by its own command, its own savable loader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from peers import mixed, rows, webdataset
from peers.contract import COUNTS, MASKED, Peer, Work, serve

SEQUENCE, BUFFER = 100, webdataset.SHUFFLE_BUFFER
"""Samples read one behind another, as in its quick start, and a buffer of webdataset's size."""


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """Tars, and `energon prepare`."""
    made = folder / store
    webdataset.write(made, rows.cells(files), rows.n_cells(files), webdataset.SHARDS)
    energon = Path(sys.executable).with_name("energon")
    command = [str(energon), "prepare", str(made), "--non-interactive", "--split-ratio", "1,0,0"]
    command += ["--sample-type", "CrudeWebdataset", "--num-workers", str(threads), "--no-progress"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def loader(work: Work) -> Any:
    """Its training data set, which has no end, and its loader."""
    from dataclasses import dataclass

    import msgpack
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    @dataclass
    class Cell(Sample):
        genes: Any
        values: Any

    @stateless
    def cook(sample: dict[str, Any]) -> Cell:
        packed = sample["mp"]
        cell = msgpack.unpackb(packed) if isinstance(packed, bytes) else packed
        return Cell(**basic_sample_keys(sample), **webdataset.read({"mp": cell}))

    collate = mixed.collator(work)

    class Encoder(DefaultTaskEncoder[Cell, Cell, Any, Any]):
        cookers = [Cooker(cook)]  # noqa: RUF012 (how its documentation has it)

        @stateless
        def batch(self, samples: list[Cell]) -> Any:
            return collate([{"genes": s.genes, "values": s.values} for s in samples])

        def encode_batch(self, batch: Any) -> Any:
            return batch

    made = get_train_dataset(
        work.stores["tars"],
        batch_size=work.batch,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=SEQUENCE,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=work.threads),
        task_encoder=Encoder(),
    )
    return get_savable_loader(made)


PEER = Peer(
    title="Megatron-Energon",
    packages=("megatron-energon", "torch"),
    requires=("torch==2.13.0", "megatron-energon", "webdataset", "msgpack", "h5py"),
    stores={COUNTS: ("tars",), MASKED: ("tars",)},
    endless=True,
    imports=("megatron.energon",),
    ways={
        COUNTS: f"webdataset's tars after `energon prepare`, runs of {SEQUENCE} cells, a buffer of "
        f"{BUFFER:,} in each worker, `get_savable_loader`",
        MASKED: "the same, with scGPT's DataCollator as the task encoder's batch",
    },
    better="Data sets of text, pictures and sound that are blended by weight, samples packed into "
    "sequences, and parts of samples that are fetched when they are needed.",
    convert=convert,
    loader=loader,
    cells=mixed.cells,
    tokens=mixed.tokens,
    save=lambda made: made.save_state_rank(),
    load=lambda made, state: made.restore_state_rank(state),
)

if __name__ == "__main__":
    serve(PEER)

"""cell-load: sets of cells of one perturbation beside controls of their line, as STATE trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.contract import CONTROL, DRUG, LINE, SET_SIZE, SETS, Peer, Work, serve


def loader(work: Work) -> Any:
    """Its data module's training loader: a file a line, rows of a set read in one piece."""
    from cell_load.data_modules import PerturbationDataModule

    folder = Path(work.files[0]).parent
    config = Path(work.scratch) / "cells.toml"
    config.write_text(
        f'[datasets]\ncells = "{folder}"\n\n[training]\ncells = "train"\n\n[zeroshot]\n\n[fewshot]\n'
    )
    made = PerturbationDataModule(
        toml_config_path=str(config),
        embed_key=None,
        output_space="all",
        is_log1p=False,
        batch_size=work.batch,
        cell_sentence_len=SET_SIZE,
        num_workers=work.threads,
        pert_col=DRUG,
        cell_type_key=LINE,
        batch_col=LINE,
        control_pert=CONTROL,
        use_consecutive_loading=True,
    )
    made.setup()
    return made.train_dataloader()


def cells(batch: dict[str, Any]) -> int:
    """Its cells and their controls."""
    return len(batch["pert_cell_emb"]) + len(batch["ctrl_cell_emb"])


def tokens(batch: dict[str, Any]) -> int:
    """Values that are not zero: its rows are dense."""
    return int((batch["pert_cell_emb"] != 0).sum()) + int((batch["ctrl_cell_emb"] != 0).sum())


PEER = Peer(
    title="cell-load",
    packages=("cell-load", "anndata", "torch"),
    requires=("torch==2.13.0", "cell-load"),
    stores={SETS: ()},
    imports=("cell_load.data_modules",),
    ways={
        SETS: '`PerturbationDataModule(use_consecutive_loading=True, output_space="all")` over h5ad '
        "files that are sorted by perturbation, DataLoader's workers; dense rows of all genes"
    },
    better="It needs no conversion where files are a line each and sorted. Lines and perturbations "
    "are held out by a file of settings, and STATE takes its batches as they are.",
    loader=loader,
    cells=cells,
    tokens=tokens,
)

if __name__ == "__main__":
    serve(PEER)

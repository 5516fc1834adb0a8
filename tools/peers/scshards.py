"""scshards itself: packed once, streamed by CellLoader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peers.contract import (
    CONTROL,
    COUNTS,
    DRUG,
    LINE,
    MASKED,
    MAX_LENGTH,
    MAX_RANKED,
    RANKED,
    SET_SIZE,
    SETS,
    Peer,
    Work,
    serve,
)


def convert(files: list[Path], folder: Path, store: str, threads: int) -> None:
    """Pack the cells; group them by line and perturbation; or find the genes' medians."""
    from scshards import PackOptions, ReshardOptions, Vocab, gene_medians, pack, reshard

    if store == "medians":
        (folder / store).mkdir()
        found = gene_medians(str(folder / "shards"))
        (folder / store / "medians.json").write_text(json.dumps(found.by_gene))
    elif store == "grouped":
        asked = ReshardOptions(workers=threads, group_by=(LINE, DRUG))
        reshard(str(folder / "shards"), str(folder / store), asked, progress=False)
    else:
        options = PackOptions(workers=threads, obs=(LINE, DRUG))
        vocab = Vocab.from_genes(sorted(_genes(files[0])))
        pack([str(f) for f in files], str(folder / store), vocab, options, progress=False)


def loader(work: Work) -> Any:
    """CellLoader, with threads."""
    from scshards import CellLoader, CollateOptions, ReadOptions, SetOptions

    options: dict[str, Any] = {"objective": "counts"}
    if work.kind == MASKED:
        options = {"n_bins": 51, "max_length": MAX_LENGTH}
    elif work.kind == RANKED:
        medians = Path(work.stores["medians"]) / "medians.json"
        options = {"objective": "ranks", "medians": medians, "max_length": MAX_RANKED}
    sets = None
    if work.kind == SETS:
        sets = SetOptions(by=(LINE, DRUG), control=CONTROL, size=SET_SIZE)
    return CellLoader(
        work.stores["grouped" if sets else "shards"],
        batch_size=work.batch,
        sets=sets,
        collate=CollateOptions(**options),
        read=ReadOptions(threads=work.threads),
    )


def cells(batch: Any) -> int:
    """Its cells; a control counts as one."""
    return 2 * len(batch) * batch.size if hasattr(batch, "controls") else len(batch.key)


def tokens(batch: Any) -> int:
    """Values, or tokens that are no padding."""
    if hasattr(batch, "controls"):
        return tokens(batch.cells) + tokens(batch.controls)
    return len(batch.counts) if hasattr(batch, "counts") else int((~batch.is_pad).sum())


def _genes(file: Path) -> list[str]:
    import anndata

    return list(anndata.read_h5ad(file, backed="r").var_names)


PEER = Peer(
    title="scshards",
    packages=("scshards", "torch", "numba"),
    requires=(),
    stores={
        COUNTS: ("shards",),
        MASKED: ("shards",),
        RANKED: ("shards", "medians"),
        SETS: ("shards", "grouped"),
    },
    remote=(COUNTS,),
    imports=("scshards.streaming.loader",),
    ways={
        COUNTS: '`pack`; `CellLoader`, `objective="counts"`',
        MASKED: "the same shards; `CollateOptions(n_bins=51, max_length=1200)`",
        RANKED: 'the same shards, ranked as they are read, by `gene_medians`; `objective="ranks"`',
        SETS: "`reshard --group-by line,drug`; `SetOptions`, all genes as sparse rows",
    },
    better="",
    convert=convert,
    loader=loader,
    cells=cells,
    tokens=tokens,
    next_epoch=lambda made, epoch: made.set_epoch(epoch),
    save=lambda made: made.state_dict(),
    load=lambda made, state: made.load_state_dict(state),
)

if __name__ == "__main__":
    serve(PEER)

"""The cells that tools/bench_train measures on, made once and kept in a folder.

They come twice: as a shard set, and as tars of a stock webdataset, as in tools/bench_stream.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from bench_pack_data import NAMES, dense_cells, write_h5ad
from peers import rows, webdataset

from scshards.cells.vocab import Vocab
from scshards.packing.pack import PackOptions, pack

RECIPE = 1
"""To be raised when the shards change, so that older ones are not taken for them."""

CELLS = 4000
SHARDS = 4


def shards(cache: Path, depth: int) -> Path:
    """A folder with `own` and `stock`: CELLS cells, of a median of so many counts each."""
    folder = cache / f"train-recipe{RECIPE}-{CELLS}-{depth}"
    if not folder.exists():
        print(f"making {CELLS:,} cells in {folder}", file=sys.stderr, flush=True)
        making = folder.with_suffix(f".making{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        x = dense_cells(CELLS, seed=0, depth=depth, least=depth // 9)
        source = making / "cells.h5ad"
        write_h5ad(source, x, compression=None)
        options = PackOptions(workers=1, cells_per_shard=-(-CELLS // SHARDS))
        pack([str(source)], str(making / "own"), Vocab.from_genes(NAMES), options, progress=False)
        webdataset.write(making / "stock", rows.cells([source]), CELLS, SHARDS)
        source.unlink()
        making.rename(folder)
    return folder

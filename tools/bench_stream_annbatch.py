"""annbatch over the same cells: raw CSR batches from its own pre-shuffled zarr, as fast as it goes.

    python tools/bench_stream_annbatch.py FOLDER CELLS CORES BATCH_SIZE   prints figures as JSON

FOLDER gets its collection on the first call. It needs annbatch[zarrs], and so Python 3.12, but nothing
of scshards: tools/bench_stream runs it with another Python where its own has no annbatch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

EPOCHS = 5


def main(folder: Path, cells: int, cores: int, batch_size: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    import zarr
    from annbatch import DatasetCollection, Loader

    # Its documentation calls this pipeline essential on local disks.
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    zarr.config.set({"threading.max_workers": cores})
    if not folder.exists():
        make(folder, cells)
    collection = DatasetCollection(str(folder), mode="r")
    loader = Loader(batch_size=batch_size, shuffle=True)
    loader.use_collection(collection)
    seen(loader)
    start, processor = time.perf_counter(), time.process_time()
    done = sum(seen(loader) for _ in range(EPOCHS))
    figures = {
        "cells/s": done / (time.perf_counter() - start),
        "µs of processor a cell": 1e6 * (time.process_time() - processor) / done,
        "cells": done,
    }
    print(json.dumps(figures))


def seen(loader: object) -> int:
    """The cells of an epoch."""
    return sum(batch["X"].shape[0] for batch in loader)


def make(folder: Path, cells: int) -> None:
    """Write the cells as h5ad, and let annbatch make its collection of it."""
    from annbatch import DatasetCollection
    from bench_pack_data import dense_cells, write_h5ad

    with tempfile.TemporaryDirectory(prefix="scshards-bench-") as name:
        source = Path(name) / "cells.h5ad"
        write_h5ad(source, dense_cells(cells, seed=0), compression=None)
        DatasetCollection(str(folder)).add_adatas([str(source)], shuffle=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""The shards that tools/bench_stream measures on, made once and kept in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from bench_pack_data import NAMES, dense_cells, write_h5ad
from peers import rows, webdataset

from scshards.cells.vocab import Vocab
from scshards.packing.options import ReshardOptions
from scshards.packing.pack import PackOptions, pack
from scshards.packing.reshard import reshard
from scshards.shards.manifest import MANIFEST, VOCAB, Manifest
from scshards.shards.tar import Chunks

SHARDS, LINES = 8, 4
RECIPE = 1
"""To be raised when the shards change, so that older ones are not taken for them."""


class Data:
    """Shard sets of the same cells.

    Attributes
    ----------
    cells
        Cells that there are.
    own
        Their shard set, of SHARDS plain tars.
    stock
        Folder of as many tars for stock webdataset.
    peers
        Where other loaders keep the stores that they make of the cells.
    annbatch_python, datasets_python
        The Pythons that run annbatch and datasets.
    medians
        The cells' medians of genes: see `make_medians`.
    beside
        Another checkout of scshards that is measured too, or None.
    """

    def __init__(
        self,
        folder: Path,
        cells: int,
        annbatch_python: str,
        datasets_python: str,
        beside: Path | None = None,
    ) -> None:
        self.beside = beside
        self.cells = cells
        self._folder = folder / f"recipe{RECIPE}-{cells}"
        self.own, self.stock = self._folder / "own", self._folder / "stock"
        self.peers, self.medians = self._folder / "peers", self._folder / "medians.json"
        self.annbatch_python, self.datasets_python = annbatch_python, datasets_python
        if not self._folder.exists():
            print(f"making {cells:,} cells in {self._folder}", file=sys.stderr, flush=True)
            making = self._folder.with_suffix(f".making{os.getpid()}")
            shutil.rmtree(making, ignore_errors=True)
            _make(making, cells)
            making.rename(self._folder)

    def repeated(self, cells: int) -> Path:
        """A shard set of at least so many cells: hard links to the same shards, again and again."""
        times = max(1, -(-cells // self.cells))
        root = self._folder / f"repeated{times}"
        if not (root / MANIFEST).exists():
            (root / "train").mkdir(parents=True, exist_ok=True)
            manifest = Manifest.from_json((self.own / MANIFEST).read_bytes())
            shards = []
            for i in range(times * SHARDS):
                shard = manifest.splits["train"][i % SHARDS]
                copy = dataclasses.replace(
                    shard, path=f"train/{i:06d}.tar", index_path=f"train/{i:06d}.parquet"
                )
                for old, new in ((shard.path, copy.path), (shard.index_path, copy.index_path)):
                    (root / new).unlink(missing_ok=True)
                    os.link(self.own / old, root / new)
                shards.append(copy)
            shutil.copy(self.own / VOCAB, root / VOCAB)
            whole = dataclasses.replace(manifest, splits={"train": tuple(shards)})
            (root / MANIFEST).write_bytes(whole.to_json())
        return root

    def screens(self) -> tuple[Path, Path]:
        """Two sets of the same cells, several times, as lines under perturbations: shuffled, and grouped
        by both."""
        root = self._folder / "screen"
        if not (root / "grouped" / MANIFEST).exists():
            print(f"making {LINES} lines in {root}", file=sys.stderr, flush=True)
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            x, files = dense_cells(self.cells, seed=0), []
            for line in range(LINES):
                rng = np.random.default_rng(line)
                is_control = rng.random(self.cells) < 0.1
                drawn = np.where(is_control, 0, rng.integers(1, 41, self.cells))
                obs = {"line": [f"line{line}"] * self.cells, "drug": [f"d{i:02d}" for i in drawn]}
                files.append(root / f"{line}.h5ad")
                write_h5ad(files[-1], x, compression=None, obs=obs)
            vocab, labels = Vocab.from_genes(NAMES), ("line", "drug")
            options = PackOptions(workers=1, obs=labels, allow_repeats=True)
            pack(list(map(str, files)), str(root / "mixed"), vocab, options, progress=False)
            for file in files:
                file.unlink()
            asked = ReshardOptions(workers=1, group_by=labels)
            reshard(str(root / "mixed"), str(root / "grouped"), asked, progress=False)
        return root / "mixed", root / "grouped"

    def with_arrays(self) -> Path:
        """The cells with arrays beside the genes: X_pca, 50 numbers, and protein, 200 counts."""
        root = self._folder / "arrays"
        if not (root / MANIFEST).exists():
            print(f"making cells with arrays in {root}", file=sys.stderr, flush=True)
            shutil.rmtree(root, ignore_errors=True)
            rng = np.random.default_rng(0)
            obsm = {
                "X_pca": rng.normal(size=(self.cells, 50)).astype(np.float32),
                "protein": rng.poisson(3.0, (self.cells, 200)).astype(np.int32),
            }
            source = self._folder / "arrays.h5ad"
            write_h5ad(source, dense_cells(self.cells, seed=0), compression=None, obsm=obsm)
            options = PackOptions(
                workers=1, cells_per_shard=-(-self.cells // SHARDS), obsm=tuple(obsm)
            )
            pack([str(source)], str(root), Vocab.from_genes(NAMES), options, progress=False)
            source.unlink()
        return root

    def make_medians(self) -> None:
        """Write the medians, unless they are there."""
        from scshards import gene_medians

        if not self.medians.exists():
            self.medians.write_text(json.dumps(gene_medians(self.own).by_gene))

    def manifest_only(self, shards: int, cells: int) -> Path:
        """A set of which there is the manifest alone, as pack would write it: chunks of about 1 MiB."""
        root = self._folder / f"manifest{shards}-{cells}"
        if not (root / MANIFEST).exists():
            root.mkdir(exist_ok=True)
            manifest = Manifest.from_json((self.own / MANIFEST).read_bytes())
            rng = np.random.default_rng(0)
            made = []
            for i in range(shards):
                shard = manifest.splits["train"][i % SHARDS]
                mine = cells // shards + (i < cells % shards)
                table = shard.chunks
                a_chunk = int(table.cells[0])
                n = -(-mine // a_chunk)
                in_chunk = np.full(n, a_chunk)
                in_chunk[-1] = mine - a_chunk * (n - 1)
                stored = in_chunk * (int(table.stored[0]) // a_chunk // 512 * 512)
                chunks = Chunks(
                    cells=in_chunk,
                    stored=stored,
                    raw=stored,
                    sums=rng.integers(0, 1 << 64, n, dtype=np.uint64),
                )
                made.append(
                    dataclasses.replace(
                        shard,
                        path=f"train/{i:06d}.tar",
                        index_path=f"train/{i:06d}.parquet",
                        cells=mine,
                        tokens=3500 * mine,
                        bytes=int(stored.sum()),
                        sha256=rng.bytes(32).hex(),
                        chunks=chunks,
                    )
                )
            shutil.copy(self.own / VOCAB, root / VOCAB)
            whole = dataclasses.replace(manifest, splits={"train": tuple(made)})
            (root / MANIFEST).write_bytes(whole.to_json())
        return root

    def warm(self) -> None:
        """Read every shard once, so that it is in the page cache."""
        for path in sorted(self._folder.glob("*/**/*.tar")):
            if path.parts[-3] == "own" or path.parts[-2] == "stock":
                path.read_bytes()


def write_source(source: Path, cells: int) -> None:
    """The cells as h5ad."""
    write_h5ad(source, dense_cells(cells, seed=0), compression=None)


def _make(folder: Path, cells: int) -> None:
    folder.mkdir(parents=True)
    source = folder / "cells.h5ad"
    write_source(source, cells)
    options = PackOptions(workers=1, cells_per_shard=-(-cells // SHARDS))
    pack([str(source)], str(folder / "own"), Vocab.from_genes(NAMES), options, progress=False)
    webdataset.write(folder / "stock", rows.cells([source]), cells, SHARDS)
    source.unlink()

"""Small AnnData files, and what their cells are in a shard set, by a formula of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.sparse as sp
from plain_reader import MEMBER as MEMBER
from plain_reader import Member as Member
from plain_reader import assert_holds as assert_holds
from plain_reader import key as key
from plain_reader import leb128 as leb128
from plain_reader import members as members
from plain_reader import read_back as read_back

from scshards import PackOptions, Vocab
from scshards.packing.pack import append, pack
from scshards.packing.reshard import ReshardOptions, merge, reshard
from scshards.sources.rows import Source


def counts(n_cells: int, n_genes: int, *, seed: int = 0, dtype: Any = np.float32) -> Any:
    """A dense count matrix, about a third non-zero, with at least one gene in each cell."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(0.5, (n_cells, n_genes)) * rng.integers(1, 60, (n_cells, n_genes))
    if n_genes:
        x[:, seed % n_genes] += 1
    return x.astype(dtype)


def adata(x: Any, *, genes: Sequence[str] | None = None, obs: Any = None) -> anndata.AnnData:
    """An AnnData of a matrix with named cells and genes."""
    names = [f"G{i:03d}" for i in range(x.shape[1])] if genes is None else list(genes)
    frame = pd.DataFrame(obs or {}, index=[f"cell{i}" for i in range(x.shape[0])])
    return anndata.AnnData(x, obs=frame, var=pd.DataFrame(index=names))


def write(path: Path, x: Any, *, form: str = "csr", **more: Any) -> Path:
    """Write a matrix as h5ad: csr, csc or dense."""
    made = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[form](x)
    adata(made, **more).write_h5ad(path, compression="gzip")
    return path


def write_10x(path: Path, x: Any, *, version: int = 3, genome: str = "GRCh38") -> Path:
    """A matrix (cells x genes) as Cell Ranger writes it: genes G000 ..., ids E000 ..."""
    matrix = sp.csc_matrix(np.asarray(x, np.int32).T)
    n = matrix.shape[0]
    symbols, ids = ([f"{c}{i:03d}".encode() for i in range(n)] for c in "GE")
    with h5py.File(path, "a") as f:
        group = f.create_group("matrix" if version == 3 else genome)
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(matrix, name), compression="gzip")
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array([f"C{i}-1".encode() for i in range(matrix.shape[1])], "S9")
        if version == 2:
            group["gene_names"], group["genes"] = symbols, ids
        else:
            features = group.create_group("features")
            features["name"], features["id"] = symbols, ids
            features["feature_type"] = [b"Gene Expression"] * n
            features["genome"] = [genome.encode()] * n
            features["_all_tag_keys"] = [b"genome"]
    return path


def dense(source: Source, start: int = 0, stop: int | None = None, **limits: int) -> np.ndarray:
    """The rows start:stop as the source's blocks give them."""
    stop = source.n_rows if stop is None else stop
    out = np.zeros((stop - start, source.n_columns))
    at = start
    for block in source.blocks(start, stop, **limits):
        n = len(block.indptr) - 1
        assert block.first_row == at
        rows = np.repeat(np.arange(at - start, at - start + n), np.diff(block.indptr))
        np.add.at(out, (rows, block.indices), block.data)
        at += n
    assert at == stop
    return out


def quiet_pack(inputs: Any, root: Path | str, vocab: Any, **options: Any) -> Any:
    """Pack in this process without a word."""
    return pack(inputs, root, vocab, PackOptions(**({"workers": 1} | options)), progress=False)


def quiet_append(
    inputs: Any, root: Path | str, *, vocab: Any = None, restart: bool = False, **changes: Any
) -> Any:
    return append(inputs, root, {"workers": 1} | changes, vocab, False, restart=restart)


def quiet_reshard(root: Path | str, new: Path | str, **options: Any) -> Any:
    return reshard(root, new, ReshardOptions(**({"workers": 1} | options)), progress=False)


def quiet_merge(roots: list[Path], new: Path | str, **options: Any) -> Any:
    return merge(roots, new, ReshardOptions(**({"workers": 1} | options)), progress=False)


def vocab_of(n_genes: int) -> Vocab:
    return Vocab.from_genes(f"G{i:03d}" for i in range(n_genes))


def expected(x: Any, genes: Sequence[str], vocab: Vocab) -> list[dict[int, float]]:
    """{token: value} of each row of a matrix: unknown genes left out, shared tokens added up."""
    ids = vocab.to_dict()
    rows: list[dict[int, float]] = []
    for row in sp.csr_matrix(x, copy=True) if sp.issparse(x) else x:
        dense = np.asarray(row.todense()).ravel() if sp.issparse(row) else np.asarray(row).ravel()
        cell: dict[int, float] = {}
        for column in np.flatnonzero(dense):
            if genes[column] in ids:
                token = ids[genes[column]]
                cell[token] = cell.get(token, 0) + dense[column].item()
        rows.append(cell)
    return rows


def index(root: Path, path: str) -> pd.DataFrame:
    return pq.read_table(root / path).to_pandas()


def tree_sums(root: Path) -> dict[str, str]:
    """{path: SHA-256} of every file below a folder."""
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def shard_sums(root: Path) -> dict[str, str]:
    """The same of all but the manifest, which names the inputs."""
    return {path: sum_ for path, sum_ in tree_sums(root).items() if path != "manifest.json"}


def three_inputs_two_sets(folder: Path, n_cells: int, n_genes: int, **options: Any) -> Path:
    """0.h5ad to 2.h5ad with donors, and vocab.json; a set of the first two, and one of the third: a and b."""
    paths = [
        write(
            folder / f"{i}.h5ad",
            counts(n_cells, n_genes, seed=i),
            obs={"donor": [f"d{(i + j) % 5}" for j in range(n_cells)]},
        )
        for i in range(3)
    ]
    vocab = vocab_of(n_genes)
    (folder / "vocab.json").write_bytes(vocab.to_json())
    for name, some in (("a", paths[:2]), ("b", paths[2:])):
        quiet_pack(some, folder / name, vocab, obs=("donor",), valid_fraction=0.3, **options)
    return folder

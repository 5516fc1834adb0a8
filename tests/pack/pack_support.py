"""Small AnnData files, and a reader of shards that shares no code with scshards.

Shards are read with stock webdataset (or zstandard and tarfile), members with msgpack and a LEB128
decoder in plain Python.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import msgpack
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.sparse as sp

from scshards import PackOptions, Vocab
from scshards.pack.run import pack

MEMBER = "cell.mp"


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


def quiet_pack(inputs: Any, root: Path | str, vocab: Any, **options: Any) -> Any:
    """Pack in this process without a word."""
    return pack(inputs, root, vocab, PackOptions(**({"workers": 1} | options)), progress=False)


def vocab_of(n_genes: int) -> Vocab:
    return Vocab.from_genes(f"G{i:03d}" for i in range(n_genes))


@dataclass(frozen=True)
class Member:
    """One cell as a stranger reads it."""

    split: str
    shard: str
    genes: list[int]
    values: list[float]
    labels: dict[str, Any]


def read_back(root: Path) -> dict[str, Member]:
    """{key: cell} of all shards, in the order of the splits, shards and members."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    kind = manifest["values"]["kind"]
    out: dict[str, Member] = {}
    for split, tree in manifest["splits"].items():
        for shard in tree["shards"]:
            for key, cell in members(root / shard["path"]):
                genes, at = [], 0
                for delta in leb128(cell["genes"]):
                    at += delta
                    genes.append(at)
                stored = cell["values"]
                values = (
                    leb128(stored)
                    if kind == "counts"
                    else list(struct.unpack(f"<{len(stored) // 4}f", stored))
                )
                assert cell["n"] == len(genes) == len(values)
                assert key not in out, "a key appears twice"
                out[key] = Member(split, shard["path"], genes, values, cell.get("labels", {}))
    return out


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, msgpack map) of a shard: stock webdataset for tar, zstandard and tarfile for tar.zst."""
    if path.suffix == ".zst":
        import zstandard

        with path.open("rb") as f:
            data = zstandard.ZstdDecompressor().stream_reader(f, read_across_frames=True).read()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for info in tar:
                assert info.name.endswith(f".{MEMBER}")
                yield info.name.partition(".")[0], msgpack.unpackb(tar.extractfile(info).read())
        return
    import webdataset

    for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
        yield sample["__key__"], sample[MEMBER]


def leb128(data: bytes) -> list[int]:
    """Seven bits a byte, low ones first, the top bit says that more come."""
    out, number, shift = [], 0, 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            out.append(number)
            number, shift = 0, 0
    assert shift == 0, "the data ends inside a number"
    return out


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


def key(source: int, row: int) -> str:
    return f"{source:06d}-{row:010d}"


def assert_holds(root: Path, want: dict[str, dict[int, float]]) -> dict[str, Member]:
    """The shards hold exactly these cells, genes ascending, value for value."""
    found = read_back(root)
    assert sorted(found) == sorted(want)
    for k, cell in want.items():
        assert found[k].genes == sorted(cell), k
        assert dict(zip(found[k].genes, found[k].values, strict=True)) == cell, k
    return found


def index(root: Path, path: str) -> pd.DataFrame:
    return pq.read_table(root / path).to_pandas()


def tree_sums(root: Path) -> dict[str, str]:
    """{path: SHA-256} of every file below a folder."""
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }

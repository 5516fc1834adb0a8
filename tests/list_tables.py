"""Cells as lists of token ids, written as those write them whose files users have.

write_scbank       scGPT's DataBank.from_anndata, by the layout and the order of its steps
write_all_counts   what build_large_scale_data.py and process_allcounts.py make of scBank folders
write_saved        Hugging Face's Dataset.save_to_disk
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

SPECIALS = ("<pad>", "<cls>", "<eoc>")


def tokenized(x: Any, genes: Sequence[str], vocab: Mapping[str, int]) -> dict[str, list[Any]]:
    """The columns of a scBank's table: zero rows go first, then columns without a token."""
    matrix = sp.csr_matrix(x)
    tokens = [vocab.get(gene, -100) for gene in genes]
    rows = [
        (matrix.indices[a:b], matrix.data[a:b])
        for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
        if matrix.data[a:b].any()
    ]
    lists = [
        [(tokens[c], float(v)) for c, v in zip(columns, values, strict=True) if tokens[c] != -100]
        for columns, values in rows
    ]
    return {
        "id": list(range(len(lists))),
        "genes": [[token for token, _ in cell] for cell in lists],
        "expressions": [[value for _, value in cell] for cell in lists],
    }


def as_table(columns: Mapping[str, Any], value: Any = None, token: Any = None) -> pa.Table:
    """An Arrow table with lists of int64 and, unless `value` says otherwise, of float64."""
    types = {
        "genes": pa.list_(token or pa.int64()),
        "expressions": pa.list_(value or pa.float64()),
    }
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    return pa.table(arrays)


def write_scbank(
    folder: Path,
    x: Any,
    genes: Sequence[str],
    vocab: Mapping[str, int],
    *,
    table: str = "counts",
    rows_per_group: int = 1000,
) -> Path:
    """A `.scb` folder."""
    folder.mkdir(parents=True)
    columns = tokenized(x, genes, vocab)
    manifest = {"on_disk_format": "parquet", "main_data": table, "gene_vocab_md5": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "studytable.json").write_text(json.dumps({"study_ids": None}))
    (folder / "gene_vocab.json").write_text(json.dumps(dict(vocab)))
    path = folder / f"{table}.datatable.parquet"
    pq.write_table(as_table(columns), path, row_group_size=rows_per_group)
    return folder


def write_all_counts(folder: Path, banks: Sequence[Path]) -> Path:
    """`all_counts`: links to the banks' tables, and one table of all cells with `<cls>` before them."""
    folder.mkdir()
    cls_id = len(json.loads((banks[0] / "gene_vocab.json").read_text())) + 1
    parts = []
    for bank in banks:
        table = bank / "counts.datatable.parquet"
        (folder / f"{bank.stem}.datatable.parquet").symlink_to(table.absolute())
        columns = pq.read_table(table).to_pydict()
        columns["genes"] = [[cls_id, *cell] for cell in columns["genes"]]
        columns["expressions"] = [[-2.0, *cell] for cell in columns["expressions"]]
        parts.append(as_table(columns))
    pq.write_table(pa.concat_tables(parts), folder / "cls_prefix_data.parquet", row_group_size=7)
    return folder


def write_saved(
    folder: Path, tables: Sequence[pa.Table], *, batch: int = 1000, features: Any = None
) -> Path:
    """A saved dataset with a data file for each table."""
    folder.mkdir(parents=True)
    files = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(files, tables, strict=True):
        info = {"info": {"features": features or {}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(table, max_chunksize=batch)
    state = {
        "_data_files": [{"filename": name} for name in files], "_fingerprint": "0123456789abcdef",
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
        "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(
        json.dumps({"citation": "", "description": "", "features": features or {}}, indent=2)
    )
    return folder


def ids_of(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def ragged(n_rows: int, n_ids: int, *, seed: int = 0, longest: int = 8) -> dict[str, list[Any]]:
    """Columns of random rows, some of them empty, ids not in order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, longest + 1, n_rows)
    return {
        "genes": [rng.choice(n_ids, min(n, n_ids), replace=False).tolist() for n in sizes],
        "expressions": [rng.integers(1, 300, min(n, n_ids)).astype(float).tolist() for n in sizes],
    }

"""Format 1 does not change: the same inputs, options and seed give the bytes that they always gave.

tests/golden/same_bytes.json holds the SHA-256 of every tar that the tree of commit fb66068 wrote of the
inputs made here, in plain tars (what zstd and Parquet add are those libraries' bytes, which may change).
It was written by `python tests/story/test_story_same_bytes.py FOLDER` on that commit.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

GOLDEN = Path(__file__).parents[1] / "golden" / "same_bytes.json"
CELLS, GENES = 90, 60

COMMANDS: dict[str, list[str]] = {
    "plain": ["pack", "a.h5ad", "b.h5ad", "c.h5ad", "--no-shuffle", "--vocab", "vocab.json"],
    "mixed": ["pack", "a.h5ad", "b.h5ad", "c.h5ad", "--seed", "5", "--min-genes", "12", "--vocab", "vocab.json"],
    "labels": ["pack", "a.h5ad", "b.h5ad", "--obs", "type,age", "--valid-fraction", "0.3", "--split-by", "donor", "--vocab", "vocab.json"],
    "floats": ["pack", "d.h5ad", "--values", "float", "--test-fraction", "0.2", "--seed", "2", "--vocab", "vocab.json"],
    "chosen": ["pack", "a.h5ad", "c.h5ad", "--where", "age > 30", "--unique", "barcode", "--vocab", "vocab.json"],
    "grown": ["pack", "e.h5ad", "--append"],
    "resharded": ["reshard", "labels", "--seed", "9", "--where", "n_genes>14"],
    "ordered": ["reshard", "mixed", "--no-shuffle", "--one-split"],
    "merged": ["merge", "mixed", "chosen", "--obs=", "--same-names"],
}  # fmt: skip
"""{set: the command that makes it}, in order; "grown" adds to the set "plain"."""


def counts(first: int) -> np.ndarray:
    """float32 [CELLS, GENES]: arithmetic alone, the same on every machine and with every library."""
    i, j = np.meshgrid(np.arange(CELLS), np.arange(GENES), indexing="ij")
    drawn = (i * 7919 + j * 104_729 + first * 31 + (i * j) % 89 * 53) % 97
    return np.where(drawn < 25, drawn * drawn % 300, 0).astype(np.float32)


def write_inputs(folder: Path) -> None:
    """Five inputs in CSR, CSC and dense layouts, and their vocabulary."""
    genes = [f"GENE{j:02d}" for j in range(GENES)]
    for n, (name, layout) in enumerate(
        {
            "a": sp.csr_matrix,
            "b": sp.csc_matrix,
            "c": np.asarray,
            "d": sp.csr_matrix,
            "e": sp.csr_matrix,
        }.items()
    ):
        x = counts(n + 1)
        obs = pd.DataFrame(
            {
                "type": pd.Categorical([f"type {(i + n) % 3}" for i in range(CELLS)]),
                "age": [20.0 + (i * 7 + n) % 50 for i in range(CELLS)],
                "donor": [f"D{(i + n) % 7}" for i in range(CELLS)],
                "barcode": [f"{n // 2}-{i % 80}" for i in range(CELLS)],
            },
            index=[f"cell {i}" for i in range(CELLS)],
        )
        made = anndata.AnnData(
            layout(x / 4 if name == "d" else x), obs, pd.DataFrame(index=genes[n:] + genes[:n])
        )
        made.write_h5ad(folder / f"{name}.h5ad")
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(["<pad>", "<cls>", "<eoc>", *genes[:55]])})
    )


def tar_sums(folder: Path) -> dict[str, dict[str, str]]:
    """{set: {tar: SHA-256}} of what COMMANDS make in `folder`."""
    from scshards.cli import main

    write_inputs(folder)
    sums = {}
    for name, command in COMMANDS.items():
        names = [str(folder / w) if (folder / w).exists() else w for w in command]
        root = folder / ("plain" if name == "grown" else name)
        size = [] if name == "grown" else ["--cells-per-shard", "25"]
        with pytest.raises(SystemExit) as end:
            main([*names, "-o", str(root), *size, "--workers", "1"])
        assert not end.value.code, name
        sums[name] = {
            tar.relative_to(root).as_posix(): hashlib.sha256(tar.read_bytes()).hexdigest()
            for tar in sorted(root.glob("*/*.tar"))
        }
    return sums


def test_the_tars_are_those_of_the_first_tree(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = tar_sums(tmp_path)
    assert list(found) == list(golden)
    for name, sums in golden.items():
        assert found[name] == sums, name
        assert sums


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(tar_sums(Path(sys.argv[1])), indent=1) + "\n")

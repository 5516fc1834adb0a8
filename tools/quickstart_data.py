"""Take the real cells of tools/quickstart out of two wheels, as h5ad files.

    python tools/quickstart_data.py WHEELS OUT

celltypist's sample (MIT) is a CSV of integer counts, 559 immune cells; it becomes an AnnData with
the counts as they are. scirpy's test file (BSD-3; Wu et al., Nature 2020) is an h5ad of 200 T cells and
is copied. Both get the same obs columns, so that pack can keep them as labels.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

CSV = ("celltypist-", "celltypist/data/samples/sample_cell_by_gene.csv", "celltypist.h5ad")
H5AD = ("scirpy-", "scirpy/tests/data/wu2020_200_v0_11.h5ad", "wu2020.h5ad")


def main(wheels: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    raw = unpack(wheels, CSV[0], CSV[1], out / "sample_cell_by_gene.csv")
    table = pd.read_csv(raw, index_col=0)
    counts = np.rint(table.to_numpy())
    # The CSV spells some counts as 0.999999999999999.
    if not np.allclose(counts, table.to_numpy(), rtol=0, atol=1e-9):
        sys.exit(f"{raw}: the sample no longer holds whole counts")
    cells = anndata.AnnData(csr_matrix(counts, dtype=np.float32))
    cells.obs_names, cells.var_names = table.index.astype(str), table.columns.astype(str)
    # The sample names neither donors nor tissues.
    cells.obs["patient"] = cells.obs["source"] = "celltypist sample"
    cells.write_h5ad(out / CSV[2], compression="gzip")
    unpack(wheels, H5AD[0], H5AD[1], out / H5AD[2])
    raw.unlink()


def unpack(wheels: Path, prefix: str, member: str, target: Path) -> Path:
    """Copy one file out of the wheel whose name begins with `prefix`."""
    found = sorted(wheels.glob(f"{prefix}*.whl"))
    if not found:
        sys.exit(f"no wheel {prefix}*.whl in {wheels}")
    with zipfile.ZipFile(found[-1]) as wheel:
        target.write_bytes(wheel.read(member))
    return target


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

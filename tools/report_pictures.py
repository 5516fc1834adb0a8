"""The pictures of docs/images that show a report, made anew.

    python tools/report_pictures.py quickstart QUICKSTART      # of tools/quickstart's set
    python tools/report_pictures.py million WORK [--cells N]   # of a million small cells, made in WORK

Needs Chromium, which draws the page (`apt install chromium`). `million` makes four h5ad files of cells
with about 100 values each and five labels, packs them, and says what the report took.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH = 1280
GENES, TYPES, DONORS, TISSUES = 2000, 24, 120, 9
MEASURED = """
import sys
from scshards.base.memory import peak_bytes
from scshards.cli import main
try:
    main(sys.argv[1:])
finally:
    print(f"at most {peak_bytes() / 1e6:.0f} MB", file=sys.stderr)
"""


def quickstart(folder: Path) -> None:
    """A picture of the report of tools/quickstart's set."""
    os.chdir(folder.parent)  # the page has addresses as they were given
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        run("report", f"{folder.name}/shards", "-o", str(page))
        picture(page, IMAGES / "report.png", height=1720)


def million(folder: Path, cells: int) -> None:
    """Make the cells, the set and the page where they are not there, and a picture of it."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # the page has addresses as they were given
    if not Path("million").exists():
        files = [f"lab{i}.h5ad" for i in range(4)]
        for i, file in enumerate(files):
            print(f"making {file}", file=sys.stderr, flush=True)
            make_cells(cells // 4, i).write_h5ad(file)
        run("vocab", "build", *files, "-o", "vocab.json")
        run(
            *("pack", *files, "-o", "million", "--vocab", "vocab.json"),
            *("--obs", "cell_type,tissue,donor,sex,age", "--split-by", "donor"),
            *("--valid-fraction", "0.1", "--test-fraction", "0.05", "--min-genes", "25"),
        )
        for file in files:
            Path(file).unlink()
    start = time.monotonic()
    made = [sys.executable, "-c", MEASURED, "report", "million", "-o", "report.html"]
    subprocess.run(made, check=True)
    print(f"report: {time.monotonic() - start:.1f} s with its start", file=sys.stderr)
    picture(Path("report.html"), IMAGES / "report-million.png", height=2300)


def make_cells(n: int, seed: int) -> anndata.AnnData:
    """Cells of one laboratory: types in its own shares, each with genes and a depth of its own."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(TYPES, n, p=rng.dirichlet(np.linspace(4, 0.3, TYPES)))
    donor = rng.integers(0, DONORS // 4, n) + seed * DONORS // 4
    depth = rng.lognormal(np.log(np.linspace(130, 30, TYPES))[kind], 0.45)
    lengths = np.clip(depth, 8, 600).astype(np.int64)
    indptr = np.concatenate(([0], np.cumsum(lengths)))
    # Gaps between a cell's genes, about as wide as its genes are few, from where its type begins.
    gaps = rng.integers(1, np.repeat(np.maximum(2, 2 * GENES // (lengths + 1)), lengths))
    ids = np.cumsum(gaps)
    ids -= np.repeat(ids[indptr[:-1]] - gaps[indptr[:-1]], lengths)
    ids = (ids + np.repeat(kind * 61, lengths)) % GENES
    values = rng.geometric(0.3, len(ids)).astype(np.float32)
    x = sp.csr_matrix((values, ids.astype(np.int32), indptr), shape=(n, GENES))
    x.sum_duplicates()
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type {k + 1:02d}" for k in kind]),
            "tissue": pd.Categorical(
                [f"tissue {t + 1}" for t in (donor * 7 + kind // 6) % TISSUES]
            ),
            "donor": pd.Categorical([f"D{d:03d}" for d in donor]),
            "sex": pd.Categorical(
                np.where(rng.random(n) < 0.07, None, np.where(donor % 2, "f", "m"))
            ),
            "age": 20.0 + donor * 13 % 60,
        },
        index=[f"lab{seed}-{i}" for i in range(n)],
    )
    own = (np.arange(GENES) % 10 == 0) & (np.arange(GENES) // 500 == seed)
    names = [f"LAB{seed}-{i:04d}" if own[i] else f"GENE{i:04d}" for i in range(GENES)]
    return anndata.AnnData(x, obs, pd.DataFrame(index=names))


def run(*arguments: str) -> None:
    """A command of scshards, shown."""
    print("$ scshards", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "scshards", *arguments], check=True)


def picture(page: Path, output: Path, *, height: int) -> None:
    """The top of a page as a PNG of 256 colours."""
    from PIL import Image

    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("there is no Chromium on this machine: apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        subprocess.run(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--disable-dev-shm-usage", f"--user-data-dir={folder}/profile"),
                *(f"--window-size={WIDTH},{height}", "--virtual-time-budget=30000"),
                *(f"--screenshot={shot}", page.resolve().as_uri()),
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        Image.open(shot).convert("RGB").quantize(256).save(output, optimize=True)
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("quickstart", "million"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=1_020_000)
    asked = parser.parse_args()
    if asked.what == "quickstart":
        quickstart(asked.folder)
    else:
        million(asked.folder, asked.cells)

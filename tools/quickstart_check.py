"""The closing table of tools/quickstart; fails when the model is not well below the baselines.

python tools/quickstart_check.py QUICKSTART SECONDS SECONDS_OF_SETUP
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scshards.base.progress import Table, duration
from scshards.shards.shardset import ShardSet

MARGIN = 0.15
"""How far below the better baseline the model must come."""


def main(folder: Path, seconds: float, setup: float) -> None:
    manifest = ShardSet(folder / "shards").manifest
    scores = json.loads((folder / "run" / "evaluation.json").read_text())
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if m["kind"] == "train"]
    cells_per_s = sorted(m["cells_per_s"] for m in steps)[len(steps) // 2]
    stored = sum(s.bytes for shards in manifest.splits.values() for s in shards)
    tokens = sum(manifest.tokens(split) for split in manifest.splits)
    rows = [
        ("cells packed", f"{sum(manifest.cells(s) for s in manifest.splits):,}"),
        ("held out", f"{manifest.cells('valid'):,}"),
        ("genes in the vocabulary", f"{manifest.vocab_size:,}"),
        ("stored bytes per value", f"{stored / tokens:.2f}"),
        ("training, median", f"{cells_per_s:,.0f} cells/s"),
        ("masked MSE, model", f"{scores['model']:.2f}"),
        ("masked MSE, each gene's mean", f"{scores['gene_mean']:.2f}"),
        ("masked MSE, each cell's mean", f"{scores['cell_mean']:.2f}"),
        ("model below the better one by", f"{100 * scores['margin']:.1f}%"),
        ("time, environment and download", duration(setup)),
        ("time, all", duration(seconds)),
        ("picture", str(folder / "quickstart.png")),
        ("report, for a browser", str(folder / "report.html")),
    ]
    print("\n" + Table(("quickstart", ""), rows).text())
    if scores["margin"] < MARGIN:
        sys.exit(f"\nthe model is not {100 * MARGIN:.0f}% below the better baseline")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))

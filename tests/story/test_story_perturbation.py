"""Story: the blocks of docs/howto/perturbation.md, run as they stand there, on the cells of its example."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import docs_support

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "howto" / "perturbation.md").read_text()


def blocks(language: str) -> list[str]:
    return [b.text for b in docs_support.blocks(PAGE) if b.language == language and not b.reason]


def test_the_how_to_runs_as_it_stands(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "perturbation.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.make_cells(tmp_path / "screen.h5ad", 6, 3, cells=70)
    (splits,) = blocks("toml")
    (tmp_path / "splits.toml").write_text(splits)
    commands, check = blocks("sh")
    first, second = blocks("python")
    checks = (
        "assert loader.sets.groups == 6 * 3 - 3 - 2 and held_out.sets.groups == 3 + 1\n"
        "assert is_set.any() and not is_set.all()\n"
        "print('trained', float(loss))\n"
    )
    (tmp_path / "howto.py").write_text(first + second + checks)
    python = Path(sys.executable)
    env = os.environ | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = (commands + check).replace("scshards ", f"{python} -m scshards ")
    script += f"{python} howto.py\n"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SetSummary(groups=13, contexts=18" in done.stdout and "trained " in done.stdout
    # The file that the page shows is read as cell-load's.
    assert "read each chunk" not in done.stderr

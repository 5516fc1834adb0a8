"""Story: the examples of README.md, run as they stand there, on generated cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import pytest
from docs_support import Block, blocks, make_cells, run_shell

README = (Path(__file__).parents[2] / "README.md").read_text()


def example(language: str) -> Block:
    """The one block of a language."""
    (found,) = (b for b in blocks(README) if b.language == language)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, python: str) -> Path:
    """A folder in which the commands of README.md have run."""
    folder = tmp_path_factory.mktemp("readme")
    make_cells(folder)
    (folder / "printed").write_text(run_shell(example("sh").text, folder, python))
    return folder


def test_the_commands(folder: Path, python: str) -> None:
    assert "best:" in (folder / "printed").read_text()
    assert "150 cells" in run_shell("scshards verify shards", folder, python)
    assert (folder / "run" / "best_model.pt").exists()
    embedded = anndata.read_h5ad(folder / "a_embedded.h5ad")
    assert embedded.obsm["X_scshards"].shape == (90, 64)


def test_the_loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(example("python").text, "README.md", "exec"), names)
    batch = names["batch"]
    length = batch.genes.shape[1]
    for field in ("genes", "values", "targets"):
        assert getattr(batch, field).shape == (8, length)
    assert batch.labels["cell_type"].shape == (8,)
    assert names["state"]["epoch"] == 1  # the pass is over, and so the next one begins


def test_it_is_one_screen() -> None:
    """What is longer has a page of its own."""
    assert len(README.splitlines()) <= 80

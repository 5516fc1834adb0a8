"""The pages of docs/: their blocks run as they stand there, and every link and anchor leads somewhere.
Notebooks show what their cells print and draw.

The blocks of a page run in order, in a folder of its own with generated cells, the shard set `shards` and the
run `run`; tests/docs_support.py says how a page tells what can't be run, and what was printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
import tomllib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from docs_support import Block, blocks, make_cells, run_shell

from scshards import Vocab

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
NOTEBOOKS = sorted(p for p in DOCS.rglob("*.ipynb") if "_build" not in p.parts)
OTHERS = [*ROOT.glob("*.md"), ROOT / "examples" / "README.md"]

FOLDERS = ("tutorials", "howto", "reference", "explanation")
OURS = [p for p in PAGES if p.parent.name in FOLDERS or p.stem in ("index", "faq")]
"""Pages whose blocks run, or say why not."""

SHOWN = {"", "text", "toml", "json", "hex", "hexdump", "{eval-rst}", "{toctree}"}
"""Languages of blocks that are looked at, or read, and not run."""

ELSEWHERE = re.compile(r"^<!-- run by (tests/\S+\.py) -->$", re.M)
SLOW = re.compile(r"^<!-- slow: .+ -->$", re.M)
EMPTY = "<!-- starts in an empty folder -->"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs_here(page: Path) -> bool:
    text = page.read_text()
    return ELSEWHERE.search(text) is None and any(b.is_run for b in blocks(text))


RUN = [
    pytest.param(p, id=name_of(p), marks=[pytest.mark.slow] if SLOW.search(p.read_text()) else [])
    for p in OURS
    if runs_here(p)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, python: str) -> Path:
    """A folder with cells, `vocab.json`, `shards` and `run`, as the first two tutorials make them."""
    folder = tmp_path_factory.mktemp("docs")
    make_cells(folder)
    commands = """
        scshards vocab build a.h5ad b.h5ad -o vocab.json
        scshards pack a.h5ad b.h5ad -o shards --vocab vocab.json --obs cell_type,donor_id \\
            --valid-fraction 0.2 --split-by donor_id
        scshards train shards -o run --config quickstart
    """
    run_shell(commands, folder, python)
    return folder


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_run(
    page: Path,
    world: Path,
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    folder = tmp_path / "world"
    if EMPTY in page.read_text():
        folder.mkdir()
    else:
        shutil.copytree(world, folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    url = "s3://bucket"
    found = blocks(page.read_text())
    env: dict[str, str] = {}
    if any(b.is_run and url in b.text for b in found):
        s3 = request.getfixturevalue("s3")
        url, env = s3.url, dict(s3.env)
        run_shell(f"scshards reshard shards -o {url}/shards", folder, python, env)
    if any(b.needs_census for b in found):
        census = request.getfixturevalue("census")
        of_census = ("LIST", "SHOW", "INDEX", "DOWNLOAD")
        env |= {f"SCSHARDS_CENSUS_{command}_QUERIES": census.queries for command in of_census}
        genes = ["OLD-GENE", *census.anndata().var.feature_name[:5]]
        Path("scGPT_human_vocab.json").write_bytes(Vocab.from_genes(genes).to_json())
    names: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for block in found:
        text = block.text.replace("s3://bucket", url)
        if block.needs_census:  # it has few donors
            text = text.replace("--valid-fraction 0.01", "--valid-fraction 0.3")
        at = f"{name_of(page)}, line {block.line}"
        if block.note == "output":
            assert not unlike(block.text, printed), (
                f"{at}: {unlike(block.text, printed)}\n{printed}"
            )
        elif block.language == "toml":
            tomllib.loads(text)
            if of := re.match(r"# (\w+\.toml)\n", text):
                Path(of[1]).write_text(text)
        elif block.language == "json":
            json.loads(text)
        elif block.can_run and block.language == "sh":
            printed = run_shell(text, folder, python, env)
        elif block.can_run:
            script = tmp_path / f"line{block.line}.py"
            script.write_text(text)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, str(script), "exec"), names)
            printed = out.getvalue()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_a_notebook_shows_what_its_cells_do(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run here without Jupyter: the same lines are printed, and as many figures are drawn."""
    import matplotlib
    import matplotlib.pyplot as plt

    assert notebook.stat().st_size < 400_000, "it is to be read"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(plt, "show", lambda: None)
    names: dict[str, Any] = {"__name__": "notebook"}
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    with matplotlib.rc_context({"backend": "agg"}):
        for number, cell in enumerate(cells, start=1):
            text = "".join(cell["source"])
            lines, pictures = shown_by(cell)
            assert (cell["execution_count"], cell["metadata"]) == (number, {}), "tools/notebook"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, f"{notebook.name}, cell {number}", "exec"), names)
            assert out.getvalue() == lines, text
            assert len(plt.get_fignums()) == pictures, text
            plt.close("all")


def shown_by(cell: dict[str, Any]) -> tuple[str, int]:
    """What a cell of a notebook printed, and how many pictures it has."""
    lines, pictures = "", 0
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            lines += "".join(output["text"])
        else:
            assert "image/png" in output.get("data", {}), output
            pictures += 1
    return lines, pictures


def unlike(shown: str, printed: str) -> str | None:
    """The first line that a page shows and that was not printed, in order; ... stands for anything."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in shown.splitlines():
        wanted = ".*".join(re.escape(" ".join(part.split())) for part in line.split("..."))
        while lines and not re.fullmatch(wanted, lines[0]):
            lines.pop(0)
        if not lines and wanted not in ("", ".*"):
            return line
    return None


def complaints(text: str) -> list[str]:
    """What blocks of a page have neither run nor a reason, or can't be told."""
    found = []
    for block in blocks(text):
        if block.language in ("sh", "python"):
            if block.reason == "":
                found.append(f"line {block.line}: a reason is missing")
        elif block.language not in SHOWN:
            found.append(f"line {block.line}: {block.language} is neither run nor shown")
        elif block.reason is not None:
            found.append(f"line {block.line}: {block.language} is never run")
    bare = re.sub(r"^(`{3,}).*?^\1`*$", "", text, flags=re.S | re.M)
    found += [f"indented: {line.strip()}" for line in re.findall(r"(?<=\n\n)    .*", bare)]
    return found


@pytest.mark.parametrize("page", OURS, ids=name_of)
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    """`pytest -rP -k says_why_not` lists those that are not run."""
    text = page.read_text()
    assert not complaints(text)
    for block in blocks(text):
        if block.reason is not None:
            print(f"{name_of(page)}, line {block.line}: {block.reason}")
    if of := ELSEWHERE.search(text):
        assert page.name in (ROOT / of[1]).read_text(), f"{of[1]} does not name the page"


def test_what_is_not_run_is_found() -> None:
    text = "# P\n\n```sh\nls\n```\n\n<!-- not run: -->\n```python\n1\n```\n\n```bat\nx\n```\n\n    indented\n"
    assert [c.split(":")[0] for c in complaints(text)] == ["line 8", "line 12", "indented"]
    assert blocks(text)[0] == Block(3, "sh", "ls\n", "")
    assert blocks("<!-- not run: it is\nlong -->\n\n```sh\nls\n```\n")[0].reason == "it is long"
    assert unlike("a ... c\nend\n", "x\na b  c\ny\nend\n") is None
    assert unlike("a ... c\nend\n", "end\na b c\n") == "end"


def prose(text: str) -> str:
    """A page without its fenced blocks, in which nothing is a link or a heading."""
    return re.sub(r"^(`{3,}|~{3,}).*?^\1`*$", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """What a git host, and Sphinx, call the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for title in re.findall(r"^#{1,6} (.*)$", prose(text), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def links(text: str) -> list[str]:
    """Where a page leads within the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))
    return [t for t in targets if not re.match(r"[a-z]+:", t)]


def faults(page: Path, text: str) -> list[str]:
    """Its links that lead nowhere."""
    found = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if path and not target.exists():
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target.read_text() if path else text):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS + OTHERS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    if page in NOTEBOOKS:
        cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"]
        text = "\n\n".join("".join(c["source"]) for c in cells)
    assert links(text) or page.name not in ("index.md", "pictures.ipynb")
    assert not faults(page, text)


def test_every_page_is_in_the_tree_of_the_site() -> None:
    """And what the tree names is there: Sphinx refuses anything else."""
    trees = [b.text for b in blocks((DOCS / "index.md").read_text()) if b.language == "{toctree}"]
    assert len(trees) == 5
    entries = [e for tree in trees for e in tree.splitlines() if e and not e.startswith(":")]
    names = {p.relative_to(DOCS).with_suffix("").as_posix() for p in PAGES + NOTEBOOKS}
    named = {e for e in entries if "*" not in e}
    assert named <= names
    # A star stands for what is in its folder and in no entry, and has to stand for something.
    for star in (e for e in entries if "*" in e):
        found = {
            n
            for n in names - {"index"}
            if PurePosixPath(n).match(star) and n.count("/") == star.count("/")
        }
        assert found - named, star
        named |= found
    assert named == names - {"index"}


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = "# A b\n\n[a](#a-b), [b](index.md#scshards), [c](#c), [d](none.md), [e](index.md#none)\n"
    wrong = faults(ROOT / "docs" / "page.md", text)
    assert [w.split(":")[0] for w in wrong] == ["#c", "none.md", "index.md#none"]

"""The pages that tools/reference.py writes are what the code says, and have all that there is to say."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import scshards
from scshards.base import errors
from scshards.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = Path(scshards.__file__).parent
FOLDER = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        import reference

        yield reference
    del sys.modules["reference"], sys.modules["reference_errors"]


def test_the_pages_are_fresh(tool: ModuleType) -> None:
    for path, text in tool.pages().items():
        assert path.read_text() == text, f"{path.name}: run `python tools/reference.py`"


def test_options_has_every_public_name_and_field() -> None:
    text = (FOLDER / "options.md").read_text()
    for name in scshards.__all__:
        assert f"`{name}`" in text
    for cls in (scshards.ChoiceOptions, scshards.CollateOptions, scshards.ReadOptions):
        _, _, section = text.partition(f"## `{cls.__name__}`")
        section, _, _ = section.partition("\n## ")
        assert all(f"| `{f.name}` |" in section for f in dataclasses.fields(cls))


def test_commands_and_their_options_are_all_there() -> None:
    text = (FOLDER / "cli.md").read_text()
    assert all(f"\n## scshards {name}\n" in text for name in COMMANDS)
    assert "\n### scshards vocab build\n" in text
    _, _, pack = text.partition("\n## scshards pack\n")
    pack, _, _ = pack.partition("\n## ")
    for option in ("--split-by COL", "--share I/N", "--dask ADDRESS"):
        assert f"| `{option}` |" in pack
    assert text.count("| `--retries N` |") == 1


def test_settings_has_the_keys_of_every_table() -> None:
    from scshards.training.config import TrainConfig

    text = (FOLDER / "settings.md").read_text()
    tables = dict(re.findall(r"\n## \\\[([\w.]+)\\\]\n(.*?)(?=\n## |\Z)", text, re.S))
    config = TrainConfig()
    for name in ("task", "model", "optim", "run", "evaluate"):
        for field in dataclasses.fields(getattr(config, name)):
            assert f"\n| `{field.name}` |" in tables[name], f"{name}.{field.name}"
    assert (
        "| `lanes` | `64` |" in tables["data"] and "\n| `storage_options` |" not in tables["data"]
    )
    assert "| `steps` | none |" in tables["run"] and "*anew*" in tables["run"]


def test_errors_lists_what_a_module_raises(tool: ModuleType) -> None:
    source = """
CURE = "take another"
def f(name, n):
    if n:
        raise ConfigError(
            f"there is no column {name!r} " f"in {n} tables", where="x", advice=f"name one; {CURE}"
        )
    check(n > 0, "run.steps", "must be at least 1")
    raise SourceError(unknown(name))
"""
    found = list(sys.modules["reference_errors"].messages(source))
    assert sorted(found, reverse=True) == [
        ("ConfigError", "there is no column … in … tables", "name one; take another"),
        ("ConfigError", "run.steps: must be at least 1", ""),
    ]


def test_errors_lists_what_another_module_says(tool: ModuleType, tmp_path: Path) -> None:
    """By a constant, or by a function that does nothing else."""
    (tmp_path / "a.py").write_text("""
from p.b import CURE, again
def f(root):
    raise ConfigError("the settings are odd", advice=CURE)
    raise StorageError("the file is cut", advice=again(root))
    raise SourceError("the file is empty", advice=f"first {again(root)}")
""")
    (tmp_path / "b.py").write_text("""
CURE = "take another"
def again(root):
    \"\"\"What to do.\"\"\"
    return f"copy {root} again"
""")
    package = tmp_path.rename(tmp_path.parent / "p")
    text = "\n".join(sys.modules["reference_errors"].errors_page(package, ""))
    assert "| the settings are odd | take another |" in text
    assert "| the file is cut | copy … again |" in text
    assert "| the file is empty | first copy … again |" in text


def test_errors_lists_what_a_variable_says(tool: ModuleType) -> None:
    """A message of a table that is gone through, of one branch or another, or of a caller."""
    source = """
def f(self, a, b):
    what = "this was said before"
    log(what)
    for is_wrong, what, cure in (
        (a > b, "choose either values or fractions", "leave one of them out"),
        (a < 1, f"nothing is held out of {a}", None),
    ):
        if is_wrong:
            raise ConfigError(what, where="held_out", advice=cure)

def again(b):
    if b:
        what, cure = "the file is cut", "copy it again"
    else:
        what, cure = "the file is empty", "name another"
    raise StorageError(what, advice=cure)

def g(what):
    raise SourceError(what if what else "the input is nameless")

def h():
    g("the column is twisted")
"""
    assert sorted(sys.modules["reference_errors"].messages(source)) == [
        ("ConfigError", "choose either values or fractions", "leave one of them out"),
        ("ConfigError", "nothing is held out of …", ""),
        ("SourceError", "the column is twisted", ""),
        ("SourceError", "the input is nameless", ""),
        ("StorageError", "the file is cut", "copy it again"),
        ("StorageError", "the file is empty", "name another"),
    ]
    text = (FOLDER / "errors.md").read_text()
    for known in (
        "choose either values that are held out",
        "inputs are needed to repair its shards",
    ):
        assert f"| {known}" in text


def test_errors_has_every_kind_that_is_raised() -> None:
    text = (FOLDER / "errors.md").read_text()
    source = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py"))
    kinds = [n for n, c in vars(errors).items() if isinstance(c, type)]
    raised = {kind for kind in kinds if f"raise {kind}(" in source}
    assert len(raised) > 8
    assert all(f"\n## {kind}\n" in text for kind in raised)
    assert text.count("\n| ") > 300


def test_environment_has_every_variable_that_is_read() -> None:
    text = (FOLDER / "environment.md").read_text()
    source = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py"))
    asked = re.findall(r"""environ(?:\.get\(|\.setdefault\(|\[)["'](\w+)["']""", source)
    assert len(set(asked)) > 8
    assert all(f"`{name}`" in text for name in asked)

"""The rules of the floors, read off the source: who may import what, and what no file may hold.

Each rule is a function from {module: source} to a list of complaints. It must find nothing in
scshards, and it must find something in a source that breaks it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import scshards

ROOT = Path(scshards.__file__).parent
MAX_LINES = 600

FLOORS = {
    "base": 0,
    "kernels": 0,
    "cells": 1,
    "shards": 2,
    "census": 3,
    "sources": 4,
    "packing": 5,
    "exporting": 5,
    "streaming": 5,
    "model": 5,
    "ranks": 5,
    "tasks": 6,
    "evaluation": 7,
    "training": 8,
    "applying": 9,
    "compat": 9,
    "report": 9,
    "train": 10,
    "cli": 10,
}

# {library: the modules that may import it}, as patterns over whole module names.
LIBRARIES = {
    "torch": r"scshards\.(streaming\.(collate\..*|loader|dataset|wds\w*)"
    r"|(model|ranks|tasks|evaluation|training|applying|compat)\..*|report\.doctor)",
    "anndata": r"scshards\.(census|sources|exporting|applying\.output|report\.plot)(\..*)?",
    "h5py": r"scshards\.(census|sources|exporting|applying\.output)(\..*)?",
    "zarr": r"scshards\.(sources|applying\.output)(\..*)?",
    "scipy": r"scshards\.(census|sources|exporting)(\..*)?",
    "sklearn": r"scshards\.evaluation\.integration",
    "tiledbsoma": r"scshards\.census\..*",
    "cellxgene_census": r"(?!)",  # a library of the tests
    "fsspec": r"scshards\.base\.(storage|ranges)",
    "s3fs": r"scshards\.base\.storage",
    "click": r"scshards\.cli(\..*)?",
    "numba": r"scshards\.(kernels\..*|report\.bench)",
    "webdataset": r"scshards\.streaming\.wds",
    "streaming": r"scshards\.sources\.mds",
}

# What a command's file may import at its top: `scshards COMMAND --help` waits for it.
# Its options are read from the dataclasses of modules that import nothing heavy.
CLI_TOP = re.compile(
    r"click|scshards\.(base|cli)\..*|scshards\._version|scshards(\.\w+)+\.\w*options"
)

Sources = dict[str, str]


class Import:
    """One import: of `module`, by `importer`, at the top of the file or inside a function."""

    def __init__(self, importer: str, module: str, line: int, *, at_top: bool, typing_only: bool):
        self.importer, self.module, self.line = importer, module, line
        self.at_top, self.typing_only = at_top, typing_only

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module}"


def imports(sources: Sources) -> Iterator[Import]:
    for name, source in sources.items():
        yield from _imports(ast.parse(source), name, sources, at_top=True, typing_only=False)


def _imports(
    node: ast.AST, importer: str, sources: Sources, *, at_top: bool, typing_only: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [a.name for a in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{importer}:{child.lineno}: imports are absolute here"
            # `from package import module` names a module; `from module import name` does not.
            whole = [f"{child.module}.{a.name}" for a in child.names]
            names = [w if w in sources else str(child.module) for w in whole]
        for module in dict.fromkeys(names):
            yield Import(importer, module, child.lineno, at_top=at_top, typing_only=typing_only)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(
            child,
            importer,
            sources,
            at_top=at_top and not is_function,
            typing_only=typing_only or for_types,
        )


def floor_of(module: str) -> int | None:
    parts = module.split(".")
    return FLOORS.get(parts[1]) if parts[0] == "scshards" and len(parts) > 1 else None


def upward_imports(sources: Sources) -> list[str]:
    """A module imports from its own part or from lower floors, also for types only."""
    found = []
    for i in imports(sources):
        here, there = floor_of(i.importer), floor_of(i.module)
        same_part = i.importer.split(".")[1:2] == i.module.split(".")[1:2]
        if here is not None and there is not None and there >= here and not same_part:
            found.append(str(i))
    return found


def parts_without_floor(sources: Sources) -> list[str]:
    """Every package below scshards has a floor."""
    parts = {name.split(".")[1] for name in sources if name.count(".") >= 2}
    return sorted(parts - set(FLOORS))


def foreign_imports(sources: Sources) -> list[str]:
    """The libraries of LIBRARIES are imported only where they belong."""
    found = []
    for i in imports(sources):
        allowed = LIBRARIES.get(i.module.split(".")[0])
        if allowed is not None and not i.typing_only and not re.fullmatch(allowed, i.importer):
            found.append(str(i))
    return found


def slow_command_files(sources: Sources) -> list[str]:
    """The files of the command line import at their top nothing that takes time."""
    import sys

    return [
        str(i)
        for i in imports(sources)
        if i.importer.startswith("scshards.cli")
        and i.at_top
        and not i.typing_only
        and i.module.split(".")[0] not in sys.stdlib_module_names
        and not CLI_TOP.fullmatch(i.module)
    ]


def circles(sources: Sources) -> list[str]:
    """No module imports itself through others, not even late, inside functions."""
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for i in imports(sources):
        # The root holds only the version and names that are loaded late.
        if i.module in graph and not i.typing_only and i.module != "scshards":
            graph[i.importer].add(i.module)
    found: list[str] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return found


def long_files(sources: Sources) -> list[str]:
    counts = {name: len(source.splitlines()) for name, source in sources.items()}
    return [f"{name}: {n} lines" for name, n in counts.items() if n > MAX_LINES]


def files_without_header(sources: Sources) -> list[str]:
    return [name for name, source in sources.items() if not ast.get_docstring(ast.parse(source))]


def silenced_errors(sources: Sources) -> list[str]:
    """No handler catches everything by leaving out the class, and none does nothing."""
    found = []
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ExceptHandler):
                empty = all(
                    isinstance(s, ast.Pass)
                    or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                    for s in node.body
                )
                if empty or node.type is None:
                    found.append(f"{name}:{node.lineno} {ast.unparse(node)!r}")
    return found


def pickled_data(sources: Sources) -> list[str]:
    """Nothing is unpickled: a file from elsewhere could run code."""
    found = []
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                re.fullmatch(r"pickle\.(loads?|dumps?|Unpickler|Pickler)", function)
                or (function == "torch.load" and options.get("weights_only") != "True")
                or options.get("allow_pickle", "False") != "False"
            ):
                found.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    return found


def open_ends(sources: Sources) -> list[str]:
    """No notes of work not done, no stubs."""
    pattern = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    return [
        f"{name}:{number} {line.strip()}"
        for name, source in sources.items()
        for number, line in enumerate(source.splitlines(), 1)
        if pattern.search(line)
    ]


HEADER = '"""A header."""\n'

# Each rule with sources that break it.
RULES: list[tuple[Callable[[Sources], list[str]], Sources]] = [
    (upward_imports, {"scshards.base.a": "from scshards.cells.vocab import Vocab"}),
    (upward_imports, {"scshards.shards.a": "def f():\n    import scshards.packing.pack"}),
    (upward_imports, {"scshards.packing.a": "from scshards.streaming import order"}),
    (upward_imports, {"scshards.census.a": "from scshards.sources.inputs import expand"}),
    (upward_imports, {"scshards.model.a": "from scshards.streaming.loader import CellLoader"}),
    (
        upward_imports,
        {"scshards.cells.a": "if TYPE_CHECKING:\n    from scshards.shards.tar import Chunks"},
    ),
    (parts_without_floor, {"scshards.extras.a": ""}),
    (foreign_imports, {"scshards.streaming.order.plan": "import torch.nn"}),
    (foreign_imports, {"scshards.cells.vocab": "def f():\n    import anndata"}),
    (foreign_imports, {"scshards.packing.pack": "from h5py import File"}),
    (foreign_imports, {"scshards.streaming.read.fetch": "from fsspec.core import url_to_fs"}),
    (foreign_imports, {"scshards.training.loop": "import click"}),
    (foreign_imports, {"scshards.sources.soma": "import tiledbsoma"}),
    (foreign_imports, {"scshards.packing.verify.whole": "import webdataset as wds"}),
    (slow_command_files, {"scshards.cli.train": "import numpy as np"}),
    (slow_command_files, {"scshards.cli.pack": "from scshards.packing.pack import pack"}),
    (
        circles,
        {
            "scshards.packing.a": "from scshards.packing.b import x",
            "scshards.packing.b": "def f():\n    from scshards.packing import c",
            "scshards.packing.c": "import scshards.packing.a",
        },
    ),
    (long_files, {"scshards.base.a": "\n" * (MAX_LINES + 1)}),
    (files_without_header, {"scshards.base.a": "import os"}),
    (silenced_errors, {"scshards.base.a": "try:\n    f()\nexcept OSError:\n    pass"}),
    (silenced_errors, {"scshards.base.a": "try:\n    f()\nexcept:\n    g()"}),
    (silenced_errors, {"scshards.base.a": "try:\n    f()\nexcept ValueError:\n    ..."}),
    (pickled_data, {"scshards.model.a": "x = torch.load(path)"}),
    (pickled_data, {"scshards.model.a": "x = pickle.loads(data)"}),
    (pickled_data, {"scshards.model.a": "x = np.load(path, allow_pickle=True)"}),
    (open_ends, {"scshards.base.a": "# TO" + "DO: later"}),
]


@pytest.fixture(scope="module")
def sources() -> Sources:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(["scshards", *parts])] = path.read_text()
    return found


@pytest.mark.parametrize("rule", list(dict.fromkeys(r for r, _ in RULES)), ids=lambda r: r.__name__)
def test_scshards_keeps_the_rule(rule: Callable[[Sources], list[str]], sources: Sources) -> None:
    assert len(sources) > 20
    assert rule(sources) == []


@pytest.mark.parametrize(("rule", "bad"), RULES, ids=[r.__name__ for r, _ in RULES])
def test_the_rule_can_fail(rule: Callable[[Sources], list[str]], bad: Sources) -> None:
    assert rule(bad)


def test_what_is_allowed_is_not_found() -> None:
    good = {
        "scshards.cells.batch": HEADER + "if TYPE_CHECKING:\n    from torch import Tensor",
        "scshards.training.loop": HEADER + "import torch\nfrom scshards.streaming import loader",
        "scshards.cli.train": HEADER + "import click\ndef f():\n    import numpy",
        "scshards.streaming.loader": HEADER + "import torch\nfrom scshards.streaming import order",
        "scshards.streaming.order.plan": HEADER + "try:\n    f()\nexcept OSError:\n    g()",
    }
    for rule, _ in RULES:
        assert rule(good) == []


def test_exported_names_resolve() -> None:
    assert len(scshards.__all__) == len(set(scshards.__all__))
    for name in scshards.__all__:
        assert getattr(scshards, name) is not None
    for name, home in scshards._HOME.items():
        found = getattr(importlib.import_module(f"scshards.{home}"), name)
        assert found is getattr(scshards, name)
    assert dir(scshards) == sorted(scshards.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        scshards.nothing  # noqa: B018


def test_every_command_has_its_module() -> None:
    from scshards import cli

    files = {p.stem for p in (ROOT / "cli").glob("*.py")} - {"__init__"}
    assert set(cli.COMMANDS) <= files


@pytest.mark.parametrize("folder", ["tools", "examples"])
def test_what_scripts_import_is_there(folder: str) -> None:
    """No test runs the benchmarks, so that a name which moves would be missed there first by a user."""
    missing = []
    for path in sorted((ROOT.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scshards"):
                home = importlib.import_module(str(node.module))
                missing += [
                    f"{path.name}: {node.module}.{one.name}"
                    for one in node.names
                    if not hasattr(home, one.name)
                    and importlib.util.find_spec(f"{node.module}.{one.name}") is None
                ]
    assert not missing

"""Writes docs/reference/options.md: all public names, and all options field by field.

python tools/reference.py            # a test says when it is to be run again
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scshards
from scshards.cli.options import field_texts

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "options.md"
KEYWORDS = {
    "ChoiceOptions": "choose",
    "CollateOptions": "collate",
    "ReadOptions": "read",
    "SetOptions": "sets",
}
"""What CellLoader calls its option classes."""


def page() -> str:
    """The text of the page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    names = [name for name in scshards.__all__ if name != "__version__"]
    yield "# Reference"
    yield ""
    yield "Written from the docstrings by `tools/reference.py`; `help(scshards.NAME)` says the rest."
    yield ""
    yield "| `scshards.` | |"
    yield "|---|---|"
    yield "| `__version__` | The version. |"
    for name in names:
        yield f"| `{name}` | {_first(getattr(scshards, name))} |"
    yield ""
    yield "## The keywords of `CellLoader`"
    yield ""
    yield from _table(scshards.CellLoader, _parameters(scshards.CellLoader))
    # A loader's first, then those of the other activities.
    for name in sorted(
        (n for n in names if n.endswith("Options")), key=lambda n: n not in KEYWORDS
    ):
        cls = getattr(scshards, name)
        yield ""
        yield f"## `{name}`"
        yield ""
        yield _first(cls)
        yield ""
        yield from _table(cls, {f.name: _default(f) for f in dataclasses.fields(cls)})


def _table(cls: Any, defaults: dict[str, str]) -> Iterator[str]:
    section = "Attributes" if dataclasses.is_dataclass(cls) else "Parameters"
    texts = field_texts(cls, section)
    yield "| option | default | |"
    yield "|---|---|---|"
    for name, default in defaults.items():
        yield f"| `{name}` | {default} | {_cell(texts[name])} |"


def _parameters(cls: Any) -> dict[str, str]:
    given = inspect.signature(cls).parameters.values()
    named = [p for p in given if p.kind is not p.VAR_KEYWORD]
    return {
        p.name: ""
        if p.default is p.empty
        else f"`{p.default.__class__.__name__}()`"
        if dataclasses.is_dataclass(p.default)
        else f"`{p.default!r}`"
        for p in named
    }


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return "" if field.default_factory is dataclasses.MISSING else f"`{field.default_factory()!r}`"


def _first(what: Any) -> str:
    """The first paragraph of a docstring."""
    return _cell((inspect.getdoc(what) or "").split("\n\n")[0])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())

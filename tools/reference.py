"""Writes the pages of docs/reference that the code itself says.

    python tools/reference.py            # writes those that are stale, and names them
    python tools/reference.py --check    # writes nothing; ends with 1 where one is stale

options.md has all public names and all options field by field, from docstrings; cli.md all commands,
from click; settings.md the tables of a config, from the dataclasses that hold them; errors.md all
messages, from the source, by reference_errors.py.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Set
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
from reference_errors import errors_page, table_cell

import scshards
from scshards.cli import COMMANDS, main
from scshards.cli.options import GROUPS, PLACES, field_texts
from scshards.model.config import ModelSettings
from scshards.streaming.options import PARTS
from scshards.tasks.settings import TaskSettings
from scshards.training.config import MAY_CHANGE, DataSettings
from scshards.training.settings import EvaluateSettings, HeldOutSettings, OptimSettings, RunSettings

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
KEYWORDS = {
    "ChoiceOptions": "choose",
    "CollateOptions": "collate",
    "ReadOptions": "read",
    "SetOptions": "sets",
}
"""What CellLoader calls its option classes."""

WRITTEN = "Written from the code by `tools/reference.py`."


def pages() -> dict[Path, str]:
    """{file: its text} of all pages."""
    made = {
        "options": _options(),
        "cli": _commands(),
        "settings": _settings(),
        "errors": errors_page(Path(scshards.__file__).parent, WRITTEN),
    }
    return {FOLDER / f"{name}.md": "\n".join(lines) + "\n" for name, lines in made.items()}


def _options() -> Iterator[str]:
    """All public names, and the fields of all option classes."""
    names = [name for name in scshards.__all__ if name != "__version__"]
    yield "# Public names and options"
    yield ""
    yield (
        f"This page lists every public name, and every field of every class of options. {WRITTEN} "
        "[Python](python.md) has signatures, methods and errors, as `help(scshards.NAME)` does."
    )
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
        yield f"| `{name}` | {default} | {table_cell(texts[name])} |"


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
    return table_cell((inspect.getdoc(what) or "").split("\n\n")[0])


def _commands() -> Iterator[str]:
    """All commands with their help."""
    yield "# Commands"
    yield ""
    yield (
        f"This page has the help of every command, as `scshards COMMAND --help` shows it. {WRITTEN} "
        "Options of [every command](#options-of-every-command) and of [stores](#options-of-stores) "
        "stand at the end."
    )
    yield ""
    yield "| command | |"
    yield "|---|---|"
    found = list(_walk())
    for name, line in COMMANDS.items():
        yield f"| [`scshards {name}`](#scshards-{name}) | {table_cell(line)} |"
    shared = {"help", "as_json", "wide", "quiet", "verbose", "no_progress"}
    stores = {"storage_options", "retries", "timeout"}
    for path, command in found:
        yield ""
        yield f"{'##' if path.count(' ') == 1 else '###'} {path}"
        yield ""
        yield from _help(command)
        if isinstance(command, click.Group):
            continue
        context = click.Context(command, info_name=path)
        yield "```text"
        yield " ".join([path, *command.collect_usage_pieces(context)])
        yield "```"
        yield from _rows(command, context, but=shared | stores)
    command = dict(found)["scshards pack"]
    yield ""
    yield "## Options of every command"
    yield ""
    yield "`--no-progress` is only of commands that show how far they are."
    yield from _rows(command, click.Context(command), only=shared)
    yield ""
    yield "## Options of stores"
    yield ""
    yield (
        "Every command that reads or writes a store has them; "
        "[inputs](inputs.md#stores-and-web-servers) says more."
    )
    yield from _rows(command, click.Context(command), only=stores)


def _walk() -> Iterator[tuple[str, click.Command]]:
    """(how it is called, command), groups before what is in them."""
    top = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(top, name)
        assert command is not None
        yield f"scshards {name}", command
        if isinstance(command, click.Group):
            for below, one in command.commands.items():
                yield f"scshards {name} {below}", one


def _help(command: click.Command) -> Iterator[str]:
    """The text of a help: paragraphs, and what is set off by a backspace as a block."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            yield "```text"
            yield paragraph.removeprefix("\b").strip("\n")
            yield "```"
        else:
            yield table_cell(paragraph)
        yield ""


def _rows(
    command: click.Command,
    context: click.Context,
    *,
    only: Set[str] = frozenset(),
    but: Set[str] = frozenset(),
) -> Iterator[str]:
    """A table of options for each part of the help."""
    given = [p for p in command.get_params(context) if isinstance(p, click.Option)]
    for group in GROUPS:
        rows = [
            (record[0], record[1])
            for name, (of, _) in PLACES.items()
            if of == group
            for p in given
            if p.name == name and (not only or name in only) and name not in but
            if (record := p.get_help_record(context))
        ]
        if rows:
            yield ""
            yield f"| {group} | |"
            yield "|---|---|"
            for flags, text in rows:
                yield f"| `{flags.replace('|', chr(92) + '|')}` | {table_cell(text)} |"


SETTINGS: dict[str, tuple[type, str]] = {
    "task": (TaskSettings, "What a run trains for ([fine-tuning](../howto/finetune.md))."),
    "model": (ModelSettings, "The encoder's shape; the defaults are the published scGPT's."),
    "optim": (OptimSettings, "The optimizer ([what a step is](../explanation/training.md))."),
    "run": (RunSettings, "How long, on how big a batch, how ranks share, what is saved and shown."),
    "evaluate": (
        EvaluateSettings,
        "What each evaluation looks at ([held-out sets](../howto/watch.md#held-out-sets-and-probes)).",
    ),
    "evaluate.sets.NAME": (HeldOutSettings, "Further cells to score, by a name of your choice."),
}


def _settings() -> Iterator[str]:
    """The tables of a config."""
    yield "# Settings of a run"
    yield ""
    yield f"This page lists every key of a config of `scshards train`. {WRITTEN}"
    yield ""
    yield "A config is a TOML file of tables, or the name of one that comes with scshards:"
    yield ""
    yield "| `--config` | |"
    yield "|---|---|"
    for path in sorted((Path(scshards.__file__).parent / "training" / "configs").glob("*.toml")):
        yield f"| `{path.stem}` | {table_cell(_opening(path))} |"
    yield ""
    yield (
        "`--set table.key=value` overrides one key; values are written as in TOML. `RUN/config.json` "
        "holds the result. An unknown key is refused, with the nearest known one. A resumed run "
        "refuses other values than it began with, but for the keys that are marked *anew* here."
    )
    for name, (cls, says) in SETTINGS.items():
        texts = attribute_texts(cls)
        defaults = {f.name: _toml(f) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        yield from _setting_rows(name, says, texts, defaults)
        if name == "task":
            texts = {f: t for part in PARTS.values() for f, t in field_texts(part).items()}
            every = {key: _as_toml(value) for key, value in DataSettings().table().items()}
            says = (
                "Which cells are trained on ([how](../howto/stream.md#choosing-cells)), what a batch is "
                "made of ([how](batches.md)), and how shards are read. Evaluations see all cells. "
                "`task.objective` says what is hidden; `device_collate` is not for a run."
            )
            yield from _setting_rows("data", says, texts, every)


def _setting_rows(
    table: str, says: str, texts: Mapping[str, str], defaults: Mapping[str, str]
) -> Iterator[str]:
    yield ""
    yield f"## [{table}]".replace("[", "\\[").replace("]", "\\]")
    yield ""
    yield says
    yield ""
    yield "| key | default | |"
    yield "|---|---|---|"
    for name, default in defaults.items():
        anew = " *anew*" if f"{table}.{name}" in MAY_CHANGE else ""
        yield f"| `{name}` | {default} | {table_cell(texts[name])}{anew} |"


def attribute_texts(cls: type) -> dict[str, str]:
    """{field: the docstring below it} of a dataclass."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[field.target.id] = str(below.value.value)
    return texts


def _toml(field: dataclasses.Field[Any]) -> str:
    """A default as a config has it."""
    if field.default_factory is not dataclasses.MISSING:
        return _as_toml(field.default_factory())
    return _as_toml(field.default)


def _as_toml(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    return f"`{value!r}`" if isinstance(value, float) else f"`{json.dumps(value)}`"


def _opening(path: Path) -> str:
    """The first sentence of the comment that a config begins with."""
    lines = path.read_text().split("\n")
    comment = " ".join(takewhile(str.strip, (line.lstrip("#").strip() for line in lines)))
    return comment.split(". ")[0].rstrip(".") + "."


if __name__ == "__main__":
    stale = {path: text for path, text in pages().items() if path.read_text() != text}
    for path, text in stale.items():
        print(f"docs/reference/{path.name} is not what the code says: python tools/reference.py")
        if "--check" not in sys.argv:
            path.write_text(text)
    sys.exit("--check" in sys.argv and bool(stale))

"""Every message that ends a command, read off the source: docs/reference/errors.md.

Called by reference.py.

A message is the first argument of an error of base.errors, or of `check`, which makes one. What is known
only when it happens is an ellipsis.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from scshards.base import errors

GAP = "…"
LETTERS = 8
"""Of a message that is said when it happens: so many letters have to be known for it to be listed."""

KINDS = {
    name: cls
    for name, cls in vars(errors).items()
    if isinstance(cls, type) and issubclass(cls, errors.ScshardsError)
}


def errors_page(package: Path, written: str) -> Iterator[str]:
    """The lines of the page."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(package.rglob("*.py")):
        for kind, what, advice in messages(path.read_text()):
            if advice or what not in found[kind]:
                found[kind][what] = advice
    yield "# Errors, and what to do"
    yield ""
    yield (
        f"This page has the messages that end a command, by kind and in alphabetical order. {written} "
        f"`{GAP}` stands for what is known only when it happens: search for the words beside it. Where "
        "no cure is named, the message itself says what is wrong, and its line `where:` says where."
    )
    yield ""
    yield (
        "All are `scshards.ScshardsError`, with `what`, `where` and `advice`; a command ends with 1. "
        "What ends in a traceback instead is a bug: `scshards doctor` writes what a report needs."
    )
    for kind, cls in KINDS.items():
        if not found[kind]:
            continue
        bases = [base.__name__ for base in cls.__mro__ if base.__module__ == "builtins"]
        builtin = next((b for b in bases if b not in ("Exception", "BaseException", "object")), "")
        yield ""
        yield f"## {kind}"
        yield ""
        yield (cls.__doc__ or "").split("\n")[0] + (f" Also a `{builtin}`." if builtin else "")
        yield ""
        yield "| message | to do |"
        yield "|---|---|"
        for what in sorted(found[kind], key=lambda text: re.sub(r"[^a-z]", "", text.lower())):
            yield f"| {table_cell(what)} | {table_cell(found[kind][what])} |"


def messages(source: str) -> Iterator[tuple[str, str, str]]:
    """(kind, what, advice) of each error that a module makes."""
    tree = ast.parse(source)
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        if node.func.id in KINDS:
            said = {k.arg: _said(k.value, constants) for k in node.keywords}
            what, advice = _said(node.args[0], constants), said.get("advice", "")
            kind = node.func.id
        elif node.func.id == "check" and len(node.args) == 3:
            where, must = (_said(a, constants) for a in node.args[1:])
            kind, what, advice = "ConfigError", f"{where}: {must}", ""
        else:
            continue
        if len(re.findall(r"[a-z]", what)) >= LETTERS:
            yield kind, what, "" if len(re.findall(r"[a-z]", advice)) < LETTERS else advice


def _said(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    """What an expression says, in one line; several gaps in a row are one."""
    text = " ".join(_text(node, constants).split())
    return re.sub(rf"{GAP}([\s,.:]*{GAP})+", GAP, text)


def _text(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant):
        return "" if node.value is None else str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        is_plain = isinstance(node.value, ast.Name) and node.value.id in constants
        return _text(node.value, constants) if is_plain else GAP
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return _text(node.values[-1], constants)
    if isinstance(node, ast.IfExp):
        return _text(node.body, constants) or _text(node.orelse, constants)
    if isinstance(node, ast.Name):
        meant = constants.get(node.id)
        if isinstance(meant, ast.Constant | ast.JoinedStr | ast.BinOp):
            return _text(meant, {})
    return GAP


def table_cell(text: str) -> str:
    """A text as a cell of a table of Markdown: code stays code, and options become it."""
    parts = re.split(
        r"(`[^`]*`|(?<![\w-])--[a-z][\w-]*)", " ".join(text.split()).replace("|", "\\|")
    )
    return "".join(
        part
        if part.startswith("`")
        else f"`{part}`"
        if part.startswith("--")
        else re.sub(r"([<*\[]|(?<=\w)_)", r"\\\1", part)
        for part in parts
    )

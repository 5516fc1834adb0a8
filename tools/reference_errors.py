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
from types import MappingProxyType

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
    sources = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    texts = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): _texts(ast.parse(source))
        for path, source in sources.items()
    }
    for source in sources.values():
        for kind, what, advice in messages(source, texts):
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


def messages(
    source: str, texts: Mapping[str, Mapping[str, ast.expr]] = MappingProxyType({})
) -> Iterator[tuple[str, str, str]]:
    """(kind, what, advice) of each error that a module makes; `texts` are those of modules it imports.

    A text that is given by the name of a variable is each of those that the function binds to it: by an
    assignment, as an element of what a loop goes over, or as an argument of a call in the same module.
    """
    tree = ast.parse(source)
    constants = {
        name.asname or name.name: texts[node.module or ""][name.name]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in texts
        for name in node.names
        if name.name in texts[node.module]
    } | _texts(tree)
    functions: dict[ast.AST, ast.FunctionDef] = {}
    for node in ast.walk(tree):  # from the outside in: a call is in the innermost one
        if isinstance(node, ast.FunctionDef):
            functions |= dict.fromkeys(ast.walk(node), node)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        if node.func.id in KINDS:
            kind, first = node.func.id, node.args[0]
            advice = next((k.value for k in node.keywords if k.arg == "advice"), ast.Constant(None))
        elif node.func.id == "check" and len(node.args) == 3:
            kind, first, advice = "ConfigError", _joined(*node.args[1:]), ast.Constant(None)
        else:
            continue
        bound = _bound(functions[node], tree, constants, node) if node in functions else []
        for what, cure in _choices(first, advice, bound):
            told, todo = _said(what, constants), _said(cure, constants)
            if len(re.findall(r"[a-z]", told)) >= LETTERS:
                yield kind, told, "" if len(re.findall(r"[a-z]", todo)) < LETTERS else todo


def _texts(tree: ast.Module) -> dict[str, ast.expr]:
    """{name: what it says} of what a module has by name; of a function that does nothing but say it."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if not node.targets[0].id.startswith("__"):  # each version would have pages of its own
                found[node.targets[0].id] = node.value
        elif isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) == 2:
            said = node.body[1]
            if isinstance(said, ast.Return) and said.value is not None:
                found[node.name] = said.value
    return found


_Bound = list[tuple[int, dict[str, ast.expr]]]
"""(line, {variable: what it is there}) of each place of a function that binds some."""


def _joined(where: ast.expr, must: ast.expr) -> ast.expr:
    """Two texts as one, as `check` says them."""
    return ast.BinOp(ast.BinOp(where, ast.Add(), ast.Constant(": ")), ast.Add(), must)


def _choices(
    what: ast.expr, advice: ast.expr, bound: _Bound
) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What an error may say, each with what to do then."""
    if (
        isinstance(what, ast.IfExp)
        and isinstance(advice, ast.IfExp)
        and ast.dump(what.test) == ast.dump(advice.test)
    ):
        yield from _choices(what.body, advice.body, bound)
        yield from _choices(what.orelse, advice.orelse, bound)
        return
    for line, said, row in _meant(what, bound):
        cures = [(abs(line - at), cure, own) for at, cure, own in _meant(advice, bound)]
        together = [c for c in cures if c[2] is not None and c[2] is row]
        # Of several pieces of advice it is the one beside it: in the same row, or the nearest lines.
        _, cure, _ = min(together or cures, key=lambda c: c[0])
        yield said, cure


def _meant(
    node: ast.expr, bound: _Bound
) -> Iterator[tuple[int, ast.expr, dict[str, ast.expr] | None]]:
    """(line, text, where it was bound) of each text that an expression may be."""
    if isinstance(node, ast.IfExp):
        yield from _meant(node.body, bound)
        yield from _meant(node.orelse, bound)
        return
    name = node.id if isinstance(node, ast.Name) else ""
    rows = [one for one in bound if name in one[1]]
    if not rows:
        yield getattr(node, "lineno", 0), node, None
    for line, row in rows:
        for text in _branches(row[name]):
            yield line, text, row


def _branches(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.IfExp):
        yield from _branches(node.body)
        yield from _branches(node.orelse)
    else:
        yield node


def _bound(
    function: ast.FunctionDef, tree: ast.Module, constants: Mapping[str, ast.expr], call: ast.Call
) -> _Bound:
    """Where a function binds what an error in it may say."""
    surely = _last_before(function, call)
    found: _Bound = []

    def bind(target: ast.expr, value: ast.expr) -> None:
        for one in _branches(value):
            if isinstance(target, ast.Tuple) and isinstance(one, ast.Tuple):
                pairs = zip(target.elts, one.elts, strict=False)
                row = {t.id: v for t, v in pairs if isinstance(t, ast.Name)}
            else:
                row = {target.id: one} if isinstance(target, ast.Name) else {}
            if row and all(surely.get(n, 0) <= one.lineno < (call.end_lineno or 0) for n in row):
                found.append((one.lineno, row))

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            bind(node.targets[0], node.value)
        elif isinstance(node, ast.NamedExpr):
            bind(node.target, node.value)
        elif isinstance(node, ast.For):
            over = node.iter
            if isinstance(over, ast.Name):
                over = constants.get(over.id, over)
            for value in over.elts if isinstance(over, ast.Tuple | ast.List) else ():
                bind(node.target, value)
    taken = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) == function.name:
            names = taken[1:] if taken[:1] in (["self"], ["cls"]) else taken
            row = dict(zip(names, node.args, strict=False))
            row |= {k.arg: k.value for k in node.keywords if k.arg}
            row = {name: value for name, value in row.items() if name not in surely}
            if row:
                found.append((node.lineno, row))
    return found


def _last_before(function: ast.FunctionDef, call: ast.Call) -> dict[str, int]:
    """{variable: the line of the last assignment that was made on any way to a call}."""
    found: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.For) and node.lineno <= call.lineno <= (node.end_lineno or 0):
            names = [n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)]
            found |= {n: max(node.lineno, found.get(n, 0)) for n in names}
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if not isinstance(block, list):
                continue
            holds = [s.lineno <= call.lineno <= (s.end_lineno or s.lineno) for s in block]
            for before in block[: holds.index(True)] if True in holds else ():
                if isinstance(before, ast.Assign):
                    names = [
                        n.id for t in before.targets for n in ast.walk(t) if isinstance(n, ast.Name)
                    ]
                    found |= {n: max(before.lineno, found.get(n, 0)) for n in names}
    return found


def _name(function: ast.expr) -> str:
    """What is called."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


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
        named = node.value.func if isinstance(node.value, ast.Call) else node.value
        is_plain = isinstance(named, ast.Name) and named.id in constants
        return _text(node.value, constants) if is_plain else GAP
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return _text(node.values[-1], constants)
    if isinstance(node, ast.IfExp):
        return _text(node.body, constants) or _text(node.orelse, constants)
    if isinstance(node, ast.Call):
        node = node.func
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

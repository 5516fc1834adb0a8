"""`--where EXPR`, `where=EXPR`: which cells to keep, by their columns, in pandas query syntax.

    parse(text) -> Where      its .columns are what has to be read
    Where.mask({column: values}) -> bool per cell

A missing value equals nothing and is neither less nor more: `==`, `<` and `in` are false of it, `!=`
and `not in` are true, and `not` turns each around. Where a column is a truth by itself, a missing one is
false. So it is whatever a column's type, in an AnnData's obs as in a shard set.

What reaches pandas is rebuilt from a syntax tree of names, constants, comparisons and arithmetic; calls,
attributes, subscripts and `@` never do, so an expression can't reach a Python object.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scshards.base.errors import ConfigError
from scshards.base.text import did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PARTS = re.compile(
    r"""(?P<text>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`(?P<quoted>[^`]*)`|(?P<sign>[&|@`])"""
)
_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.USub,
    ast.UAdd, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Compare,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Name, ast.Load,
    ast.Constant, ast.List, ast.Tuple,
)  # fmt: skip
_EXAMPLE = "for example: \"tissue == 'lung' and n_genes > 500\"; other names in `backticks`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """A parsed expression.

    Attributes
    ----------
    text
        As it was given.
    canonical
        The same for all texts that differ only in blanks, quotes, needless brackets or signs for `and`
        and `or`; it parses to itself.
    columns
        The columns it names, in order of appearance.
    compared
        (column, constant) wherever a column alone is compared by ==, !=, in or not in.
    option
        What the option is called, for messages.
    """

    text: str
    canonical: str
    columns: tuple[str, ...]
    compared: tuple[tuple[str, str | int | float], ...]
    option: str
    _query: str

    def check(self, known: Mapping[str, Sequence[object] | None], at: str) -> None:
        """Raise ConfigError when a column is not known, or compared with what is none of its categories.

        Parameters
        ----------
        known
            {column: its categories, or None for numbers}.
        at
            Named in an error: the input.
        """
        for name in self.columns:
            if name not in known:
                raise ConfigError(
                    f"the cells have no {name!r}",
                    where=f"{at}: {self.option}",
                    advice=did_you_mean(name, known),
                )
        for name, value in self.compared:
            categories = known[name]
            if categories is not None and value not in categories:
                raise ConfigError(
                    f"the column {name!r} has no category {value!r}",
                    where=f"{at}: {self.option}",
                    advice=did_you_mean(str(value), map(str, categories)),
                )

    def mask(self, obs: Mapping[str, Any], n_rows: int, *, where: object = None) -> NDArray[Any]:
        """Which cells the expression is true for, bool [n_rows].

        Parameters
        ----------
        obs
            {column: values} with all of `columns`.
        where
            Named in an error: the input.

        Raises
        ------
        ConfigError
            When the expression does not fit the columns' types or gives no truth value per cell.
        """
        import pandas as pd

        found: dict[str, Any] = {}
        for i, column in enumerate(self.columns):
            found[_placeholder(i)], found[_placeholder(i, compared=True)] = _plain(obs[column])
        frame = pd.DataFrame(found, index=pd.RangeIndex(n_rows))
        try:
            result = frame.eval(
                self._query, engine="python", parser="pandas", local_dict={}, global_dict={}
            )
        except Exception as e:
            # pandas passes on whatever a column's type raises: TypeError, ValueError, UFuncTypeError...
            raise ConfigError(
                f"the expression {self.text!r} does not fit the columns: {self._named(str(e))}",
                where=f"{where}: {self.option}",
            ) from None
        kind = getattr(result, "dtype", None)
        if not isinstance(result, pd.Series) or str(kind) not in ("bool", "boolean"):
            raise ConfigError(
                f"the expression {self.text!r} does not say true or false of each cell",
                where=f"{where}: {self.option}",
                advice=_EXAMPLE,
            )
        return result.to_numpy(bool)

    def _named(self, message: str) -> str:
        for i, column in reversed(list(enumerate(self.columns))):
            message = message.replace(_placeholder(i), column)
            message = message.replace(_placeholder(i, compared=True), column)
        return message


def parse(text: str, *, option: str = "--where") -> Where:
    """Parse an expression; ConfigError when it is malformed or more than an expression over columns."""

    def refused(why: str) -> ConfigError:
        return ConfigError(f"the expression {text!r}: {why}", where=option, advice=_EXAMPLE)

    quoted: list[str] = []

    def rewrite(part: re.Match[str]) -> str:
        if part["text"] is not None:
            return part["text"]
        if part["quoted"] is not None:
            quoted.append(part["quoted"])
            return f" {_QUOTED}{len(quoted) - 1} "
        if part["sign"] in ("@", "`"):
            raise refused(f"{part['sign']!r} is not allowed here")
        # pandas gives & and | the precedence of and and or.
        return {"&": " and ", "|": " or "}[part["sign"]]

    try:
        tree = ast.parse(_PARTS.sub(rewrite, text).strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise refused(f"it can't be parsed: {getattr(e, 'msg', e)}") from None
    columns: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise refused(
                f"{type(node).__name__} is not allowed: names, constants, comparisons, and, or, not "
                "and arithmetic are"
            )
        if isinstance(node, ast.Constant) and not isinstance(node.value, str | int | float | bool):
            raise refused(f"{node.value!r} is no text or number")
    # ast.walk goes by depth; names are numbered in the order in which they stand.
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    numbers: dict[ast.Name, int] = {}
    for name in sorted(names, key=lambda n: (n.lineno, n.col_offset)):
        column = quoted[int(name.id[len(_QUOTED) :])] if name.id.startswith(_QUOTED) else name.id
        if column not in columns:
            columns.append(column)
        numbers[name] = columns.index(column)
        name.id = _placeholder(numbers[name])
    if not columns:
        raise refused("it names no column of obs")
    compared = tuple(_comparisons(tree, columns))
    for node in ast.walk(tree):
        for side in (node.left, *node.comparators) if isinstance(node, ast.Compare) else ():
            if isinstance(side, ast.Name):
                side.id = _placeholder(numbers[side], compared=True)
    query = ast.unparse(tree)
    for name, number in numbers.items():
        column = columns[number]
        is_plain = column.isascii() and column.isidentifier() and not keyword.iskeyword(column)
        name.id = column if is_plain else f"`{column}`"
    return Where(
        text=text,
        canonical=ast.unparse(tree),
        columns=tuple(columns),
        compared=compared,
        option=option,
        _query=query,
    )


_QUOTED = "_scshards_quoted_"
"""What a quoted name is called until it is parsed, before its number."""


def _placeholder(number: int, *, compared: bool = False) -> str:
    """What a column is called inside pandas, so that its own name can be anything."""
    return f"_compared_{number}_" if compared else f"_column_{number}_"


def _plain(values: Any) -> tuple[Any, Any]:
    """A column as a truth or a number, and as what is compared.

    pandas' NA makes a comparison neither true nor false: it becomes what numpy has for missing.
    """
    import pandas as pd

    values = values.array if isinstance(values, pd.Series) else values
    dtype: Any = getattr(values, "dtype", None)
    if getattr(dtype, "na_value", None) is not pd.NA:
        return values, values
    if isinstance(dtype, pd.StringDtype):
        texts = values.to_numpy(object, na_value=None)
        return texts, texts
    kind = dtype.numpy_dtype
    if not values.isna().any():
        plain = values.to_numpy(kind)
        return plain, plain
    numbers = values.to_numpy(float, na_value=float("nan"))
    return (values.to_numpy(bool, na_value=False) if kind.kind == "b" else numbers), numbers


def _comparisons(tree: ast.AST, columns: list[str]) -> list[tuple[str, str | int | float]]:
    """What stands beside a column in an equality, or in a list that it is looked for in."""
    names = {_placeholder(i): column for i, column in enumerate(columns)}
    found: list[tuple[str, str | int | float]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        for sign, a, b in zip(node.ops, sides, sides[1:], strict=False):
            if not isinstance(sign, ast.Eq | ast.NotEq | ast.In | ast.NotIn):
                continue
            if isinstance(b, ast.Name):
                a, b = b, a
            items = b.elts if isinstance(b, ast.List | ast.Tuple) else [b]
            if isinstance(a, ast.Name):
                found += [(names[a.id], x.value) for x in items if isinstance(x, ast.Constant)]  # type: ignore[misc]
    return found

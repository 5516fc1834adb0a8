"""Texts: the rule by which numbers name genes, cells and categories; some of many names; sizes."""

from __future__ import annotations

import difflib
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

from scshards.base.errors import ConfigError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def text_of(value: Any) -> str:
    """A value that is not missing as text.

    Whole numbers have no fraction, however they are stored, so that 3 and 3.0 are one category and an
    Entrez id is the same whether its column is of integers or, because one was missing, of floats.

    Raises
    ------
    UnicodeDecodeError
        For bytes that are no UTF-8.
    """
    if isinstance(value, bytes):
        return value.decode()
    # numpy's floats of any size are Real; its integers and Python's booleans are Integral.
    is_float = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
    if is_float and float(value).is_integer():
        return str(int(value))
    return str(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A line of advice that names the nearest known names, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return f"known names: {first_of(known, 20)}"


def all_of(names: Sequence[str]) -> str:
    """All names: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def first_of(names: Sequence[str], most: int) -> str:
    """The first names, and dots where there are more: "a, b, ..."."""
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


def first_and_rest(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are: "a, b and 1,200 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def size_of(size: int | str) -> int:
    """Bytes: a number of them, or text such as "200 GB".

    Raises
    ------
    ConfigError
        For a text that is no size.
    """
    if not isinstance(size, str):
        return int(size)
    said = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]b)?\s*", size.lower())
    if said is None:
        raise ConfigError(
            f"{size!r} is no size", advice='give a number of bytes, or text such as "200 GB"'
        )
    return int(float(said[1]) * _UNITS[said[2] or ""])

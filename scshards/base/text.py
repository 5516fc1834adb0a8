"""Values as text: the one rule by which numbers name genes, cells, categories and splits."""

from __future__ import annotations

import numbers
from typing import Any


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

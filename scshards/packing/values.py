"""Which values a matrix holds, by a look at some of them: counts, others, or what can't be packed.

check_values(source, kept, ...)     before anything is packed; pass 1 looks at all of them
matrix_advice(source, otherwise)    what else of the file could be packed
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ValueKindError
from scshards.base.text import text_of
from scshards.cells.tokenizer import round_values
from scshards.sources.open import Source

SAMPLE_VALUES = 1 << 20
"""How many values are looked at to tell counts from others; pass 1 looks at all of them."""

NOISE = 1e-3
"""What rounding leaves of counts, at most; an aligner's ambiguous counts are further off."""

SAMPLE_PLACES = 16
"""Where cells are left out: how many places are looked at, and how many rows at each."""


def check_values(
    source: Source, kept: NDArray[np.bool_], round_within: float | None
) -> tuple[float | None, float | None, bool]:
    """Look at some values of the kept rows: Survey's `fraction`, how far off it is, and `is_empty`.

    Raises
    ------
    ValueKindError
        When one of them is negative, NaN or infinite.
    """
    values = source.sample(SAMPLE_VALUES) if kept.all() else _sample_rows(source, kept)
    where = f"{source.name}: {source.matrix_name}"
    if round_within is not None:
        values, _ = round_values(values, round_within)
    fault = _fault(values)
    if fault is not None:
        value, what = fault
        raise ValueKindError(
            f"the matrix holds values that can't be packed: {text_of(value)} is {what}",
            where=where,
            advice=matrix_advice(source, "pack a file with counts"),
        )
    return *_fraction(values), not values.any()


def _sample_rows(source: Source, kept: NDArray[np.bool_]) -> NDArray[Any]:
    """Values of kept rows at some places: a cell that is left out may hold anything."""
    rows = np.flatnonzero(kept)
    places = (
        np.unique(rows[np.linspace(0, len(rows) - 1, SAMPLE_PLACES).astype(int)])
        if len(rows)
        else rows
    )
    parts = []
    for place in places.tolist():
        for block in source.blocks(place, min(place + SAMPLE_PLACES, source.n_rows)):
            of_value = np.repeat(np.arange(len(block.indptr) - 1), np.diff(block.indptr))
            parts.append(block.data[kept[block.first_row + of_value]])
    return np.concatenate(parts) if parts else np.zeros(0)


def matrix_advice(source: Source, otherwise: str = "") -> str:
    """What else of the file could be packed; what to do otherwise, when no matrix of it holds counts."""
    whole: list[str] = []
    fractions: list[str] = []
    for option, values in source.other_samples(SAMPLE_VALUES):
        if _fault(values) is None and values.any():
            (whole if _fraction(values)[0] is None else fractions).append(option)
    if whole:
        return f"these matrices of the file hold whole numbers: {', '.join(whole)}"
    if not otherwise:
        return ""
    advice = f"no other matrix of this file holds whole numbers: {otherwise}"
    if fractions:
        shown = ", ".join(f"{option} --values float" for option in fractions)
        advice += f"; what could be packed from this file, as it is: {shown}"
    return advice


def _fault(values: NDArray[Any]) -> tuple[Any, str] | None:
    if values.dtype.kind == "f":
        for found, what in (
            (np.isnan(values), "not a number"),
            (np.isneginf(values) | np.isposinf(values), "infinite"),
        ):
            if found.any():
                return values[found][0], what
    if values.dtype.kind in "if" and (values < 0).any():
        return values[values < 0][0], "negative"
    return None


def _fraction(values: NDArray[Any]) -> tuple[float | None, float | None]:
    """The value that is furthest from whole numbers, and by how much."""
    if values.dtype.kind != "f":
        return None, None
    off = np.abs(values - np.rint(values))
    if not off.any():
        return None, None
    at = int(off.argmax())
    # As few digits as tell the value from others of its dtype.
    return float(str(values[at])), float(str(off[at]))


def rounding_advice(off: float) -> str:
    """Advice for values that are all so near to whole numbers that they were meant to be some."""
    if off > NOISE:
        return ""
    within = 10.0 ** math.ceil(math.log10(off))
    return (
        f"none that was seen is off by more than {off:.1g}: --round-within {within:g} takes them as "
        "whole numbers, and counts them; "
    )

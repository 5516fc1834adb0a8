"""obs columns -> labels: category codes or numbers, and one set of categories over all inputs.

obs column of one source --read_label--> Label       local codes into its own categories
Labels of all sources    --unite--> LabelInfo, and a map of each source's codes to common ones
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError
from scshards.base.text import text_of
from scshards.shards.manifest import LabelInfo

MAX_EXACT = 1 << 53
"""The largest whole number up to which float64 holds every one."""

_CAN_BE_TEXT = (str, bytes, bool, int, float, np.bool_, np.number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """One obs column of one source.

    Attributes
    ----------
    kind
        "category" (text and booleans) or "number".
    values
        int32 codes into `categories` (-1 missing) or float64 numbers (NaN missing), one per row.
    categories
        Distinct texts, sorted; empty for numbers.
    """

    kind: Literal["category", "number"]
    values: NDArray[Any]
    categories: tuple[str, ...] = ()

    @property
    def missing(self) -> NDArray[np.bool_]:
        return np.isnan(self.values) if self.kind == "number" else self.values < 0

    def as_category(self) -> Label:
        """The same with numbers as text: 3 and 3.0 are both "3"."""
        return self if self.kind == "category" else _category(self.values, self.missing)

    def survey(self, *, as_text: bool = False) -> LabelSurvey:
        """What uniting it takes; with the numbers there are as categories where `as_text`."""
        categories = self.as_category().categories if as_text else self.categories
        return LabelSurvey(
            kind=self.kind, categories=categories, all_missing=bool(self.missing.all())
        )

    def by_split(self, split: NDArray[np.int8], n_splits: int) -> list[list[str]]:
        """The values of each split's cells, as text."""
        label = self.as_category()
        found = []
        for code in range(n_splits):
            used = np.unique(label.values[split == code])
            found.append([label.categories[i] for i in used[used >= 0].tolist()])
        return found

    def only(self, rows: NDArray[np.bool_]) -> Label:
        """The same without the categories that the chosen rows do not have; values of other rows are
        missing."""
        if self.kind == "number":
            return Label(kind="number", values=np.where(rows, self.values, np.nan))
        used = np.unique(self.values[rows])
        used = used[used >= 0]
        codes = np.full(len(self.categories) + 1, -1, np.int32)  # the last is that of -1
        codes[used] = np.arange(len(used))
        return Label(
            kind="category",
            values=np.where(rows, codes[self.values], -1).astype(np.int32),
            categories=tuple(self.categories[i] for i in used.tolist()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSurvey:
    """What must be known of one column of one source to unite it with the others.

    Attributes
    ----------
    kind, all_missing
        Of the column; whether no cell has a value.
    categories
        Distinct texts, sorted; of numbers only when values of the column are held out by name.
    """

    kind: Literal["category", "number"]
    categories: tuple[str, ...]
    all_missing: bool

    def __post_init__(self) -> None:
        # Sources have most categories in common: each text is kept once.
        object.__setattr__(self, "categories", tuple(map(sys.intern, self.categories)))


def read_label(values: Any, *, where: object = None) -> Label:
    """The label in an obs column, as `Source.obs` returns it.

    Raises
    ------
    SourceError
        For a type that is neither text, boolean nor number, and for whole numbers that a float64
        can't hold.
    """
    import pandas as pd

    if isinstance(values, pd.Categorical):
        missing = np.asarray(values.codes) < 0
        texts = [text_of(v) for v in values.categories.tolist()]
        return _coded(np.asarray(values.codes, np.int64), texts)
    missing = np.asarray(pd.isna(values), np.bool_)
    kind = getattr(getattr(values, "dtype", None), "kind", "O")
    if kind in "iuf":
        present = np.asarray(values[~missing])
        if (
            kind in "iu"
            and len(present)
            and max(-int(present.min()), int(present.max())) > MAX_EXACT
        ):
            raise SourceError(
                "the column has whole numbers beyond 2^53, which labels can't hold exactly",
                where=where,
                advice="store it as text if it is an identifier, or leave it out of --obs",
            )
        numbers = np.full(len(missing), np.nan)
        numbers[~missing] = present.astype(np.float64)
        return Label(kind="number", values=numbers)
    return _category(values, missing, where)


def unite(
    name: str,
    surveys: Sequence[LabelSurvey],
    sources: Sequence[str],
    first: Sequence[str] = (),
) -> tuple[LabelInfo, list[NDArray[np.int32]]]:
    """One column over all sources.

    Parameters
    ----------
    name
        Of the column.
    surveys, sources
        Of each source: the column, and the source's name for messages.
    first
        Categories that come before all others, in this order, where any source has them.

    Returns
    -------
    The label, and for each source the common code of each of its own codes (int32; empty for numbers).

    Raises
    ------
    SourceError
        When the column holds numbers in one source and text in another.
    """
    # A column without any value says nothing about its kind: an empty text column is stored as NaN.
    telling = [i for i, s in enumerate(surveys) if not s.all_missing] or [0]
    kinds = {surveys[i].kind: i for i in reversed(telling)}
    if len(kinds) > 1:
        raise SourceError(
            f"the obs column {name!r} holds numbers in {sources[kinds['number']]} and text in "
            f"{sources[kinds['category']]}",
            where=sources[kinds["category"]],
            advice="make the column the same kind in every input, or leave it out of --obs",
        )
    if "number" in kinds:
        return LabelInfo(kind="number"), [np.zeros(0, np.int32) for _ in surveys]
    found = {c for s in surveys for c in s.categories}
    ordered = [c for c in first if c in found]
    categories = [*ordered, *sorted(found.difference(ordered))]
    code = {c: i for i, c in enumerate(categories)}
    maps = [np.array([code[c] for c in s.categories], np.int32) for s in surveys]
    return LabelInfo(kind="category", categories=tuple(categories)), maps


def check_size(name: str, categories: Sequence[str], most: int, *, where: object) -> None:
    """Refuse a column that has another value in almost every cell: the manifest lists them all.

    Raises
    ------
    ConfigError
        When there are more than `most`.
    """
    if len(categories) > most:
        raise ConfigError(
            f"the column {name!r} has {len(categories):,} different values, and each becomes a category "
            f"that the manifest lists; {most:,} are allowed",
            where=where,
            advice="leave it out, since keys tell where each cell is from; store numbers as numbers; or "
            "allow as many with --max-categories",
        )


def distinct_texts(values: Any, where: object) -> tuple[NDArray[np.int64], list[str]]:
    """The distinct values of a column without missing ones, as text.

    Returns
    -------
    The place of each value among the texts, and the texts; two may be equal, as those of 3 and "3".

    Raises
    ------
    SourceError
        For values that are neither text, boolean nor number.
    """
    import pandas as pd

    dtype = getattr(values, "dtype", None)
    if getattr(dtype, "kind", "O") not in "biufOSUT":
        raise _wrong_type(dtype, where)
    try:
        codes, distinct = pd.factorize(np.asarray(values, object))
        odd = next((v for v in distinct.tolist() if not isinstance(v, _CAN_BE_TEXT)), None)
    except TypeError:  # it can't be hashed
        odd = next(v for v in values if not isinstance(v, _CAN_BE_TEXT))
    if odd is not None:
        raise _wrong_type(type(odd).__name__, where)
    return codes, [text_of(v) for v in distinct.tolist()]


def _category(values: Any, missing: NDArray[np.bool_], where: object = None) -> Label:
    found, texts = distinct_texts(values[~missing], where)
    codes = np.full(len(missing), -1, np.int64)
    codes[~missing] = found
    return _coded(codes, texts)


def _coded(codes: NDArray[np.int64], texts: list[str]) -> Label:
    """Sort the categories and merge those that read the same."""
    categories = sorted(set(texts))
    place = {c: i for i, c in enumerate(categories)}
    common = np.array([place[t] for t in texts] + [-1], np.int32)  # the last is that of -1
    return Label(kind="category", values=common[codes], categories=tuple(categories))


def _wrong_type(found: object, where: object) -> SourceError:
    return SourceError(
        f"the column holds values of type {found}",
        where=where,
        advice="text, booleans and numbers can be used: store it as one of them, or leave it out",
    )

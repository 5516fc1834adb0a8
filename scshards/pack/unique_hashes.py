"""What tells cells apart under `--unique COL`: 128-bit hashes of their values, in the scratch folder.

    write_hashes(folder of a source, column, split)      -> unique.bin

Values are compared as text, as labels are, so that the number 3 and the text "3" are one. The chance
that two different values of a billion are taken for one is below 10^-20. Called by pack.survey;
pack.unique reads what is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.pack import plan
from scshards.pack.labels import distinct_texts, text_of
from scshards.pack.marks import publish

HASHES = "unique.bin"

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
"""A cell in unique.bin: the two halves of its value's hash, by which the file is sorted, and its row."""

_CHUNK = 1 << 18
_KEYS = ("scshards unique1", "scshards unique2")
"""Of the two hashes, 16 bytes each."""


def write_hashes(
    folder: Path, values: Any, split: NDArray[np.int8], *, name: str, column: str
) -> None:
    """Leave the hashes of one source's values for drop_repeated.

    Parameters
    ----------
    folder
        The source's, in the scratch folder.
    values
        The column, as `Source.obs` returns it.
    split
        Split code of each row; cells in no split are left out.
    name, column
        Of the source and of the column, for messages.

    Raises
    ------
    SourceError
        For values that are neither text, boolean nor number.
    ConfigError
        When cells in a split have no value.
    """
    rows = np.flatnonzero(split != plan.DROPPED)
    where = f"{name}: obs, column {column!r}"
    hashes, missing = hash_texts(values, where=where)
    n_missing = int(missing[rows].sum())
    if n_missing:
        raise ConfigError(
            f"{n_missing:,} cells have no value, so it can't be told whether they are unique",
            where=where,
            advice=f'drop them with --where "`{column}` == `{column}`" (true where there is a '
            "value), or choose another column",
        )
    records = np.empty(len(rows), RECORD)
    records["high"], records["low"], records["row"] = hashes[rows, 0], hashes[rows, 1], rows
    records = records[np.lexsort((records["low"], records["high"]))]  # stable: then by row
    publish(folder / HASHES, records.view(np.uint8).data)


def hash_texts(
    values: Any, *, where: object = None
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """128-bit hashes of values' texts, as text_of spells them.

    Returns
    -------
    uint64 [n, 2], meaningless where a value is missing; and which are missing, bool [n].

    Raises
    ------
    SourceError
        For values that are neither text, boolean nor number.
    """
    import pandas as pd

    hashes = np.zeros((len(values), 2), np.uint64)
    if isinstance(values, pd.Categorical):
        missing = np.asarray(values.codes) < 0
        if not missing.all():
            of_category = _hashed([text_of(v) for v in values.categories.tolist()])
            hashes[~missing] = of_category[values.codes[~missing]]
        return hashes, missing
    missing = np.asarray(pd.isna(values), np.bool_)
    # In chunks: the texts of numbers take many times the room of the numbers.
    for first in range(0, len(values), _CHUNK):
        chosen = first + np.flatnonzero(~missing[first : first + _CHUNK])
        hashes[chosen] = _hash_chunk(values[chosen], where)
    return hashes, missing


def _hash_chunk(values: Any, where: object) -> NDArray[np.uint64]:
    """Hashes of values of which none is missing."""
    if getattr(getattr(values, "dtype", None), "kind", "O") in "iu":
        return _hashed(np.asarray(values).astype(str).tolist())
    codes, texts = distinct_texts(values, where)
    return _hashed(texts)[codes]


def _hashed(texts: list[str]) -> NDArray[np.uint64]:
    """SipHash of each text under two keys, uint64 [n, 2]."""
    from pandas.util import hash_array

    # As bytes: a text that is no Unicode, with lone surrogates, can't be encoded strictly.
    encoded = np.empty(len(texts), object)
    encoded[:] = [text.encode(errors="surrogatepass") for text in texts]
    columns = [hash_array(encoded, hash_key=key, categorize=False) for key in _KEYS]
    return np.stack(columns, axis=1)

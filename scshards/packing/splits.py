"""Values that are held out by name: the file that lists them, and whether any cell has them.

    # split.toml
    column = "donor_id"            # or --split-by
    valid = ["D12", "D31"]
    test = ["D40"]

Called by the command line (read_split_file) and by packing.decide (check_held_out).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scshards.base.config import did_you_mean, read_toml
from scshards.base.errors import ConfigError
from scshards.packing.labels import LabelSurvey
from scshards.packing.options import HELD_OUT, PackOptions

_NAMED = 5
"""How many of the values that no cell has are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFile:
    """What a split file says: `split_by` and `held_out` of PackOptions."""

    column: str
    held_out: dict[str, list[Any]]


def read_split_file(path: str | os.PathLike[str], split_by: str | None = None) -> SplitFile:
    """Read a TOML file of held-out values.

    Parameters
    ----------
    split_by
        The column, where the file does not name it.

    Raises
    ------
    ConfigError
        When the file is absent or malformed, has unknown keys, or names another column or none.
        PackOptions checks the values.
    """
    path = os.fspath(path)
    table = read_toml(path)
    known = ("column", *HELD_OUT)
    for name in table:
        if name not in known:
            advice = "train gets all that is not held out"
            raise ConfigError(
                f"unknown key {name!r}",
                where=path,
                advice=advice if name == "train" else did_you_mean(name, known),
            )
    column = table.pop("column", split_by)
    if column is None:
        raise ConfigError(
            "it does not say which column of obs has the values",
            where=path,
            advice='add a line such as column = "donor_id", or give --split-by',
        )
    if not isinstance(column, str):
        raise ConfigError(f"{column!r} is not the name of a column", where=f"{path}: column")
    if split_by is not None and column != split_by:
        raise ConfigError(
            f"it holds out values of {column!r}, and --split-by says {split_by!r}",
            where=path,
            advice="leave --split-by out, or name the same column",
        )
    return SplitFile(column=column, held_out=table)


def check_held_out(options: PackOptions, columns: Sequence[LabelSurvey]) -> None:
    """Refuse held-out values that no cell has: a misspelt donor would silently be trained on.

    Parameters
    ----------
    columns
        The column `options.split_by` of each source.

    Raises
    ------
    ConfigError
        It names the values, and the nearest ones that there are.
    """
    if options.held_out is None:
        return
    found = {value for column in columns for value in column.categories}
    for split, values in options.held_out.items():
        missing = [value for value in values if value not in found]
        if missing:
            named = ", ".join(map(repr, missing[:_NAMED]))
            more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
            near = [f"{v!r}: {did_you_mean(v, found)}" for v in missing[:_NAMED]]
            raise ConfigError(
                f"no cell that is packed has the value {named}{more} of {options.split_by!r}, "
                f"to be held out for {split}",
                where=f"held_out: {split}",
                advice="; ".join(near) if found else "the column has no value at all",
            )

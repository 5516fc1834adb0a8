"""classes.json and domains.json: what the codes of a head are called, beside a model's weights.

    {"column": "cell_type", "classes": ["B cell", "T cell"]}     the class of code 0, 1, ...
    {"column": "donor", "domains": ["d1", "d2"]}                 the domain of code 0, 1, ...

Written by the tasks annotate and integrate, read by training and applying.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scshards.base.errors import CheckpointError, ConfigError
from scshards.base.storage import Storage
from scshards.model.scgpt_files import read_object

CLASSES, DOMAINS = "classes.json", "domains.json"


@dataclass(frozen=True, kw_only=True)
class LabelNames:
    """What a model's codes stand for.

    Attributes
    ----------
    column
        The obs column that held the names.
    names
        The name of each code, from 0.
    """

    column: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def write_names(
    folder: str | os.PathLike[str], file: str, column: str, names: Sequence[str]
) -> None:
    """Publish CLASSES or DOMAINS of a checkpoint folder: a column of obs, and the name of each code.

    Raises
    ------
    ConfigError
        When there is no name, or one twice.
    """
    storage, tree = Storage(folder), {"column": column, _what(file): list(names)}
    if fault := _fault(column, tree[_what(file)]):
        raise ConfigError(f"the names can't be kept: {fault}", where=storage.at(file))
    storage.write(file, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())


def read_names(
    folder: str | os.PathLike[str], file: str, options: Mapping[str, Any] | None = None
) -> LabelNames:
    """CLASSES or DOMAINS of a checkpoint folder; `options` are for its file system.

    Raises
    ------
    CheckpointError
        When there is no such file, or it is not what its name says.
    """
    storage, what = Storage(folder, options), _what(file)
    if not storage.exists(file):
        raise CheckpointError(
            f"the checkpoint lacks {file}, which says what its {what} are called",
            where=storage.at(file),
            advice=f'write it: {{"column": ..., "{what}": [the name of each code, from 0]}}',
        )
    tree = read_object(storage, file)
    column, names = tree.get("column"), tree.get(what)
    if fault := _fault(column, names):
        raise CheckpointError(f"the file does not name {what}: {fault}", where=storage.at(file))
    return LabelNames(column=str(column), names=tuple(names or ()))


def _what(file: str) -> str:
    return file.removesuffix(".json")


def _fault(column: object, names: object) -> str | None:
    """What is wrong with them, if anything."""
    if not isinstance(column, str) or not column:
        return f"the column is {column!r}"
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return "the names are not a list of texts"
    if not names:
        return "there is no name"
    if len(set(names)) != len(names):
        return f"{next(n for n in names if names.count(n) > 1)!r} is there twice"
    return None

"""classes.json: what the codes of a class head mean, kept beside the weights of a checkpoint.

    {"column": "cell_type", "classes": ["B cell", "T cell"]}     the class of code 0, 1, ...

Written by the annotate task, read by train.annotate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scshards.base.errors import CheckpointError, ConfigError
from scshards.base.storage import Storage

CLASSES = "classes.json"


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes that a model tells apart.

    Attributes
    ----------
    column
        The obs column that held them.
    names
        The class of each code, from 0.
    """

    column: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def write_classes(
    folder: Storage | str | os.PathLike[str], column: str, names: Sequence[str]
) -> None:
    """Publish the classes of a checkpoint folder.

    Parameters
    ----------
    folder
        The checkpoint folder, or its Storage.
    column
        The obs column that held the classes.
    names
        The class of each code, from 0.

    Raises
    ------
    ConfigError
        When there is no class, or one twice.
    """
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    fault = _fault(column, list(names))
    if fault:
        raise ConfigError(f"the classes can't be kept: {fault}", where=storage.at(CLASSES))
    tree = {"column": column, "classes": list(names)}
    storage.write(CLASSES, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())


def read_classes(
    folder: Storage | str | os.PathLike[str], options: Mapping[str, Any] | None = None
) -> Classes:
    """The classes of a checkpoint folder.

    Parameters
    ----------
    folder
        The checkpoint folder (a local path or an fsspec URL), or its Storage.
    options
        Storage options of that URL.

    Raises
    ------
    CheckpointError
        When there is no classes.json, or it is not what its name says.
    """
    storage = folder if isinstance(folder, Storage) else Storage(folder, options)
    data = storage.read_if_there(CLASSES)
    where = storage.at(CLASSES)
    if data is None:
        raise CheckpointError(
            f"the checkpoint lacks {CLASSES}, which says what its classes are called",
            where=where,
            advice='write it: {"column": ..., "classes": [the name of each code, from 0]}',
        )
    try:
        tree = json.loads(data)
    except ValueError as e:
        raise CheckpointError(f"the file is not valid JSON: {e}", where=where) from None
    if not isinstance(tree, dict):
        raise CheckpointError("the file does not hold a JSON object", where=where)
    column, names = tree.get("column"), tree.get("classes")
    fault = _fault(column, names)
    if fault:
        raise CheckpointError(f"the file does not name classes: {fault}", where=where)
    return Classes(column=str(column), names=tuple(names or ()))


def _fault(column: object, names: object) -> str | None:
    """What is wrong with them, if anything."""
    if not isinstance(column, str) or not column:
        return f"the column is {column!r}"
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return "the classes are not a list of texts"
    if not names:
        return "there is none"
    if len(set(names)) != len(names):
        return f"{next(n for n in names if names.count(n) > 1)!r} is there twice"
    return None

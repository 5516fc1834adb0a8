"""classes.json and domains.json: what the codes of a head are called, beside a model's weights.

    {"column": "cell_type", "classes": ["B cell", "T cell"]}     the class of code 0, 1, ...
    {"column": "donor", "domains": ["d1", "d2"]}                 the domain of code 0, 1, ...

Written by the tasks annotate and integrate, read by applying.embed and applying.annotate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scshards.base.errors import CheckpointError, ConfigError
from scshards.base.records import read_json
from scshards.base.storage import Storage

CLASSES, DOMAINS = "classes.json", "domains.json"

Folder = Storage | str | os.PathLike[str]
"""A checkpoint folder (a local path or an fsspec URL), or its Storage."""


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


def write_classes(folder: Folder, column: str, names: Sequence[str]) -> None:
    """Publish the classes of a checkpoint folder.

    Parameters
    ----------
    folder
        The checkpoint folder.
    column
        The obs column that held the classes.
    names
        The class of each code, from 0.

    Raises
    ------
    ConfigError
        When there is no class, or one twice.
    """
    _write(folder, CLASSES, column, names)


def write_domains(folder: Folder, column: str, names: Sequence[str]) -> None:
    """As `write_classes`, of the domains that a model was trained on."""
    _write(folder, DOMAINS, column, names)


def read_classes(folder: Folder, options: Mapping[str, Any] | None = None) -> LabelNames:
    """The classes of a checkpoint folder.

    Parameters
    ----------
    folder
        The checkpoint folder.
    options
        Storage options of that address.

    Raises
    ------
    CheckpointError
        When there is no classes.json, or it is not what its name says.
    """
    return _read(folder, CLASSES, options)


def read_domains(folder: Folder, options: Mapping[str, Any] | None = None) -> LabelNames:
    """As `read_classes`, of the domains that a model was trained on."""
    return _read(folder, DOMAINS, options)


def _write(folder: Folder, file: str, column: str, names: Sequence[str]) -> None:
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    fault = _fault(column, list(names))
    if fault:
        raise ConfigError(f"the names can't be kept: {fault}", where=storage.at(file))
    tree = {"column": column, file.removesuffix(".json"): list(names)}
    storage.write(file, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())


def _read(folder: Folder, file: str, options: Mapping[str, Any] | None) -> LabelNames:
    storage = folder if isinstance(folder, Storage) else Storage(folder, options)
    data, where, what = storage.read_if_there(file), storage.at(file), file.removesuffix(".json")
    if data is None:
        raise CheckpointError(
            f"the checkpoint lacks {file}, which says what its {what} are called",
            where=where,
            advice=f'write it: {{"column": ..., "{what}": [the name of each code, from 0]}}',
        )
    try:
        tree = read_json(data)
    except ValueError as e:
        raise CheckpointError(f"the file is {e}", where=where) from None
    if not isinstance(tree, dict):
        raise CheckpointError("the file does not hold a JSON object", where=where)
    column, names = tree.get("column"), tree.get(what)
    fault = _fault(column, names)
    if fault:
        raise CheckpointError(f"the file does not name {what}: {fault}", where=where)
    return LabelNames(column=str(column), names=tuple(names or ()))


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

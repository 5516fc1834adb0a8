"""The cells of a query in stretches of soma_joinids: what one input of pack, or one h5ad file, holds.

    partitions("census://heart?release=2025-01-30")
    -> [Partition(soma://...&first=0&last=412345&cells=200000, ...), ...]

A partition is the n-th `max_cells` of a query's cells in the order of their soma_joinids, named by the
first and the last of them and the number of cells between: it can be opened by itself, reads only its
own stretch of obs, and notices when the experiment has changed.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.storage import is_local, path_of, redact
from scshards.census.address import CENSUS, KEYS, SOMA, SomaAddress, split
from scshards.census.experiment import Experiment
from scshards.census.index import load_index
from scshards.census.options import MAX_CELLS
from scshards.census.queries import find_release, load_queries

_log = logging.getLogger(__name__)


class Partition(NamedTuple):
    """One stretch of a query's cells: which ones, and what messages and manifests call it."""

    address: SomaAddress
    name: str


def partitions(url: str, storage_options: Mapping[str, Any] | None = None) -> list[Partition]:
    """The partitions of census://NAME?release=..&queries=FILE&max_cells=N or soma://URI?filter=..&max_cells=N.

    With census://NAME?index=DIR, cells, filter and release are those of an index; then nothing is asked.
    Where soma://URI names no layer, and there is no `raw` but only one of another name, it is that one,
    which is said on standard error.
    An address that names one partition, by the number of its cells, is that one.

    Raises
    ------
    ConfigError
        When there is no such query, release or key, the filter can't be used, or the index is of
        another release.
    ChecksumError, FormatError
        When the index is damaged.
    SourceError
        When there is no such experiment, or no cell of it fits.
    StorageError
        When it can't be read.
    """
    is_census = url.startswith(CENSUS)
    known = ["index", "queries", "release"] if is_census else KEYS
    place, given = split(url, [*known, "max_cells"])
    max_cells = given.pop("max_cells", MAX_CELLS)
    if "index" in given:
        mark, ids = load_index(given["index"], place.removeprefix(CENSUS), storage_options)
        if "queries" in given or given.get("release", mark.version) != mark.version:
            raise ConfigError(
                f"an index says itself which cells a query takes; this one is of {mark.version}",
                where=f"{place}: index={redact(given['index'])}",
                advice="leave queries and release out, or make another index in another folder",
            )
        return cut(ids, mark.address, mark.name, max_cells)
    if is_census:
        queries = load_queries(given.get("queries"))
        query = queries[place.removeprefix(CENSUS)]
        release = find_release(queries, given.get("release"), storage_options)
        address, name = query.address(release), f"{place}@{release.version}"
    else:
        address = SomaAddress(uri=place.removeprefix(SOMA), **given)
        name = _name(address)
        if address.cells is not None:
            return [Partition(address, name)]
    with Experiment(address, storage_options, or_only_layer="layer" not in given) as experiment:
        if experiment.layer != address.layer:
            address = dataclasses.replace(address, layer=experiment.layer)
            _log.warning(f"{name}: its only layer, {address.layer}, is taken")
        return cut(experiment.cells(), address, name, max_cells)


def cut(
    ids: NDArray[np.int64], address: SomaAddress, name: str, max_cells: int = MAX_CELLS
) -> list[Partition]:
    """Cells, by their ascending soma_joinids, in stretches of `max_cells`."""
    return [
        Partition(
            dataclasses.replace(address, first=int(part[0]), last=int(part[-1]), cells=len(part)),
            f"{name} [{n}]",
        )
        for n, part in enumerate(np.split(ids, range(max_cells, len(ids), max_cells)))
    ]


def beside(url: str, folder: str) -> str:
    """An address as it stands in a file of `folder`, which what is relative in it is relative to."""
    place, mark, query = url.partition("?")
    if place.startswith(SOMA):
        return SOMA + _beside(place.removeprefix(SOMA), folder) + mark + query

    def moved(key: re.Match[str]) -> str:
        return f"{key[1]}={quote(_beside(unquote(key[2]), folder), safe='/:')}"

    return place + mark + re.sub(r"(?<![^&])(index|queries)=([^&]*)", moved, query)


def _beside(path: str, folder: str) -> str:
    if not path or not is_local(path) or path_of(path).is_absolute():
        return path
    return str(Path(folder) / path) if is_local(folder) else f"{folder.rstrip('/')}/{path}"


def _name(address: SomaAddress) -> str:
    shown = SOMA + redact(address.uri) + (f"?filter={address.filter}" if address.filter else "")
    first, last = ("" if end is None else end for end in (address.first, address.last))
    return shown if first == last == "" else f"{shown} [{first}-{last}]"

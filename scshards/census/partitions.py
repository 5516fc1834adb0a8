"""The cells of a query in stretches of soma_joinids: what one input of pack, or one h5ad file, holds.

    partitions("census://heart?release=2025-01-30")
    -> [Partition(soma://...&first=0&last=412345&cells=200000, ...), ...]

A partition is the n-th `max_cells` of a query's cells in the order of their soma_joinids, named by the
first and the last of them and the number of cells between: it can be opened by itself, reads only its
own stretch of obs, and notices when the experiment has changed. Called by census.index, census.download
and sources.inputs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError
from scshards.base.storage import is_local, path_of, redact
from scshards.census.address import CENSUS, SOMA, SomaAddress, keys, parse
from scshards.census.experiment import open_experiment
from scshards.census.index import QueryIndex, load_index
from scshards.census.options import MAX_CELLS
from scshards.census.queries import load_queries, query_address
from scshards.census.releases import find_release

_KEYS = ["index", "max_cells", "queries", "release"]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One stretch of a query's cells.

    Attributes
    ----------
    address
        Which cells.
    name
        What messages and manifests call it.
    """

    address: SomaAddress
    name: str


def is_query(url: str) -> bool:
    """Whether an input is cells of a SOMA experiment that are to be cut into partitions."""
    return url.startswith(CENSUS) or (
        url.startswith(SOMA) and parse(_without_max(url)[0]).cells is None
    )


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
    names_layer = True
    if url.startswith(CENSUS):
        query_name, _, rest = url.removeprefix(CENSUS).partition("?")
        given = keys(rest, _KEYS, where=CENSUS + query_name)
        max_cells = _max_cells(given.get("max_cells"), url)
        if "index" in given:
            index = _indexed(query_name, given, storage_options)
            return cut(index.ids, index.mark.address, index.mark.name, max_cells)
        address, name = _census(query_name, given, storage_options)
    else:
        plain, max_cells = _without_max(url)
        address = parse(plain)
        names_layer = any(p.startswith("layer=") for p in plain.partition("?")[2].split("&"))
        if address.cells is not None:
            return [Partition(address=address, name=_name(address))]
        name = _name(address)
    with open_experiment(address, storage_options, or_only_layer=not names_layer) as experiment:
        if experiment.layer != address.layer:
            address = dataclasses.replace(address, layer=experiment.layer)
            print(f"{name}: its only layer, {address.layer}, is taken", file=sys.stderr)
        ids = experiment.ids(address.filter, address.first, address.last)
    if not len(ids):
        raise SourceError(
            "no cell fits the filter",
            where=f"{name}: {address.filter}",
            advice="check the values it compares with: they are case-sensitive",
        )
    return cut(ids, address, name, max_cells)


def cut(
    ids: NDArray[np.int64], address: SomaAddress, name: str, max_cells: int = MAX_CELLS
) -> list[Partition]:
    """Cells, by their ascending soma_joinids, in stretches of `max_cells`."""
    return [
        Partition(
            address=dataclasses.replace(
                address, first=int(part[0]), last=int(part[-1]), cells=len(part)
            ),
            name=f"{name} [{number}]",
        )
        for number, part in enumerate(np.split(ids, range(max_cells, len(ids), max_cells)))
    ]


def beside(url: str, folder: str) -> str:
    """An address as it stands in a file of `folder`, which what is relative in it is relative to."""
    place, mark, query = url.partition("?")
    if place.startswith(SOMA):
        place = SOMA + _beside(place.removeprefix(SOMA), folder)
    else:
        parts = query.split("&")
        for i, part in enumerate(parts):
            key, equals, path = part.partition("=")
            if key in ("index", "queries"):
                parts[i] = key + equals + quote(_beside(unquote(path), folder), safe="/:")
        query = "&".join(parts)
    return f"{place}{mark}{query}"


def _beside(path: str, folder: str) -> str:
    if not path or not is_local(path) or path_of(path).is_absolute():
        return path
    return str(Path(folder) / path) if is_local(folder) else f"{folder.rstrip('/')}/{path}"


def _name(address: SomaAddress) -> str:
    shown = SOMA + redact(address.uri) + (f"?filter={address.filter}" if address.filter else "")
    if address.first is None and address.last is None:
        return shown
    ends = ("" if end is None else str(end) for end in (address.first, address.last))
    return f"{shown} [{'-'.join(ends)}]"


def _census(
    name: str, given: Mapping[str, str], storage_options: Mapping[str, Any] | None
) -> tuple[SomaAddress, str]:
    queries = load_queries(given.get("queries"))
    queries[name]  # an unknown name is refused before anything is read
    release = find_release(queries, given.get("release"), storage_options)
    address = query_address(name, release, given.get("queries"))
    return address, f"{CENSUS}{name}@{release.version}"


def _indexed(
    name: str, given: Mapping[str, str], storage_options: Mapping[str, Any] | None
) -> QueryIndex:
    if "queries" in given:
        raise ConfigError(
            "an index says itself which cells a query takes",
            where=f"{CENSUS}{name}: queries={given['queries']}",
            advice="leave out either index or queries",
        )
    index = load_index(given["index"], name, storage_options)
    if given.get("release", index.mark.version) != index.mark.version:
        raise ConfigError(
            f"the index is of the release {index.mark.version}, not {given['release']}",
            where=f"{CENSUS}{name}: index={redact(given['index'])}",
            advice="leave the release out, or make an index of that release in another folder",
        )
    return index


def _without_max(url: str) -> tuple[str, int]:
    """The address without its max_cells, and that."""
    plain, _, query = url.partition("?")
    parts = query.split("&")
    texts = [part.removeprefix("max_cells=") for part in parts if part.startswith("max_cells=")]
    others = [part for part in parts if part and not part.startswith("max_cells=")]
    if len(texts) > 1:
        raise ConfigError("max_cells is given twice", where=plain)
    return plain + ("?" + "&".join(others) if others else ""), _max_cells(
        texts[0] if texts else None, plain
    )


def _max_cells(text: str | None, where: str) -> int:
    if text is None:
        return MAX_CELLS
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"max_cells is a number of at least 1, not {text!r}", where=where)
    return int(text)

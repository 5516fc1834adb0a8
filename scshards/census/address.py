"""Addresses of cells in a SOMA experiment: soma://URI?filter=EXPRESSION.

    parse("soma://s3://bucket/exp?filter=tissue == 'lung'") -> SomaAddress(uri="s3://bucket/exp", ...)

What stands behind the question mark is as in any URL: key=value, with & between, %20 for a space
where a shell or a list of inputs needs it; a plain text does as well.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlencode

from scshards.base.errors import ConfigError
from scshards.base.storage import redact
from scshards.base.text import did_you_mean

SOMA, CENSUS = "soma://", "census://"

JOINID = "soma_joinid"
"""The number of a cell, and of a gene, in an experiment: a column of obs and of var."""


@dataclass(frozen=True, kw_only=True)
class SomaAddress:
    """Which cells of which experiment.

    Attributes
    ----------
    uri
        The experiment: a path or an s3:// address.
    filter
        Expression over obs; None means all cells.
    measurement, layer
        The matrix.
    first, last
        The soma_joinids between which cells are taken, both included; None is open.
    cells
        How many cells these are, where it is known: with another number the experiment has changed.
    region
        S3 region.
    anonymous
        Read a public bucket of AWS, without credentials and whatever the environment says of S3.
    """

    uri: str
    filter: str | None = None
    measurement: str = "RNA"
    layer: str = "raw"
    first: int | None = None
    last: int | None = None
    cells: int | None = None
    region: str | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        if not self.uri or "?" in self.uri:
            raise ConfigError("the address names no experiment", where=self.uri or SOMA)

    @property
    def whole(self) -> SomaAddress:
        """All cells of the experiment."""
        return dataclasses.replace(self, filter=None, first=None, last=None, cells=None)

    def __str__(self) -> str:
        given = {
            field.name: str(value)
            for field in dataclasses.fields(self)
            if field.name != "uri" and (value := getattr(self, field.name)) != field.default
        }
        return SOMA + self.uri + ("?" + urlencode(given, quote_via=quote) if given else "")


KEYS = [f.name for f in dataclasses.fields(SomaAddress)][1:]
"""What an address may say behind its question mark."""

_KINDS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "max_cells": ("a number of at least 1", "0*[1-9][0-9]{0,17}", int),
    **dict.fromkeys(("first", "last", "cells"), ("a number", "[0-9]{1,18}", int)),
    "anonymous": ("true or false", "(?i:true|false)", lambda text: text.lower() == "true"),
}
"""What the value of a key is, how it is written, and what reads it; all others are text."""


def is_cells(url: str) -> bool:
    """Whether an address names cells of a SOMA experiment, by a query or as one partition."""
    return url.startswith((SOMA, CENSUS))


def is_soma(url: str) -> bool:
    """Whether an address names cells of a SOMA experiment."""
    return url.startswith(SOMA)


def parse(url: str) -> SomaAddress:
    """Take an address apart.

    Raises
    ------
    ConfigError
        When a key is unknown (with the nearest), given twice, or not of its kind.
    """
    place, given = split(url, KEYS)
    return SomaAddress(uri=place.removeprefix(SOMA), **given)


def split(url: str, known: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """What stands before the question mark of an address, and {key: value} of what stands behind it."""
    place, _, query = url.partition("?")
    where = SOMA + redact(place.removeprefix(SOMA)) if is_soma(place) else place
    given: dict[str, Any] = {}
    # A filter may hold what has a meaning in URLs, as ; and +: only & parts, only %xx is decoded.
    for part in filter(None, query.split("&")):
        name, _, text = part.partition("=")
        text = unquote(text)
        if name not in known:
            advice = did_you_mean(name, known)
            if given:
                advice += " (an & in a filter is written %26)"
            raise ConfigError(f"unknown key {name!r}", where=where, advice=advice)
        if name in given:
            raise ConfigError(f"{name} is given twice", where=where)
        kind, pattern, read = _KINDS.get(name, ("text", r"(?s).*\S.*", str))
        if not re.fullmatch(pattern, text):
            raise ConfigError(f"{name} is {kind}, not {text!r}", where=where)
        given[name] = read(text)
    return place, given

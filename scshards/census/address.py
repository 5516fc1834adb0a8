"""Addresses of cells in a SOMA experiment: soma://URI?filter=EXPRESSION.

    parse("soma://s3://bucket/exp?filter=tissue == 'lung'") -> SomaAddress(uri="s3://bucket/exp", ...)

What stands behind the question mark is as in any URL: key=value, with & between, %20 for a space
where a shell or a list of inputs needs it; a plain text does as well. Called by census.partitions,
census.experiment and pack.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlencode

from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError
from scshards.base.storage import redact

SOMA, CENSUS = "soma://", "census://"


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
        if "?" in self.uri:
            raise ConfigError(
                "the address of an experiment can't have a question mark in it", where=self.uri
            )
        if self.first is not None and self.last is not None and self.first > self.last:
            raise ConfigError(
                f"first={self.first} is behind last={self.last}", where=SOMA + redact(self.uri)
            )

    def __str__(self) -> str:
        given = {
            field.name: str(value)
            for field in dataclasses.fields(self)
            if field.name != "uri" and (value := getattr(self, field.name)) != field.default
        }
        return SOMA + self.uri + ("?" + urlencode(given, quote_via=quote) if given else "")


KEYS = [f.name for f in dataclasses.fields(SomaAddress)][1:]
"""What an address may say behind its question mark."""


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
    return address_of(*split(url, KEYS))


def address_of(place: str, given: Mapping[str, str]) -> SomaAddress:
    """The address of what `split` found."""
    uri = place.removeprefix(SOMA)
    if not uri:
        raise ConfigError("the address names no experiment", where=place)
    values: dict[str, Any] = dict(given)
    for name in ("first", "last", "cells"):
        if name in given:
            values[name] = number(name, given[name], place)
    if "anonymous" in given:
        values["anonymous"] = given["anonymous"].lower() == "true"
        if given["anonymous"].lower() not in ("true", "false"):
            raise ConfigError(
                f"anonymous is true or false, not {given['anonymous']!r}", where=_shown(place)
            )
    return SomaAddress(uri=uri, **values)


def split(url: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What stands before the question mark of an address, and {key: value} of what stands behind it.

    Raises
    ------
    ConfigError
        When a key is unknown, given twice, or has no value.
    """
    place, _, query = url.partition("?")
    where = _shown(place)
    given: dict[str, str] = {}
    # A filter may hold what has a meaning in URLs, as ; and +: only & parts, only %xx is decoded.
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name not in known:
            advice = did_you_mean(name, known)
            if given:
                advice += " (an & in a filter is written %26)"
            raise ConfigError(f"unknown key {name!r}", where=where, advice=advice)
        if name in given:
            raise ConfigError(f"{name} is given twice", where=where)
        given[name] = unquote(value)
        if not given[name].strip():
            raise ConfigError(f"{name} has no value", where=where)
    return place, given


def number(name: str, text: str, place: str, least: int = 0) -> int:
    """The whole number that a key of an address says."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise ConfigError(
            f"{name} is a number of at least {least}, not {text!r}", where=_shown(place)
        )
    return int(text)


def _shown(place: str) -> str:
    return SOMA + redact(place.removeprefix(SOMA)) if place.startswith(SOMA) else place

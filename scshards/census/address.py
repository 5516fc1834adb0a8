"""Addresses of cells in a SOMA experiment: soma://URI?filter=EXPRESSION.

    parse("soma://s3://bucket/exp?filter=tissue == 'lung'") -> SomaAddress(uri="s3://bucket/exp", ...)

What stands behind the question mark is as in any URL: key=value, with & between, %20 for a space
where a shell or a list of inputs needs it; a plain text does as well. Called by census.partitions,
census.experiment and pack.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

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
    assert is_soma(url)
    uri, _, query = url.removeprefix(SOMA).partition("?")
    where = SOMA + redact(uri)
    if not uri:
        raise ConfigError("the address names no experiment", where=where)
    given = keys(query, [f.name for f in dataclasses.fields(SomaAddress)[1:]], where=where)
    numbers: dict[str, Any] = {
        name: _number(name, given.pop(name), where)
        for name in ("first", "last", "cells")
        if name in given
    }
    anonymous = given.pop("anonymous", "False")
    if anonymous.lower() not in ("true", "false"):
        raise ConfigError(f"anonymous is true or false, not {anonymous!r}", where=where)
    texts: dict[str, Any] = dict(given)
    return SomaAddress(uri=uri, **texts, **numbers, anonymous=anonymous.lower() == "true")


def keys(query: str, known: list[str], *, where: str) -> dict[str, str]:
    """{key: value} of what stands behind the question mark of an address.

    Raises
    ------
    ConfigError
        When a key is unknown, given twice, or has no value.
    """
    given: dict[str, str] = {}
    # A filter may hold what has a meaning in URLs, as == and +: only & parts, only %xx is decoded.
    for part in query.replace("+", "%2B").split("&") if query else ():
        name, equals, value = part.partition("=")
        if name not in known:
            advice = did_you_mean(name, known)
            if given:
                advice += " (an & in a filter is written %26)"
            raise ConfigError(f"unknown key {name!r}", where=where, advice=advice)
        if name in given:
            raise ConfigError(f"{name} is given twice", where=where)
        value = parse_qsl(f"v={value.replace(';', '%3B')}", keep_blank_values=True)[0][1]
        if not equals or not value.strip():
            raise ConfigError(f"{name} has no value", where=where)
        given[name] = value
    return given


def _number(name: str, text: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise ConfigError(f"{name} is a number, not {text!r}", where=where)
    return int(text)

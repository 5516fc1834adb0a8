"""The queries of a corpus: which cells of the Census, by name, from a TOML file.

load_queries()          those of scGPT's human atlas (queries.toml beside this file)
load_queries("my.toml")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scshards.base.config import build, read_toml
from scshards.base.errors import ConfigError
from scshards.base.records import Damaged
from scshards.base.text import did_you_mean
from scshards.census.address import SomaAddress
from scshards.census.releases import Release

SHIPPED = Path(__file__).with_name("queries.toml")
"""The queries that scGPT's atlas was made with."""

DIRECTORY = "https://census.cellxgene.cziscience.com/cellxgene-census/v1/release.json"
"""Where the Census says which releases it serves, unless a file of queries names another place."""

PRIMARY = "is_primary_data"
"""The column of obs that says of one of a cell's copies that it is the one to take."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query.

    Attributes
    ----------
    filter
        Expression over obs, in the syntax of TileDB-SOMA: comparisons, `in`, `and`, `or`.
    primary
        Take only primary cells: of a cell that several collections published, one. False also takes
        its duplicates.
    organism
        Name of the experiment in the Census.
    """

    filter: str
    primary: bool = True
    organism: str = "homo_sapiens"

    def __post_init__(self) -> None:
        if not self.filter.strip():
            raise Damaged("the filter is empty")
        if not _NAME.fullmatch(self.organism):
            raise Damaged(f"{self.organism!r} is no name of an organism")

    @property
    def obs_filter(self) -> str:
        """The whole expression over obs, on one line."""
        text = re.sub(r"\s*\n\s*", " ", self.filter.strip())
        return f"({text}) and {PRIMARY} == True" if self.primary else text

    def address(self, release: Release) -> SomaAddress:
        """All its cells in a release."""
        return SomaAddress(
            uri=release.experiment(self.organism),
            filter=self.obs_filter,
            region=release.region,
            anonymous=release.anonymous,
        )


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What a file of queries says.

    Attributes
    ----------
    query
        {name: Query}.
    directory
        Address of the JSON file that lists the releases: a URL or a path.
    version
        The release that is meant: its date, "stable" or "latest".
    uri
        A Census by its address, in place of a release of the directory.
    anonymous
        Read a public bucket of AWS without credentials. None does so for the releases of a directory,
        and not for a Census that `uri` names.
    region
        S3 region of `uri`; a directory names the regions of its releases.
    """

    query: Mapping[str, Query] = field(default_factory=dict)
    directory: str = DIRECTORY
    version: str = "stable"
    uri: str | None = None
    anonymous: bool | None = None
    region: str | None = None

    def __post_init__(self) -> None:
        if not self.query:
            raise Damaged("there is no query", advice='add one: [query.NAME] and filter = "..."')
        for name in self.query:
            if not _NAME.fullmatch(name):
                advice = "use letters, digits, dots, dashes and underscores"
                raise Damaged(f"{name!r} can't be the name of a query", advice=advice)

    def __getitem__(self, name: str) -> Query:
        """The query of this name; ConfigError, with the nearest, when there is none."""
        if name not in self.query:
            raise ConfigError(f"no query {name!r}", advice=did_you_mean(name, self.query))
        return self.query[name]


def load_queries(file: str | Path | None = None) -> Queries:
    """Read a file of queries; None reads the shipped one.

    Raises
    ------
    ConfigError
        When it can't be read, a key is unknown (with the nearest), or a query is not one.
    """
    where = str(file or "the shipped queries")
    tables = read_toml(file or SHIPPED)
    if tables.keys() & ({"directory", "version"} if "uri" in tables else {"region"}):
        raise ConfigError(
            "a Census is named either by directory and version, or by uri and region", where=where
        )
    return build(Queries, tables, where)

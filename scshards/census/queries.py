"""The queries of a corpus: which cells of the Census, by name, from a TOML file; and of which release.

    load_queries()          those of scGPT's human atlas (queries.toml beside this file)
    load_queries("my.toml")
    find_release(queries, "stable") -> Release(version="2025-01-30", uri="s3://...", ...)

The directory of releases is a JSON object {version: description, alias: version}. Own code and not
cellxgene_census, which reads one fixed address, with one try and no timeout, and opens retracted
releases with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from scshards.base.config import build, read_toml
from scshards.base.errors import ConfigError, StorageError
from scshards.base.records import At, Damaged, from_tree, read_json
from scshards.base.storage import Storage, redact
from scshards.base.text import did_you_mean
from scshards.census.address import SomaAddress

SHIPPED = Path(__file__).with_name("queries.toml")
"""The queries that scGPT's atlas was made with."""

DIRECTORY = "https://census.cellxgene.cziscience.com/cellxgene-census/v1/release.json"
"""Where the Census says which releases it serves, unless a file of queries names another place."""

PRIMARY = "is_primary_data"
"""The column of obs that says of one of a cell's copies that it is the one to take."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release, or a Census that was named by its address.

    Attributes
    ----------
    version
        Its date; the address itself where there is no directory.
    uri
        Its SOMA collection.
    region
        S3 region, where it is known.
    anonymous
        Whether it is read without credentials.
    is_lts
        Whether it is kept for five years; others are withdrawn after some months.
    retracted
        Why it should not be used any more, or None.
    """

    version: str
    uri: str
    region: str | None
    anonymous: bool
    is_lts: bool = False
    retracted: str | None = None

    def experiment(self, organism: str) -> str:
        """Address of the experiment of one organism."""
        return f"{self.uri.rstrip('/')}/census_data/{organism}"


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


def find_release(
    queries: Queries, version: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> Release:
    """The release that a file of queries means; or `version`, in its place.

    Raises
    ------
    ConfigError
        When it is not served (any more), with those that are; when it was retracted; or when both
        a version and an address are given.
    StorageError
        When the directory can't be read, or is none.
    """
    if queries.uri is not None:
        name = redact(queries.uri)
        if version is not None:
            raise ConfigError(
                f"the queries name a Census by its address: there is no version {version!r} to choose",
                where=name,
                advice="leave the version out, or `uri` out of the file of queries",
            )
        anonymous = bool(queries.anonymous)
        return Release(version=name, uri=queries.uri, region=queries.region, anonymous=anonymous)
    found, aliases = releases(queries, storage_options)
    wanted = version or queries.version
    name = aliases.get(wanted, wanted)
    if name not in found:
        raise ConfigError(
            f"the Census does not serve the version {wanted!r}",
            where=redact(queries.directory),
            advice=f"{did_you_mean(wanted, [*found, *aliases])} `scshards census list` shows all",
        )
    release = found[name]
    if release.retracted is not None:
        raise ConfigError(
            f"the version {name!r} of the Census was retracted: {release.retracted}",
            where=redact(queries.directory),
            advice=f"take another; who needs this one names it by `uri = {release.uri!r}` in a file of "
            "queries",
        )
    return release


def releases(
    queries: Queries, storage_options: Mapping[str, Any] | None = None
) -> tuple[dict[str, Release], dict[str, str]]:
    """({version: release}, {alias: version}) of the directory."""
    data = Storage(queries.directory, storage_options).read("")
    try:
        tree = from_tree(dict[str, str | _Description], read_json(data), others=True)
    except Damaged as e:
        raise StorageError(
            f"this is no directory of releases of the Census: {e}", where=redact(queries.directory)
        ) from None
    found = {
        name: Release(
            version=name,
            uri=said.uri,
            region=said.region,
            anonymous=queries.anonymous is not False,
            is_lts=said.is_lts,
            retracted=str(said.retraction.get("reason", "no reason")) if said.retraction else None,
        )
        for name, said in tree.items()
        if isinstance(said, _Description)
    }
    return found, {a: v for a, v in tree.items() if isinstance(v, str) and v in found}


@dataclass(frozen=True, kw_only=True)
class _Description:
    """What the directory says of a release."""

    uri: Annotated[str, At("soma.uri")]
    region: Annotated[str | None, At("soma.s3_region")] = None
    is_lts: Annotated[bool, At("flags.lts")] = False
    retraction: Mapping[str, Any] | None = None

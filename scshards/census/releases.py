"""Where a release of the CELLxGENE Census is: what its directory of releases says.

    find_release(queries, "stable") -> Release(version="2025-01-30", uri="s3://...", ...)

The directory is a JSON object {version: description, alias: version}. Own code and not cellxgene_census,
which reads one fixed address, with one try and no timeout, and opens retracted releases with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from scshards.base.errors import ConfigError, StorageError
from scshards.base.records import At, Damaged, from_tree, read_json
from scshards.base.storage import Storage, redact
from scshards.base.text import did_you_mean

if TYPE_CHECKING:
    from scshards.census.queries import Queries


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

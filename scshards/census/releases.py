"""Where a release of the CELLxGENE Census is: what its directory of releases says.

    find_release(directory, "stable") -> Release(version="2025-01-30", uri="s3://...", ...)

The directory is a JSON object {version: description, alias: version}, as cellxgene_census reads it.
Called by census.partitions, census.index and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError, StorageError
from scshards.base.records import read_json
from scshards.base.storage import Storage, redact

if TYPE_CHECKING:
    from scshards.census.queries import Queries

EXPERIMENTS = "census_data"
"""The collection of a Census that holds an experiment for each organism."""

MIRRORS = "mirrors.json"
"""Beside the directory: the buckets that serve the releases which have only a relative address."""


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
        return f"{self.uri.rstrip('/')}/{EXPERIMENTS}/{organism}"


def find_release(
    queries: Queries, version: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> Release:
    """The release that a file of queries means.

    Parameters
    ----------
    version
        Another one than the file says.

    Raises
    ------
    ConfigError
        When it is not served (any more), with those that are; when it was retracted; or when both
        a version and an address are given.
    StorageError
        When the directory can't be read, or is none.
    """
    if queries.uri is not None:
        if version is not None:
            raise ConfigError(
                f"the queries name a Census by its address: there is no version {version!r} to choose",
                where=redact(queries.uri),
                advice="leave the version out, or `uri` out of the file of queries",
            )
        return Release(
            version=redact(queries.uri),
            uri=queries.uri,
            region=queries.region,
            anonymous=bool(queries.anonymous),
        )
    found, aliases = releases(queries, storage_options)
    wanted = version or queries.version
    name = aliases.get(wanted, wanted)
    if name not in found:
        shown = ", ".join(f"{alias} ({name})" for alias, name in sorted(aliases.items()))
        lts = ", ".join(sorted(r.version for r in found.values() if r.is_lts))
        raise ConfigError(
            f"the Census does not serve the version {wanted!r}",
            where=redact(queries.directory),
            advice=f"{did_you_mean(wanted, [*found, *aliases])}; it serves {shown}; kept for years are "
            f"{lts or 'none'}; `scshards census list` shows all",
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
    """({version: release}, {alias: version}) of the directory.

    Raises
    ------
    StorageError
        When the directory can't be read, or is none.
    """
    where = redact(queries.directory)
    tree = _json(queries.directory, storage_options)
    if not isinstance(tree, dict):
        raise StorageError("this is no directory of releases of the Census", where=where)
    found: dict[str, Release] = {}
    aliases: dict[str, str] = {}
    mirror: Mapping[str, Any] | None = None
    for name, said in tree.items():
        if isinstance(said, str):
            aliases[name] = said
            continue
        if not _is_description(said):
            raise StorageError("this is no directory of releases of the Census", where=where)
        soma, flags = said["soma"], said.get("flags") or {}
        withdrawn = said.get("retraction")
        uri, region = soma.get("uri"), soma.get("s3_region")
        if not uri:
            mirror = mirror or _mirror(queries, storage_options)
            uri = f"{mirror['base_uri'].rstrip('/')}/{soma['relative_uri'].lstrip('/')}"
            region = mirror.get("region")
        found[name] = Release(
            version=name,
            uri=uri,
            region=region,
            anonymous=queries.anonymous is not False,
            is_lts=bool(flags.get("lts")),
            retracted=str(withdrawn.get("reason") or "no reason is given") if withdrawn else None,
        )
    return found, {alias: name for alias, name in aliases.items() if name in found}


def _is_description(said: Any) -> bool:
    """Whether this describes a release, as far as it is looked at here."""
    if not isinstance(said, dict) or not isinstance(said.get("soma"), dict):
        return False
    optional = (said.get("flags"), said.get("retraction"))
    addresses = (said["soma"].get("uri"), said["soma"].get("relative_uri"))
    return (
        all(table is None or isinstance(table, dict) for table in optional)
        and all(address is None or isinstance(address, str) for address in addresses)
        and any(addresses)
    )


def _mirror(queries: Queries, storage_options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    folder, slash, _ = queries.directory.rpartition("/")
    address = f"{folder}{slash}{MIRRORS}"
    tree = _json(address, storage_options)
    default = tree.get("default") if isinstance(tree, dict) else None
    mirror = tree.get(default) if isinstance(default, str) else None
    if not isinstance(mirror, dict) or not isinstance(mirror.get("base_uri"), str):
        raise StorageError("this names no mirror of the Census", where=redact(address))
    return mirror


def _json(address: str, storage_options: Mapping[str, Any] | None) -> Any:
    folder, slash, name = address.rpartition("/")
    data = Storage(folder + slash or ".", storage_options).read(name)
    try:
        return read_json(data)
    except ValueError:
        raise StorageError("this is not JSON", where=redact(address)) from None

"""Where a release of the CELLxGENE Census is: what its directory of releases says.

    find_release(queries, "stable") -> Release(version="2025-01-30", uri="s3://...", ...)

The directory is a JSON object {version: description, alias: version}. Own code and not cellxgene_census,
which reads one fixed address, with one try and no timeout, and opens retracted releases with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError, StorageError
from scshards.base.records import Damaged, Record, read_json
from scshards.base.storage import Storage, redact

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
    found: dict[str, Release] = {}
    aliases: dict[str, str] = {}
    mirror: tuple[str, str | None] | None = None
    try:
        for name, tree in _read(queries.directory, storage_options).items():
            if isinstance(tree, str):
                aliases[name] = tree
                continue
            said = Record(tree, name)
            soma = said.record("soma")
            uri, region = _text(soma, "uri"), _text(soma, "s3_region")
            if not uri:
                path = soma.text("relative_uri")
                mirror = mirror or _mirror(queries.directory, storage_options)
                uri, region = f"{mirror[0].rstrip('/')}/{path.lstrip('/')}", mirror[1]
            withdrawn = _table(said, "retraction")
            found[name] = Release(
                version=name,
                uri=uri,
                region=region,
                anonymous=queries.anonymous is not False,
                is_lts=bool(_table(said, "flags").get("lts")),
                retracted=str(withdrawn.get("reason") or "no reason is given")
                if withdrawn
                else None,
            )
    except Damaged as e:
        raise StorageError(
            f"this is no directory of releases of the Census: {e}", where=redact(queries.directory)
        ) from None
    return found, {alias: name for alias, name in aliases.items() if name in found}


def _mirror(directory: str, storage_options: Mapping[str, Any] | None) -> tuple[str, str | None]:
    """Where the releases are that have only a relative address, and its region."""
    folder, slash, _ = directory.rpartition("/")
    address = f"{folder}{slash}mirrors.json"
    try:
        tree = Record(_read(address, storage_options))
        mirror = tree.record(tree.text("default"))
        return mirror.text("base_uri"), _text(mirror, "region")
    except Damaged as e:
        raise StorageError(
            f"this names no mirror of the Census: {e}", where=redact(address)
        ) from None


def _read(address: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    folder, slash, name = address.rpartition("/")
    tree = read_json(Storage(folder + slash or ".", storage_options).read(name))
    return Record({"it": tree}).plain("it")


def _text(record: Record, name: str) -> str | None:
    return record.text(name) if name in record and record.any(name) is not None else None


def _table(record: Record, name: str) -> dict[str, Any]:
    return record.plain(name) if name in record and record.any(name) is not None else {}

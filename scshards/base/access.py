"""How stores are reached: file systems' options by address, and how patiently they are asked.

    parse_options(--storage-options, retry) -> Access       JSON, or a TOML or JSON file
    access.options_for("s3://atlas/x.h5ad") -> {...}        those of the longest prefix that fits

An Access is a mapping of what was given, so that whoever passes `storage_options` on takes a plain dict
as well. Secrets stand in a file or in the environment; no message tells a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scshards.base.config import parse_toml
from scshards.base.errors import ConfigError
from scshards.base.records import read_json
from scshards.base.retry import Retry

_FORMS = (
    "give JSON such as '{\"anon\": true}', or a TOML or JSON file as @FILE; options of some addresses "
    'alone stand in a table named by how those begin, such as ["s3://bucket/"]'
)
_TEXTS = {
    "key", "secret", "token", "profile", "endpoint_url", "username", "password", "account_name",
    "account_key", "sas_token", "connection_string", "project",
}  # fmt: skip
_TABLES = {"client_kwargs", "config_kwargs", "s3_additional_kwargs", "headers"}
_FLAGS = {"anon", "use_ssl", "requester_pays", "version_aware"}
_OF_STORES = (_TEXTS | _TABLES | _FLAGS) - {"headers"}


@dataclass(frozen=True, kw_only=True, eq=False)  # it is equal to a mapping of the same options
class Access(Mapping[str, Any]):
    """How stores are reached.

    Attributes
    ----------
    options
        What file systems are made with: for all addresses, or {how an address begins: its options},
        such as {"s3://atlas/": {"anon": True}}. Where several beginnings fit, the longest counts, and
        what is for all addresses counts where none does; of that, a web server is not given what only a
        store has, such as keys. For S3, what is not given comes from the usual AWS environment variables
        and profiles.
    retry
        How a request that fails is tried again.

    Raises
    ------
    ConfigError
        When an option's value is none it can have.
    """

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    retry: Retry = field(default_factory=Retry)

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            if _is_prefix(name):
                _check(name, value, Mapping)
                for option, inner in value.items():
                    _check_option(option, inner, f'["{name}"] ')
            else:
                _check_option(name, value)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Access:
        """What was given as `storage_options`: None, a mapping, or an Access as it is."""
        return given if isinstance(given, Access) else cls(options=dict(given or {}))

    def options_for(self, address: str) -> dict[str, Any]:
        """The options of the file system that `address` is of."""
        prefixes = [p for p in self.options if _is_prefix(p) and address.startswith(p)]
        if prefixes:
            return dict(self.options[max(prefixes, key=len)])
        is_web = address.startswith(("http://", "https://"))
        return {
            name: value
            for name, value in self.options.items()
            if not _is_prefix(name) and not (is_web and name in _OF_STORES)
        }

    def __getitem__(self, name: str) -> Any:
        return self.options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)

    def __bool__(self) -> bool:
        # Without options there still is a retry rule.
        return True


def parse_options(text: str | None, retry: Retry | None = None) -> Access:
    """`--storage-options` as it is given: JSON, `@FILE`, or nothing."""
    return Access(options=_parse(text) if text else {}, retry=retry or Retry())


def _parse(text: str) -> dict[str, Any]:
    if not text.startswith("@"):
        # The text may hold a secret: say where it breaks, not what it says.
        return _table(text, read_json, "JSON", "--storage-options")
    path = Path(text[1:]).expanduser()
    try:
        said = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        problem = getattr(e, "strerror", None) or "it is no text in UTF-8"
        raise ConfigError(
            f"the file of --storage-options can't be read: {problem}", where=path, advice=_FORMS
        ) from None
    if said.lstrip().startswith("{"):
        return _table(said, read_json, "JSON", path)
    return _table(said, parse_toml, "TOML", path)


def _table(text: str, loads: Any, kind: str, where: object) -> dict[str, Any]:
    try:
        options = loads(text)
    except ValueError as e:
        # The words before the place may quote the text.
        place = str(e).rpartition("(")[2].rstrip(")") if str(e).endswith(")") else ""
        raise ConfigError(
            f"the storage options are not valid {kind}{f' ({place})' if place else ''}",
            where=where,
            advice=_FORMS,
        ) from None
    if not isinstance(options, dict):
        raise ConfigError(
            "the storage options are no table of names and values", where=where, advice=_FORMS
        )
    return options


def _is_prefix(name: str) -> bool:
    return "://" in name


def _check_option(name: str, value: Any, at: str = "") -> None:
    if name in _TEXTS:
        # gcsfs takes the contents of a key file as its token.
        _check(f"{at}{name}", value, (str, Mapping) if name == "token" else str)
    elif name in _TABLES:
        _check(f"{at}{name}", value, Mapping)
    elif name in _FLAGS:
        _check(f"{at}{name}", value, bool)


def _check(name: str, value: Any, kinds: type | tuple[type, ...]) -> None:
    wanted = {str: "text", bool: "true or false"}.get(kinds, "a table")  # type: ignore[arg-type]
    if value is not None and not isinstance(value, kinds):
        raise ConfigError(
            f"the storage option {name} is {wanted}, not {type(value).__name__}",
            where="--storage-options",
            advice=_FORMS,
        )

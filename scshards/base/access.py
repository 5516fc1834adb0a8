"""How stores are reached: file systems' options by address, and how patiently they are asked.

    parse_options(--storage-options, retry) -> Access       JSON, or a TOML or JSON file
    access.options_for("s3://atlas/x.h5ad") -> {...}        those of the longest prefix that fits

An Access is a mapping of what was given, so that whoever passes `storage_options` on takes a plain dict
as well. Secrets stand in a file or in the environment; no message tells a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("key", "secret", "profile", "endpoint_url", "username", "password", "account_name",
         "account_key", "sas_token", "connection_string", "project"),
        (str,),
    ),
    "token": (Mapping, str),  # gcsfs takes the contents of a key file
    **dict.fromkeys(("client_kwargs", "config_kwargs", "s3_additional_kwargs", "headers"), (Mapping,)),
    **dict.fromkeys(("anon", "use_ssl", "requester_pays", "version_aware"), (bool,)),
}  # fmt: skip
_OF_STORES = _KINDS.keys() - {"headers"}


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
        _check(self.options, "")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Access:
        """What was given as `storage_options`: None, a mapping, or an Access as it is."""
        return given if isinstance(given, Access) else cls(options=dict(given or {}))

    def changed(self, *, retries: int | None, timeout: float | None) -> Access:
        """The same with other numbers of the retry rule, where they are given."""
        given = {"retries": retries, "timeout": timeout}
        numbers: dict[str, Any] = {
            name: value for name, value in given.items() if value is not None
        }
        return replace(self, retry=replace(self.retry, **numbers))

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

    def __hash__(self) -> int:
        return hash(frozenset(self.options))

    def __bool__(self) -> bool:
        # Without options there still is a retry rule.
        return True


def parse_options(text: str | None, retry: Retry | None = None) -> Access:
    """`--storage-options` as it is given: JSON, `@FILE`, or nothing."""
    return Access(options=_parse(text) if text else {}, retry=retry or Retry())


def _parse(text: str) -> dict[str, Any]:
    where: object = "--storage-options"
    if text.startswith("@"):
        where = path = Path(text[1:]).expanduser()
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            problem = getattr(e, "strerror", None) or "it is no text in UTF-8"
            raise ConfigError(
                f"the file of --storage-options can't be read: {problem}", where=path, advice=_FORMS
            ) from None
    is_toml = where != "--storage-options" and not text.lstrip().startswith("{")
    try:
        options = parse_toml(text) if is_toml else read_json(text)
    except ValueError as e:
        # The text may hold a secret, and the words before the place may quote it.
        place = str(e).rpartition("(")[2].rstrip(")") if str(e).endswith(")") else ""
        kind = "TOML" if is_toml else "JSON"
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


def _check(options: Mapping[str, Any], above: str) -> None:
    for name, value in options.items():
        is_prefix = _is_prefix(name) and not above
        kinds = (Mapping,) if is_prefix else _KINDS.get(name, ())
        if kinds and not isinstance(value, kinds) and (value is not None or is_prefix):
            wanted = {str: "text", bool: "true or false"}.get(kinds[0], "a table")
            raise ConfigError(
                f"the storage option {above}{name} is {wanted}, not {type(value).__name__}",
                where="--storage-options",
                advice=_FORMS,
            )
        if is_prefix:
            _check(value, f'["{name}"] ')

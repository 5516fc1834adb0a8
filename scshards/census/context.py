"""How TileDB reaches a store: its settings from storage options and the environment.

fsspec reads `AWS_ENDPOINT_URL` and takes options such as {"key": ..., "endpoint_url": ...}; TileDB has
names of its own for the same. Credentials that are not given come from the usual AWS variables and
profiles, which TileDB's S3 client reads itself.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from scshards.base.access import Access
from scshards.base.errors import ConfigError
from scshards.base.storage import redact
from scshards.base.text import did_you_mean
from scshards.base.threads import all_cores
from scshards.census.address import SomaAddress

BUFFER_BYTES = 1 << 23
"""TileDB fills a buffer of this size for each column it reads, and hands it out."""

BUDGET_BYTES = 1 << 30
"""What TileDB may hold at a time, where it would take ten times as much."""

_SHARES = {"array_data": 0.5, "coords": 0.1, "tile_ranges": 0.1}
"""Shares of the budget: what is known of all tiles of a matrix, some 60 bytes each, of which the Census
has millions; the tiles that are inflated at a time; and which of them are wanted."""

_READERS = ("sparse_global_order", "sparse_unordered_with_dups")
"""TileDB's code for matrices that may not and may have a value twice; those of the Census may."""

REQUESTS = 16
"""Reads of an object store that are on their way at a time."""

TRIES = 8
"""How often a request is sent before it has failed: the last waits three seconds."""

_MERGE = "sm.query.sparse_global_order.preprocess_tile_merge"
"""Whether TileDB sorts all tiles on threads of their own before it reads them. It does not wait for them
when a read ends: of a thousand short reads one or two ended the process, with `Range size ... does not
match the expected size 16` or a fault of memory (TileDB 2.30; compare its pull request 5723)."""

_REGION = "us-east-1"
"""Where a bucket of AWS is looked for that is nowhere said to be elsewhere."""

_AWS = ".amazonaws.com"

_WORKER = "scshards worker"

_OPTIONS = ("anon", "client_kwargs", "endpoint_url", "key", "secret", "token")
"""The storage options of s3fs that mean something to TileDB."""


def make_context(address: SomaAddress, storage_options: Mapping[str, Any] | None = None) -> Any:
    """A tiledbsoma context that reaches an experiment.

    ConfigError when TileDB knows no such option, or the address is of a store that is not supported.
    """
    import tiledbsoma

    is_s3 = address.uri.startswith("s3://")
    # All cores of the machine, which TileDB would take, may not be this process's.
    cores = 1 if is_one_of_many() else all_cores()
    config: dict[str, Any] = {
        "soma.init_buffer_bytes": BUFFER_BYTES,
        _MERGE: 0,
        "sm.mem.total_budget": BUDGET_BYTES,
        "sm.compute_concurrency_level": cores,
        "sm.io_concurrency_level": REQUESTS if is_s3 else cores,
    }
    for reader, (what, share) in itertools.product(_READERS, _SHARES.items()):
        config[f"sm.mem.reader.{reader}.ratio_{what}"] = share
    if is_s3:
        config |= _s3(store_options(address, storage_options))
    elif "://" in address.uri and not address.uri.startswith("file://"):
        raise ConfigError(
            "an experiment is read from a path or from s3://",
            where=redact(address.uri),
            advice="copy it there, or download its cells as h5ad files",
        )
    return tiledbsoma.SOMATileDBContext(tiledb_config=config)


def store_options(
    address: SomaAddress, storage_options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Options with which s3fs reaches the store of an experiment; none for one on a disk.

    One that is anonymous is on AWS. Options and environment are left aside then, as they are those of
    another store, where shards lie.
    """
    if not address.uri.startswith("s3://"):
        return {}
    if address.anonymous:
        region = address.region or _REGION
        return {
            "anon": True,
            "endpoint_url": f"https://s3.{region}{_AWS}",
            "client_kwargs": {"region_name": region},
        }
    options = Access.of(storage_options).options_for(address.uri)
    if address.region:
        more = options.get("client_kwargs") or {}
        options["client_kwargs"] = {"region_name": address.region, **more}
    return options


def said(error: Exception) -> str:
    """What TileDB says, without what C++, Python and curl add to it, and without credentials."""
    text = str(error).strip()
    if isinstance(error, KeyError):
        text = text.strip("'\"")
    line = text.splitlines()[0].removeprefix("SOMAError: ") if text else type(error).__name__
    if "incompatible function arguments" in line:
        line = "a value is not of its column's type: text stands in quotes, numbers do not"
    line = re.sub(r"^.*Caught std::exception: ", "", line)
    line = re.sub(r"\s*\[Error Type: .*\]\s*(?=:|$)", "", line)
    return redact(line)


def be_one_of_many() -> None:
    """Say that this process is one of several that share a machine's processors."""
    multiprocessing.current_process().name = _WORKER


def is_one_of_many() -> bool:
    """Whether this process is one of several workers, of a pool or of a dask cluster."""
    return multiprocessing.current_process().name.startswith((_WORKER, "Dask Worker"))


def _s3(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(
                f"a SOMA experiment's store knows no option {name!r}",
                where="--storage-options",
                advice=did_you_mean(name, _OPTIONS),
            )
    more, env = options.get("client_kwargs") or {}, os.environ.get
    config: dict[str, Any] = {
        "vfs.s3.max_parallel_ops": REQUESTS,
        "vfs.s3.connect_max_tries": TRIES,
        "vfs.s3.aws_access_key_id": options.get("key"),
        "vfs.s3.aws_secret_access_key": options.get("secret"),
        "vfs.s3.aws_session_token": options.get("token"),
        "vfs.s3.region": more.get("region_name") or env("AWS_REGION") or env("AWS_DEFAULT_REGION"),
        "vfs.s3.no_sign_request": "true" if options.get("anon") else None,
    }
    endpoint = options.get("endpoint_url") or more.get("endpoint_url")
    endpoint = endpoint or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint)
        config["vfs.s3.scheme"], config["vfs.s3.endpoint_override"] = parts.scheme, parts.netloc
        config["vfs.s3.use_virtual_addressing"] = str(parts.netloc.endswith(_AWS)).lower()
    return {name: str(value) for name, value in config.items() if value}

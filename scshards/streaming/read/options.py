"""ReadOptions: how shards are read, shuffled and kept, and what becomes of those that are bad."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Annotated, Any, Literal

from scshards.base.access import Access
from scshards.base.config import Options
from scshards.base.errors import ConfigError
from scshards.base.records import Count, Damaged, Form, Positive, shown
from scshards.base.text import size_of

OnBadShard = Literal["raise", "quarantine"]

THREADS = 2
"""Of a loader whose options do not say how many."""


def _read_folder(value: Any) -> str | None:
    try:
        return None if value is None else os.fspath(value)
    except TypeError:
        raise Damaged(f"{value!r} is no path") from None


def _read_size(value: Any) -> int | None:
    try:
        return None if value is None else size_of(value)
    except (TypeError, ValueError, OverflowError) as e:
        if isinstance(e, ConfigError):
            raise
        raise Damaged(f"it is bytes, or a text such as '200 GB', not {shown(value)}") from None


def _read_prefetch(value: Any) -> str | int | None:
    if value is None:
        return None
    if isinstance(value, str):
        size_of(value)
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise Damaged(
            f"it is a number of batches from 1 on, or bytes such as '64 MB', not {value!r}"
        )
    return int(value)


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Options):
    """How shards are read and shuffled, and what becomes of bad ones: `CellLoader(..., read=...)`.

    Attributes
    ----------
    lanes
        Readers that an epoch is dealt to, each with a part of the shuffle buffer. World sizes that
        divide their number get the same global batches; another one takes the largest multiple of
        itself that fits.
    shuffle_buffer
        Cells in the shuffle buffers of all lanes, and so of all ranks, together.
    threads
        Threads that shuffle cells and make batches. Without it 2, and 1 in each worker of a DataLoader.
    prefetch
        What is made before it is asked for: a number of batches, or bytes as a text, such as "64 MB".
        Without it 16 batches, or fewer where so many have more than 64 MB.
    pin_memory
        Put batches, but not their keys, into page-locked memory, which `to(device, non_blocking=True)`
        copies from while the host goes on. Without it, where there is a CUDA device.
    cache_dir
        A folder on a local disk that keeps what was read, shared by the processes of a node.
    cache_size
        How much the folder may hold: bytes, or a text such as "200 GB". Given together with `cache_dir`.
    retries
        How often a remote read is tried again, with growing waits. Without it, as an Access in
        `storage_options` says, else 14 times.
    timeout
        Seconds without an answer, or without more of it, after which a remote request has failed.
        Without it, as an Access in `storage_options` says, else 30.
    on_bad_shard
        What becomes of a chunk or an index that stays bad when it was read again. raise: the error is
        raised. quarantine: it is logged, and rows of weight 0 come in place of its cells.
    max_bad_cells
        With "quarantine": an error is raised when more cells than this are lost in an epoch on a rank.
    storage_options
        Options of the file system, such as credentials. No message, repr or state shows them.
    """

    lanes: Positive = 64
    shuffle_buffer: Positive = 8192
    threads: Positive | None = None
    prefetch: Annotated[str | int | None, Form(_read_prefetch)] = None
    pin_memory: bool | None = None
    cache_dir: Annotated[str | os.PathLike[str] | None, Form(_read_folder)] = None
    cache_size: Annotated[str | int | None, Form(_read_size)] = None
    retries: Count | None = None
    timeout: float | None = None
    on_bad_shard: OnBadShard = "raise"
    max_bad_cells: Count = 10_000
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.cache_dir is None) != (self.cache_size is None):
            raise ConfigError(
                "cache_dir and cache_size are given together or not at all",
                where="cache_dir, cache_size",
            )
        _ = self.access  # refuses what can't be

    @property
    def access(self) -> Access:
        """How the store is reached."""
        return Access.of(self.storage_options).changed(retries=self.retries, timeout=self.timeout)

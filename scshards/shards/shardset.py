"""Open a shard set: its manifest, its vocabulary, its indexes. Called by stream, pack, CLI, users."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from scshards.base.errors import ChecksumError, ConfigError, FormatError, StorageError
from scshards.base.retry import Retry
from scshards.base.storage import Storage
from scshards.cells.vocab import Vocab
from scshards.shards.index import read_index
from scshards.shards.manifest import MANIFEST, VOCAB, Manifest, ShardInfo


class ShardSet:
    """A complete shard set on disk or in an object store.

    Parameters
    ----------
    root
        A local path or an fsspec URL.
    storage_options
        Passed to the file system.
    retry
        How remote reads that fail are tried again.

    Raises
    ------
    StorageError
        When there is no manifest: nothing was packed there, or packing did not finish.
    FormatError
        When the manifest is damaged or of another version.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        retry: Retry | None = None,
    ) -> None:
        self.storage = Storage(root, storage_options, retry=retry)
        manifest = self.storage.read_if_there(MANIFEST)
        if manifest is None:
            raise StorageError(
                "there is no complete shard set here: manifest.json is missing",
                where=self.storage.at(""),
                advice="check the address; if packing was interrupted, pack it again",
            )
        self.manifest = Manifest.from_json(manifest, where=self.storage.at(MANIFEST))

    @cached_property
    def vocab(self) -> Vocab:
        """The vocabulary, after its fingerprint was found to be the manifest's."""
        where = self.storage.at(VOCAB)
        vocab = Vocab.from_json(self.storage.read(VOCAB), where=where)
        if vocab.fingerprint != self.manifest.vocab_fingerprint:
            raise ChecksumError(
                "the vocabulary is not the one that these shards were packed with",
                where=where,
                advice="restore vocab.json from a good copy",
            )
        return vocab

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of a split; ConfigError names the splits there are."""
        if split not in self.manifest.splits:
            raise ConfigError(
                f"there is no split {split!r}",
                where=self.storage.at(""),
                advice="its splits are: " + ", ".join(self.manifest.splits),
            )
        return self.manifest.splits[split]

    def index(
        self, shard: ShardInfo, columns: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Columns of a shard's index, after its checksum was found right."""
        return read_checked_index(self.storage, shard, columns)


def read_checked_index(
    storage: Storage, shard: ShardInfo, columns: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Columns of a shard's index, after its checksum was found right.

    Raises
    ------
    ChecksumError, FormatError
        When it is not the index that was packed.
    """
    data = storage.read(shard.index_path)
    return checked_index(data, shard, columns, storage.at(shard.index_path))


def checked_index(
    data: bytes, shard: ShardInfo, columns: Sequence[str] | None, where: str
) -> dict[str, NDArray[Any]]:
    """Columns of an index that was read; errors as of `read_checked_index`."""
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ChecksumError(
            "the index is not the one that was packed",
            where=where,
            advice="restore it from a good copy, or pack the shard set again",
        )
    table = read_index(data, columns, where=where)
    n = len(next(iter(table.values())))
    if n != shard.cells:
        raise FormatError(f"the index has {n} rows for {shard.cells} cells", where=where)
    return table

"""What can only be known over all shards of a set: keys, sums of sources, and what the options promise.

Called by pack.verify.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.cells.batch import KEY_ROW_BITS, format_key
from scshards.pack.verify_promises import Promises
from scshards.pack.verify_shard import Faults
from scshards.shards.manifest import MANIFEST, Manifest


class WholeSet:
    """What can only be known over all shards."""

    def __init__(self, manifest: Manifest, n_cells: int) -> None:
        self._manifest = manifest
        self._keys = np.empty(n_cells, np.int64)
        self._n_keys = 0
        self._is_whole = True
        self._cells = np.zeros(len(manifest.sources), np.int64)
        self._values = np.zeros(len(manifest.sources), np.int64)
        self._bytes = np.zeros(len(manifest.sources), np.int64)
        self._promises = Promises(manifest)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """See VerifyReport."""
        return tuple(self._promises.unchecked)

    def add(self, split: str, path: str, index: Mapping[str, NDArray[Any]], faults: Faults) -> None:
        """Count in one shard, by its index."""
        source, row = index["source"].astype(np.int64), index["row"].astype(np.int64)
        known = (source >= 0) & (source < len(self._cells))
        room = len(self._keys) - self._n_keys
        if not known.all() or len(source) > room:
            self._is_whole = False  # a fault of that shard already
            return
        self._keys[self._n_keys : self._n_keys + len(source)] = source << KEY_ROW_BITS | row
        self._n_keys += len(source)
        n = len(self._cells)
        self._cells += np.bincount(source, minlength=n)
        self._values += np.bincount(source, index["n_genes"], minlength=n).astype(np.int64)
        self._bytes += np.bincount(source, index["size"], minlength=n).astype(np.int64)
        self._promises.add(split, path, index, faults)

    def check(self, faults: Faults) -> None:
        """Add what is wrong over all shards."""
        keys = self._keys[: self._n_keys]
        keys.sort()
        for key in np.unique(keys[1:][keys[1:] == keys[:-1]]).tolist():
            name = format_key(key >> KEY_ROW_BITS, key & ((1 << KEY_ROW_BITS) - 1))
            faults.add("", name, "the cell is in the shard set more than once")
        for i, s in enumerate(self._manifest.sources):
            if s.rows != s.kept + sum(s.dropped.values()):
                faults.add(
                    MANIFEST, None, f"the cells kept and dropped of {s.name} are not its rows"
                )
            if s.columns != s.matched + s.unmatched:
                faults.add(MANIFEST, None, f"the genes of {s.name} do not add up")
            if not self._is_whole or self._n_keys < len(self._keys):
                continue  # shards that could not be counted are faults already
            for what, said, found in (
                ("cells", s.kept, int(self._cells[i])),
                ("values", s.values, int(self._values[i])),
                ("bytes", s.bytes, int(self._bytes[i])),
            ):
                if said != found:
                    faults.add(MANIFEST, None, f"{found:,} {what} of {s.name}, not {said:,}")
        self._promises.check(faults)

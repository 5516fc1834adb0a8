"""An experiment that stays open in a process, and what tells one state of it from another.

    identity(address, options)      lists what has been written to the experiment; a few small requests
    shared(address, options)        the experiment, opened once for all tasks of a process that read it

Opening an experiment takes some twenty small reads, which on an object store is as long as reading a
hundred cells. Called by pack.sources and pack.sources_soma.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from scshards.atlas.address import SomaAddress
from scshards.atlas.soma import Experiment
from scshards.atlas.soma_context import listing_options
from scshards.base.errors import MissingDataError
from scshards.base.storage import Storage, redact

_WRITTEN = ("__commits", "__fragments", "__group", "__schema")
"""The folders of an array or group in which every write leaves a file or folder of a name of its own."""


class Shared(NamedTuple):
    """An open experiment and the state it was opened in."""

    experiment: Experiment
    state: str


def identity(
    address: SomaAddress, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What tells one state of an experiment, and one choice of its cells, from another; for JSON.

    The state is a hash of the names of all that was written to obs, var and the matrix: TileDB changes
    no file, and names each write by its time and at random.

    Raises
    ------
    As open_experiment.
    """
    shown = str(dataclasses.replace(address, uri=redact(address.uri)))
    return {"cells": shown, "state": _opened(address, storage_options, look=True).state}


def shared(address: SomaAddress, storage_options: Mapping[str, Any] | None = None) -> Shared:
    """The experiment of an address, open; it is not to be closed, as others use it.

    It is looked at whether it has changed since it was opened, unless `identity` has just done so.

    Raises
    ------
    As open_experiment.
    """
    return _opened(address, storage_options, look=False)


@dataclass
class _Kept:
    key: str
    shared: Shared
    is_fresh: bool


_LOCK = threading.Lock()
_LAST: list[_Kept] = []
"""The last one that was opened, what with, and whether its state was looked at since it was used."""


def _opened(address: SomaAddress, options: Mapping[str, Any] | None, *, look: bool) -> Shared:
    experiment = (address.uri, address.measurement, address.layer)
    key = json.dumps([experiment, address.region, address.anonymous, options], default=str)
    with _LOCK:
        for kept in _LAST:
            if kept.key == key:
                known = kept.is_fresh and not look
                if known or _state(kept.shared.experiment, address, options) == kept.shared.state:
                    kept.is_fresh = look
                    return kept.shared
        # Whoever still reads the one before goes on; it is closed with its last reader.
        _LAST.clear()
        opened = Experiment(address, options)
        made = Shared(opened, _state(opened, address, options))
        _LAST[:] = [_Kept(key, made, is_fresh=look)]
        return made


def _state(experiment: Experiment, address: SomaAddress, options: Mapping[str, Any] | None) -> str:
    names = hashlib.sha256()
    for uri in experiment.arrays:
        storage = Storage(uri, listing_options(uri, options, address.region, address.anonymous))
        for name in _written(storage):
            names.update(f"{name}\n".encode())
    return names.hexdigest()


def _written(storage: Storage) -> Iterator[str]:
    for folder in _WRITTEN:
        with contextlib.suppress(MissingDataError):  # each array has some of them
            folders, files = storage.folder(folder)
            yield from (f"{folder}/{name}" for name in sorted([*folders, *files]))

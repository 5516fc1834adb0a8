"""What a peer is, and how each is measured: the same few functions, in a process of its own.

    python -m peers.NAME JOB      in tools/; JOB is JSON, and so is the last line printed: what came out

Jobs: `convert` h5ad files into one of the peer's stores; `stream` batches and time them; `save` takes a
few batches, saves the loader's state and says what came next; `resume` loads it in a new process and
says what came. Only the standard library is imported here.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COUNTS, MASKED, RANKED, SETS = "counts", "masked", "ranked", "sets"

KINDS = {
    COUNTS: "all counts of cells as sparse rows",
    MASKED: "scGPT's batches: sampled to 1,200 tokens, 51 bins, masked, padded",
    RANKED: "Geneformer's batches: up to 2,048 ranked tokens, masked, padded",
    SETS: "sets of 64 cells of one perturbation beside as many controls",
}
BATCH = {COUNTS: 1024, MASKED: 64, RANKED: 64, SETS: 16}
"""Cells of a batch, or sets of cells, where there are enough."""

MAX_LENGTH, MAX_RANKED, SET_SIZE = 1200, 2048, 64
LINE, DRUG, CONTROL = "line", "drug", "d00"
"""The labels of the data set: a file is a cell line, sorted by perturbation, one of them the control."""

HEAD = 4
"""Batches of which tokens are counted, for which the clock stops."""

END_S = 10
"""Seconds that a process may take to end when all is said."""

BEFORE, AFTER = 5, 5
"""Batches before a state is saved, and after it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a loader is asked for.

    Attributes
    ----------
    kind
        One of KINDS.
    stores
        {name: a folder, or an address in an object store}: what `convert` wrote.
    files
        The h5ad files, for those who read them as they are.
    scratch
        An empty folder for caches.
    batch
        Cells of a batch, or sets.
    threads
        Threads or worker processes.
    seconds
        How long to stream at most.
    cells
        Cells of the data set.
    is_once
        Whether to stop after one epoch, so that caches stay cold.
    cores
        Cores to stay on, 0 for all.
    """

    kind: str
    stores: dict[str, str]
    files: list[str]
    scratch: str
    batch: int
    threads: int = 2
    seconds: float = 5.0
    cells: int = 0
    is_once: bool = False
    cores: int = 0

    @property
    def is_remote(self) -> bool:
        return any("://" in place for place in self.stores.values())


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A loader to be measured.

    Attributes
    ----------
    title
        Its name.
    packages
        Distributions whose versions are told; the first is the peer's own.
    requires
        What pip installs into its environment; () for scshards, which has one.
    stores
        {kind of work: the stores that it reads}. A store is a folder that `convert` writes; none for
        those who read h5ad files as they are.
    convert
        (files, folder of stores, name of the store, threads): writes the store.
    imports
        Modules that are imported before the clock starts.
    loader
        What gives batches: each iteration of it is an epoch.
    endless
        Whether an iteration never ends; an epoch is then as many cells as there are.
    cells, tokens
        Of a batch: its cells; its values or tokens without padding.
    ways
        {kind: how it is set up}, for the reader.
    better
        What it does better than scshards, and why, for the reader.
    python
        The Python that it needs, as "3.12", where it needs a newer one.
    remote
        Kinds of work that it is measured at from S3.
    next_epoch
        (loader, number): what it wants to be told before another epoch.
    save, load
        The loader's state, which can be pickled, and how a new one takes it; none where it has no state.
    """

    title: str
    packages: tuple[str, ...]
    requires: tuple[str, ...]
    stores: dict[str, tuple[str, ...]]
    imports: tuple[str, ...]
    loader: Callable[[Work], Iterable[Any]]
    cells: Callable[[Any], int]
    tokens: Callable[[Any], int]
    ways: dict[str, str]
    better: str
    convert: Callable[[list[Path], Path, str, int], None] | None = None
    python: str = ""
    endless: bool = False
    remote: tuple[str, ...] = ()
    next_epoch: Callable[[Any, int], None] | None = None
    save: Callable[[Any], Any] | None = None
    load: Callable[[Any, Any], None] | None = None


def serve(peer: Peer) -> None:
    """Do the job that the command line names."""
    job = json.loads(sys.argv[1])
    task = job.pop("task")
    versions = {name: importlib.metadata.version(name) for name in peer.packages}
    said = _JOBS[task](peer, **job)
    sys.stdout.flush()
    print(json.dumps({**said, "versions": versions, "python": sys.version.split()[0]}), flush=True)
    # Neither threads of a library nor its workers may keep the process for long.
    ending = threading.Timer(END_S, os._exit, [0])
    ending.daemon = True
    ending.start()


def convert(peer: Peer, files: list[str], folder: str, store: str, threads: int) -> dict[str, Any]:
    """How long it takes to write a store, its imports included."""
    assert peer.convert is not None
    start = time.perf_counter()
    peer.convert([Path(file) for file in files], Path(folder), store, threads)
    return {"seconds": time.perf_counter() - start}


def stream(peer: Peer, **asked: Any) -> dict[str, Any]:
    """Cells a second, epoch after epoch, and what a user waits for before.

    Whole epochs are counted, but not the first where there are more. Where the first did not come to its
    end in time, what came after the first batch is. Where only one epoch was asked for, it is that, from
    the making of the loader on.
    """
    work = Work(**asked)
    if work.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.cores])
    begin = time.perf_counter()
    for module in peer.imports:
        importlib.import_module(module)
    clock = _Clock()
    imports, start, processor = clock.now() - begin, clock.now(), _processor_seconds()
    loader = peer.loader(work)
    # The begin, and the end of each whole epoch: when, and how many cells.
    marks = [(start if work.is_once else clock.now(), 0)]
    heads: list[tuple[float, int]] = []  # the same after each of the first batches
    tokens = cells = 0
    batches = _epochs(peer, loader, work.cells)
    for batch in batches:
        now = clock.now()
        if batch is None:
            marks.append((now, cells))
            if work.is_once:
                break
        else:
            cells += peer.cells(batch)
            if len(heads) < HEAD:
                heads.append((now, cells))
                with clock.paused():
                    tokens += peer.tokens(batch)
        # A second epoch that was begun is ended: what is fetched for it at once must be counted with it.
        if now - heads[0][0] >= work.seconds and len(marks) != 2:
            break
    del batches, loader, batch
    gc.collect()  # its workers end, and are counted
    processor = _processor_seconds() - processor
    if len(marks) > 1:
        since, until = marks[1 if len(marks) > 2 else 0], marks[-1]
    else:
        since, until = marks[0] if work.is_once else heads[0], (now, cells)
    if until[1] == since[1]:
        raise RuntimeError(f"a single batch came in {until[0] - start:.0f} s")
    speed, a_cell = (until[1] - since[1]) / (until[0] - since[0]), tokens / heads[-1][1]
    return {
        "cells/s": speed,
        "tokens/s": a_cell * speed,
        "tokens a cell": a_cell,
        "imports, s": imports,
        "first batch, s": heads[0][0] - start,
        "µs of processor a cell": 1e6 * processor / cells,
        "cells": cells,
        "epochs": len(marks) - 1,
    }


def _epochs(peer: Peer, loader: Any, cells: int) -> Iterator[Any]:
    """Batches, epoch after epoch, and None at the end of each."""
    batches, number = iter(loader), 0
    while True:
        of_epoch = 0
        for batch in batches:
            of_epoch += peer.cells(batch)
            yield batch
            if peer.endless and of_epoch >= cells:
                break
        if of_epoch == 0:
            raise RuntimeError("an epoch without a batch")
        yield None
        number += 1
        if not peer.endless:
            if peer.next_epoch is not None:
                peer.next_epoch(loader, number)
            batches = iter(loader)


class _Clock:
    """Seconds without those in which it was paused."""

    def __init__(self) -> None:
        self._paused = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin


def save(peer: Peer, state: str, **asked: Any) -> dict[str, Any]:
    """Some batches, a state in the file `state`, and the digests of those that come next."""
    assert peer.save is not None
    loader = peer.loader(Work(**asked))
    batches = iter(loader)
    for _ in range(BEFORE):
        next(batches)
    Path(state).write_text(base64.b64encode(pickle.dumps(peer.save(loader))).decode())
    return {"digests": _digests(batches)}


def resume(peer: Peer, state: str, **asked: Any) -> dict[str, Any]:
    """The digests of the first batches of a new loader that was given the state."""
    assert peer.load is not None
    loader = peer.loader(Work(**asked))
    peer.load(loader, pickle.loads(base64.b64decode(Path(state).read_text())))  # noqa: S301 (our own file)
    return {"digests": _digests(iter(loader))}


def job(task: str, work: Work | None = None, **more: Any) -> str:
    """A job as the command line takes it."""
    return json.dumps({"task": task, **(asdict(work) if work else {}), **more})


def digest(batch: Any) -> str:
    """A hash of all numbers of a batch, whatever it is made of."""
    found = hashlib.sha256()
    for name, array in sorted(_arrays("", batch), key=lambda pair: pair[0]):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _processor_seconds() -> float:
    """Processor time of this process and of all it started that have ended."""
    return sum(os.times()[:4])


def _digests(batches: Iterator[Any]) -> list[str]:
    return [digest(batch) for batch, _ in zip(batches, range(AFTER), strict=False)]


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    import numpy as np

    if isinstance(value, np.ndarray):
        if value.dtype != object:
            yield name, value
    elif hasattr(value, "detach"):  # a tensor
        if value.layout.__repr__() == "torch.sparse_csr":
            parts = value.crow_indices(), value.col_indices(), value.values()
            yield from _arrays(name, parts)
        else:
            yield name, value.detach().cpu().numpy()
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _arrays(f"{name}.{part.name}", getattr(value, part.name))
    elif hasattr(value, "indptr"):  # a matrix of scipy
        yield from _arrays(name, {k: getattr(value, k) for k in ("indptr", "indices", "data")})
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _arrays(f"{name}.{key}", part)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _arrays(f"{name}.{i}", part)


_JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "convert": convert,
    "stream": stream,
    "save": save,
    "resume": resume,
}

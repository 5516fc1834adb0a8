"""Checkpoints: a folder step-00000020/ with the tensors, their index.json and state.json.

    training thread   stage (a copy on the CPU) -> goes on training
    background        torch.distributed.checkpoint: every rank writes its share -> publish -> prune

All randomness is keyed (masks and samples by cell, dropout by step), so tensors and state are
everything, for any number of ranks. A checkpoint is complete or invisible: on a disk it is written
under a hidden name and renamed, in an object store index.json comes last. Called by the loop.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from scshards._version import __version__
from scshards.base.errors import CheckpointError, OutputExistsError, ScshardsError, StorageError
from scshards.base.files import sync
from scshards.base.records import Count, Form, to_tree
from scshards.base.storage import Storage
from scshards.base.text import first_and_rest
from scshards.model.weights import not_finite
from scshards.ranks.ranks import Ranks
from scshards.ranks.watch import NO_END, is_lost
from scshards.training.config import recorded_tables
from scshards.training.parallel import local
from scshards.training.save.recorded import WRITER, read_record
from scshards.training.save.store import FORMAT, INDEX, MEND, TensorReader, TensorWriter
from scshards.training.settings import LOSS

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class TrainState:
    """Where a run is: everything but the tensors.

    Attributes
    ----------
    step
        Steps taken, those that were skipped included.
    best_step, best
        The step of the best evaluation so far, None before the first, and its figures: all that a best
        model can be chosen by.
    evaluated_step
        The last step that was evaluated.
    skipped, skipped_in_a_row
        Steps left out because loss or gradient were not finite: all of them, and the latest.
    seconds
        Time spent training, over all its starts.
    loader
        The training loader's state.
    config
        The run's config, as tables, with settings that only another version knows.
    others
        What another version keeps there besides; it is written again as it is.
    """

    step: Count = 0
    best_step: Count | None = None
    best: dict[str, float] = field(default_factory=dict)
    evaluated_step: Count = 0
    skipped: Count = 0
    skipped_in_a_row: Count = 0
    seconds: float = 0.0
    loader: dict[str, Any] = field(default_factory=dict)
    config: Annotated[dict[str, Any], Form(read=recorded_tables)] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict, init=False)


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run. Every rank makes one and calls the same methods in the same order.

    A context manager: a save that is in flight is finished before it is left.

    Parameters
    ----------
    root
        Their folder, on a disk that all ranks share, or a URL; a Storage where it has options.
    keep_last, keep_every
        After each save go all but the last so many and those of steps that are multiples of
        `keep_every`.
    held
        Raises when another run has taken the place over, before a checkpoint is published there.
    """

    def __init__(
        self,
        root: str | Path | Storage,
        ranks: Ranks,
        *,
        keep_last: int,
        keep_every: int | None = None,
        held: Callable[[], None] | None = None,
    ) -> None:
        self._storage, self._ranks, self._held = _storage(root), ranks, held
        self._keep_last, self._keep_every = keep_last, keep_every
        # Its own group: what a save says in the background must not mix with what training says.
        self._group = (
            dist.new_group(backend="gloo", timeout=NO_END) if ranks.world_size > 1 else None
        )
        self._in_flight: Future[Any] | None = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
            return
        try:
            self.wait()
        except (ScshardsError, RuntimeError) as e:
            # What ended the run is the news; this is said beside it, unless it is that a rank is gone.
            if not is_lost(e):
                print(f"the checkpoint in flight failed too: {e}", file=sys.stderr)

    def latest(self) -> str | None:
        """The name of the newest complete checkpoint, the same on every rank."""
        names = complete(self._storage) if self._ranks.is_main else []
        return next(iter(self._ranks.gather(names)[0][-1:]), None)

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> TrainState:
        """The state of a checkpoint, its tensors copied into `tensors`, sharded or not.

        Raises
        ------
        CheckpointError
            For files that are damaged, of another format, or of another model, and for tensors that are
        not finite.
        """
        folder = Storage(f"{self._storage.url.rstrip('/')}/{name}", self._storage.options)
        state = read_state(folder)
        if state.step != step_of(name):
            raise CheckpointError(
                f"state.json is of step {state.step}: the folder is not what it is called",
                where=folder.at(STATE),
                advice=MEND,
            )
        reader = TensorReader(folder)
        _check_fit(reader.read_metadata().state_dict_metadata, tensors, folder.at(""))
        self._run(
            lambda: dcp.load(  # type: ignore[attr-defined]
                dict(tensors),
                storage_reader=reader,
                process_group=self._group,
                no_dist=self._group is None,
            ),
            folder.at(""),
            is_written=False,
        )
        self._check_finite(
            tensors,
            "the checkpoint holds NaN or infinity",
            where=folder.at(""),
            advice=MEND,
        )
        return state

    def save(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write the checkpoint of `state.step`, after the one before has been finished.

        `tensors` may change as soon as this returns. A step that is there already gets the new state.

        Raises
        ------
        CheckpointError
            For tensors that are not finite: they would take the place of those to go on from.
        """
        self.wait()
        name = f"step-{state.step:08d}"
        about = {"format": FORMAT, WRITER: __version__, **to_tree(state), **state.others}
        text = json.dumps(about, indent=2).encode()
        there = self._ranks.is_main and name in complete(self._storage)
        if self._ranks.any(there):  # the tensors of a step are what they are
            if self._ranks.is_main:
                self._storage.write(f"{name}/{STATE}", text)
            return
        self._check_finite(
            tensors,
            f"after step {state.step} there is NaN or infinity, and no checkpoint was written",
            where=self._storage.at(name),
            advice="lower optim.lr, or use run.precision=fp32; the same command goes on from the "
            "checkpoint before",
        )
        writer = TensorWriter(
            self._storage,
            _hidden(name) if self._storage.is_local else name,
            begin=self.clear,
            publish=lambda index: self._publish(name, index, text),
        )
        self._in_flight = self._run(
            lambda: dcp.async_save(  # type: ignore[attr-defined]
                dict(tensors),
                storage_writer=writer,
                process_group=self._group,
                no_dist=self._group is None,
            ),
            self._storage.at(name),
        )

    def wait(self) -> None:
        """Finish the save that is in flight, if there is one; StorageError when it failed."""
        if self._in_flight is not None:
            future, self._in_flight = self._in_flight, None
            self._run(future.result, self._storage.at(""))

    # On one rank.

    def clear(self) -> None:
        """Remove what saves that were killed have left, of this step or another."""
        root = self._storage.local_path
        if root is not None:
            if not root.is_dir():
                return
            left = [p.name for p in root.glob(_hidden("step-*"))]
            self._storage.remove_temporaries()
        else:
            folders = [n for n in self._storage.folder()[0] if _NAME.fullmatch(n)]
            left = sorted(set(folders) - set(complete(self._storage)))
        for name in left:
            self._storage.remove_tree(name)

    def _publish(self, name: str, index: bytes, state: bytes) -> None:
        """Make a checkpoint visible, whole; remove what it takes the place of."""
        root = self._storage.local_path
        folder = name if root is None else _hidden(name)
        if self._held is not None:
            self._held()
        self._storage.write(f"{folder}/{STATE}", state)
        self._storage.write(f"{folder}/{INDEX}", index)
        if root is not None:
            sync(root / folder)
            (root / folder).rename(root / name)
            sync(root)
        for old in complete(self._storage)[: -self._keep_last]:
            if self._keep_every is None or step_of(old) % self._keep_every:
                self._remove(old)

    def _remove(self, name: str) -> None:
        root = self._storage.local_path
        if root is not None:  # out of sight first: half a checkpoint must not look like one
            (root / name).rename(root / _hidden(name))
            name = _hidden(name)
        else:
            self._storage.remove(f"{name}/{INDEX}")
        self._storage.remove_tree(name)

    def _check_finite(
        self, tensors: Mapping[str, Tensor], what: str, *, where: str, advice: str
    ) -> None:
        """CheckpointError on every rank when a tensor of any of them is not finite."""
        mine = not_finite((n, local(t)) for n, t in tensors.items())
        names = sorted({name for some in self._ranks.gather(mine[:3]) for name in some})
        if names:
            more = ", ..." if len(names) > 3 or len(mine) > 3 else ""
            raise CheckpointError(
                f"{what}: {', '.join(names[:3])}{more}", where=where, advice=advice
            )

    def _run(self, function: Any, where: str, *, is_written: bool = True) -> Any:
        if self._group is None:  # torch warns that there is no group; it has been told
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            return function()
        except CheckpointException as e:
            cause = _cause(e)
            if isinstance(cause, OutputExistsError):
                raise cause from e
            if is_written and isinstance(cause, OSError):
                what = getattr(cause, "what", None) or cause.strerror or type(cause).__name__
                raise StorageError(
                    f"the checkpoint can't be written: {what}",
                    where=where,
                    advice=f"{getattr(cause, 'advice', None) or 'free some space'}; the same command "
                    "goes on from the checkpoint before",
                ) from None
            raise cause from e


def complete(root: str | Path | Storage) -> list[str]:
    """The names of all complete checkpoints below `root`, oldest first."""
    storage = _storage(root)
    if storage.local_path is not None and not storage.local_path.is_dir():
        return []
    folders, _ = storage.folder()
    names = sorted((n for n in folders if _NAME.fullmatch(n)), key=step_of)
    return names if storage.is_local else [n for n in names if storage.exists(f"{n}/{INDEX}")]


def step_of(name: str) -> int:
    """The step of a checkpoint, by its name."""
    return int(name.removeprefix("step-"))


def read_state(folder: str | Storage) -> TrainState:
    """What the state.json of a checkpoint's folder says; CheckpointError when it is damaged."""
    folder = _storage(folder)
    state, others = read_record(
        TrainState,
        folder.read(STATE),
        needed=("step", "loader", "config"),
        older=_as_figures,
        layout=FORMAT,
        at=folder.at(STATE),
        error=CheckpointError,
        mend=MEND,
    )
    state.others = others
    return state


def _storage(root: str | Path | Storage) -> Storage:
    return root if isinstance(root, Storage) else Storage(root)


def _as_figures(tree: dict[str, Any]) -> None:
    """What was `best_loss` is one of the figures `best`."""
    loss = tree.pop("best_loss", None)
    if loss is not None and not tree.get("best"):
        tree["best"] = {LOSS: loss}


def _cause(error: CheckpointException) -> BaseException:
    """What torch wraps: of several ranks' errors one of ours, where there is one."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((c for c in causes if isinstance(c, ScshardsError)), causes[0])


def _hidden(name: str) -> str:
    return f".{name}.partial"


def _check_fit(found: Mapping[str, Any], wanted: Mapping[str, Tensor], where: str) -> None:
    def is_idle(name: str) -> bool:
        # Of what is not trained here: a branch may freeze it, and earlier versions kept zeros of it.
        kind, _, parameter = name.partition("/")
        if kind == "optimizer":
            parameter = parameter.rpartition("/")[0]
        return kind in ("optimizer", "average") and f"model/{parameter}" in wanted

    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is of no use" for name in found if name not in wanted and not is_idle(name)]
    wrong += [
        f"{name} is {list(found[name].size)} instead of {list(t.shape)}"
        for name, t in wanted.items()
        if name in found and found[name].size != t.shape
    ]
    if wrong:
        raise CheckpointError(
            f"the checkpoint is of another model: {first_and_rest(wrong, 3)}",
            where=where,
            advice=f"train with the config that it was written with; if it is damaged, {MEND}",
        )

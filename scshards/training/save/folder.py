"""The folder of a run: what lies in it, and whether this command may go on with it.

    RUN/config.json        the resolved config, the shard set's address, versions
    RUN/checkpoints/       step-00000020/ ..., each complete or invisible; or at run.checkpoints
    RUN/metrics.jsonl      one line per log step and evaluation
    RUN/best_model.pt      with args.json and vocab.json: the best model so far, in scGPT's layout
    RUN/evaluation.json    written by `scshards evaluate`
    RUN/profile/           with run.profile: what those steps took
    RUN/STOPPED            a signal ended the run before its last step; not there while it runs
    RUN/lock               one process trains here; not there when it has ended in order

The same command on the same folder resumes; another config is refused with what differs. Called by
the loop, evaluate and plot.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from scshards._version import __version__
from scshards.base.errors import CheckpointError, ConfigError, OutputExistsError, StorageError
from scshards.base.files import TEMPORARY
from scshards.base.locks import LOCK, Lease, locked
from scshards.base.records import Damaged, Form, read_json, shown
from scshards.base.remote import advised, translated
from scshards.base.storage import Storage, is_local, redact
from scshards.training.config import (
    MAY_CHANGE,
    TrainConfig,
    differences,
    recorded,
    recorded_tables,
    unknown_names,
    with_unknown,
)
from scshards.training.save.recorded import WRITER, read_record

CONFIG, EVALUATION = "config.json", "evaluation.json"


@dataclass(frozen=True)
class _About:
    """What CONFIG says, but for who wrote it."""

    config: Annotated[dict[str, Any], Form(read=recorded_tables)]
    root: str = ""


class RunFolder:
    """Paths and JSON of one run's folder, which must be on a local (or mounted) disk."""

    def __init__(self, path: str | Path) -> None:
        if not is_local(str(path)):
            raise ConfigError(
                "a run's folder must be a local path",
                where=redact(str(path)),
                advice="train into a local folder and copy it; shards may be anywhere",
            )
        self.path = Path(path)
        self.stopped = self.path / "STOPPED"
        self.metrics = self.path / "metrics.jsonl"

    def check(self, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """What `config` changes in the run that is here, of what may change; {} for a new run.

        Raises
        ------
        ConfigError
            When the run here has another config.
        OutputExistsError
            When the folder holds something that is no run.
        """
        if not (self.path / CONFIG).exists():
            is_folder = self.path.is_dir()
            # The lock is of a process that was killed before it began.
            holds = is_folder and any(p.name != LOCK for p in self.path.iterdir())
            if holds or (self.path.exists() and not is_folder):
                raise OutputExistsError(
                    "the output exists and is not a run",
                    where=self.path,
                    advice="give a new folder with -o",
                )
            return {}
        return self.refuse_other(self._about()[0].config, config, self.path)

    @staticmethod
    def refuse_other(
        old: dict[str, Any], config: TrainConfig, where: object
    ) -> dict[str, tuple[Any, Any]]:
        """What `config` changes of the tables `old`; ConfigError for what may not change."""
        changed = differences(recorded(old).tables(), config.tables())
        fixed = {k: v for k, v in changed.items() if k not in MAY_CHANGE}
        if fixed:
            listed = ", ".join(
                f"{k} is {old!r} there, {new!r} now" for k, (old, new) in fixed.items()
            )
            raise ConfigError(
                f"this run was started with another config: {listed}",
                where=where,
                advice="give the same settings to resume it, or a new folder with -o",
            )
        return changed

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Nobody else trains here meanwhile; it ends with the process, however that ends.

        Raises
        ------
        OutputExistsError
            When another process does; it is said which.
        StorageError
            When the folder can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            what = f"the folder can't be made: {e.strerror}"
            raise StorageError(what, where=self.path, advice=advised(e)) from None
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / LOCK, needed=False, at=self.path))
            except OutputExistsError as e:
                raise OutputExistsError(
                    e.what,
                    where=self.path,
                    advice="wait until it has ended, or end it; another run needs a folder of its own "
                    "(-o). The ranks of one run are started by torchrun, not by srun or mpirun alone: "
                    "torchrun --nproc-per-node N -m scshards train ...",
                ) from None
            for left in self.path.glob(f".*{TEMPORARY}"):  # of a run that was killed
                if not left.name.startswith(f".{EVALUATION}."):  # that is written without this lock
                    left.unlink(missing_ok=True)
            try:
                yield
            finally:
                (self.path / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it was not trained at all: nothing is left
                    self.path.rmdir()

    @contextlib.contextmanager
    def lock_place(
        self, config: TrainConfig, storage_options: Mapping[str, Any] | None = None
    ) -> Iterator[Callable[[], None] | None]:
        """No other run keeps its checkpoints at `run.checkpoints` meanwhile, where that is given.

        Yields
        ------
        What raises when another has taken the place over; None where that can't be.

        Raises
        ------
        OutputExistsError
            When another run keeps them there.
        """
        place, storage = config.run.checkpoints, self.place(config, storage_options)
        if place is None:
            yield None
            return
        advice = "give each run a place of its own with run.checkpoints"
        with contextlib.ExitStack() as stack:
            try:
                if (root := storage.local_path) is None:
                    lease = stack.enter_context(Lease(storage, LOCK))
                else:
                    with translated(storage.at("")):
                        root.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(root / LOCK, needed=False, at=place))
                    stack.callback((root / LOCK).unlink, missing_ok=True)
            except OutputExistsError as e:
                raise OutputExistsError(e.what, where=redact(place), advice=advice) from None
            yield None if root is not None else lease.check

    def claim(self, tables: dict[str, Any], root: str) -> None:
        """Write the config, and that the run is not stopped; called by one rank, after `check`.

        What another version wrote there, and this one does not know, stays.
        """
        others: dict[str, Any] = {}
        if (self.path / CONFIG).exists():
            old, others = self._about()
            tables = with_unknown(tables, old.config)
        self.stopped.unlink(missing_ok=True)
        about = {WRITER: __version__, "root": redact(root), "config": tables}
        self.write(CONFIG, about | others)

    def unknown(self, others: Iterable[str] = ()) -> list[str]:
        """One line that names what another version wrote in CONFIG, and `others`; or none."""
        about, more = self._about()
        names = sorted({f"config.{n}" for n in unknown_names(about.config)} | {*more, *others})
        if not names:
            return []
        said = f"scshards {__version__} does not know what another version wrote of this run"
        return [f"{said}, leaves it aside and keeps it: {', '.join(names)}"]

    def place(
        self, config: TrainConfig, storage_options: Mapping[str, Any] | None = None
    ) -> Storage:
        """Where the checkpoints of a run of that config are, on a disk or in a store."""
        return Storage(config.run.checkpoints or self.path / "checkpoints", storage_options)

    def config(self) -> TrainConfig:
        """The config that the run was started with; ConfigError when this is no run."""
        if not (self.path / CONFIG).exists():
            raise ConfigError(
                "no config.json here: this is not the folder of a run",
                where=self.path,
                advice="give the folder that `scshards train -o` wrote",
            )
        return recorded(self._about()[0].config)

    def root(self) -> str:
        """The address of the shard set that it was started with; "" where that is not known."""
        return self._about()[0].root

    def evaluation(self) -> dict[str, Any]:
        """What `scshards evaluate` found, {} where it was not called; CheckpointError for no table."""
        storage = Storage(self.path)
        if (data := storage.read_if_there(EVALUATION)) is None:
            return {}
        try:
            found = read_json(data)
            if not isinstance(found, dict):
                raise Damaged(f"a table is needed, not {shown(found)}")
        except Damaged as e:
            where = storage.at(EVALUATION)
            raise CheckpointError(f"the file can't be read: {e}", where=where) from None
        return found

    def _about(self) -> tuple[_About, dict[str, Any]]:
        """What CONFIG says, and what another version put there besides."""
        storage = Storage(self.path)
        return read_record(
            _About,
            storage.read(CONFIG),
            needed=("config",),
            at=storage.at(CONFIG),
            error=ConfigError,
            mend='put a copy back, or {"config": ...} with `config` from the latest state.json',
        )

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Publish a JSON file: all of it or nothing."""
        Storage(self.path).write(name, json.dumps(value, indent=2).encode())

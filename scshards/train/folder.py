"""The folder of a run: what lies in it, and whether this command may go on with it.

    RUN/config.json        the resolved config, the shard set's address, versions
    RUN/checkpoints/       step-00000020/ ..., each complete or invisible; or at run.checkpoints
    RUN/metrics.jsonl      one line per log step and evaluation
    RUN/best_model.pt      with args.json and vocab.json: the best model so far, in scGPT's layout
    RUN/evaluation.json    written by `scshards evaluate`
    RUN/STOPPED            a signal ended the run before its last step; not there while it runs

The same command on the same folder resumes; another config is refused with what differs. Called by
the loop, evaluate and plot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scshards._version import __version__
from scshards.base.config import build
from scshards.base.errors import CheckpointError, ConfigError, OutputExistsError
from scshards.base.records import read_json
from scshards.base.storage import Storage, is_local, redact
from scshards.train.config import MAY_CHANGE, TrainConfig, differences


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
        self.checkpoints = self.path / "checkpoints"
        self.stopped = self.path / "STOPPED"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.json"

    def check(self, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """What `config` changes in the run that is here, of what may change; {} for a new run.

        Raises
        ------
        ConfigError
            When the run here has another config.
        OutputExistsError
            When the folder holds something that is no run.
        """
        if not (self.path / "config.json").exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise OutputExistsError(
                    "the output exists and is not a run",
                    where=self.path,
                    advice="give a new folder with -o",
                )
            return {}
        return self.refuse_other(self.read("config.json")["config"], config, self.path)

    @staticmethod
    def refuse_other(
        old: dict[str, Any], config: TrainConfig, where: object
    ) -> dict[str, tuple[Any, Any]]:
        """What `config` changes of the tables `old`; ConfigError for what may not change."""
        # An older version's lacks keys, which were as they are by default.
        old = build(TrainConfig, old, str(where)).tables()
        changed = differences(old, config.tables())
        fixed = {k: v for k, v in changed.items() if k not in MAY_CHANGE}
        if fixed:
            shown = ", ".join(
                f"{k} is {old!r} there, {new!r} now" for k, (old, new) in fixed.items()
            )
            raise ConfigError(
                f"this run was started with another config: {shown}",
                where=where,
                advice="give the same settings to resume it, or a new folder with -o",
            )
        return changed

    def claim(self, config: TrainConfig, root: str) -> None:
        """Write the config, and that the run is not stopped; called by one rank, after `check`."""
        self.stopped.unlink(missing_ok=True)
        about = {"scshards": __version__, "root": redact(root), "config": config.tables()}
        self.write("config.json", about)

    def config(self) -> TrainConfig:
        """The config that the run was started with; ConfigError when this is no run."""
        if not (self.path / "config.json").exists():
            raise ConfigError(
                "no config.json here: this is not the folder of a run",
                where=self.path,
                advice="give the folder that `scshards train -o` wrote",
            )
        return build(TrainConfig, self.read("config.json")["config"], str(self.path))

    def read(self, name: str) -> dict[str, Any]:
        try:
            out: dict[str, Any] = read_json((self.path / name).read_text())
        except ValueError:
            raise CheckpointError("not valid JSON", where=self.path / name) from None
        return out

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Publish a JSON file: all of it or nothing."""
        Storage(self.path).write(name, json.dumps(value, indent=2).encode())

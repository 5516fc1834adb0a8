"""What a training run is made of: data, model, optimizer, run; from TOML and `key=value`.

    [task]  what is trained for         [data]  what a batch looks like
    [model] the encoder's shape         [optim] optimizer and schedule
    [run]   how long, how big a batch, what to save and show
    [evaluate] what it is scored on, and which model is the best

[task] is in tasks.settings, [model] in model.config, the last three in training.settings. The
resolved config goes into RUN/config.json.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from scshards.base.config import build, check, override, read_toml
from scshards.base.errors import ConfigError
from scshards.base.records import Damaged, Form, from_tree, shown, to_tree
from scshards.base.storage import redact
from scshards.base.text import did_you_mean
from scshards.model.config import ModelSettings
from scshards.model.scgpt import tables_of
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.options import FIELDS, PARTS, by_part
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.read.options import ReadOptions
from scshards.tasks.settings import TaskSettings
from scshards.training.settings import EvaluateSettings, OptimSettings, RunSettings

SHIPPED = Path(__file__).with_name("configs")
"""The folder of the configs that come with scshards, each to be named without its folder and ending."""

MAY_CHANGE = frozenset(
    {
        "data.threads",
        "data.prefetch",
        "data.pin_memory",
        "data.on_small_domain",
        "data.retries",
        "data.timeout",
        "data.cache_dir",
        "data.cache_size",
        "data.on_bad_shard",
        "data.max_bad_cells",
        "run.steps",
        "run.epochs",
        "run.micro_batch",
        "run.eval_every",
        "run.save_every",
        "run.keep_last",
        "run.keep_every",
        "run.log_every",
        "run.device",
        "run.trackers",
        "run.peak_tflops",
        "run.profile",
        "run.parallel",
        "run.shard_ranks",
        "run.compile",
        "run.activation_checkpointing",
        "optim.max_skipped",
        "evaluate.sets",
        "evaluate.probe",
        "evaluate.probe_cells",
        "evaluate.best_by",
    }
)
"""Keys that a resumed run may set anew: none of them changes which batch a step sees, if all is well."""


_NO_TASK = "no task of `scshards train` has {}: a loop of your own gets them, from {}"
_BY_OBJECTIVE = "CellLoader(collate=CollateOptions(objective={!r}))"
_NO_ARRAYS = _NO_TASK.format(
    "a use for arrays beside the genes", "CellLoader(collate=CollateOptions(arrays=...))"
)
_NO_SETS = _NO_TASK.format("sets of cells", "CellLoader(sets=...)")
_NO_OBJECTIVE = {
    "counts": _NO_TASK.format("rows of counts", _BY_OBJECTIVE.format("counts")),
    "ranks": _NO_TASK.format("ranked genes", _BY_OBJECTIVE.format("ranks")),
    "own": _NO_TASK.format("tokens of a function", _BY_OBJECTIVE.format("own")),
}
"""{objective of a loader that no task has: what to do instead}."""

_ELSEWHERE = {
    "objective": "task.objective says what is hidden",
    "storage_options": "give --storage-options; credentials are in no config",
    "device_collate": "a step takes whole batches: leave it out",
    "arrays": _NO_ARRAYS,
    "genes": _NO_OBJECTIVE["counts"],
    **dict.fromkeys(("medians", "add_cls", "add_eos"), _NO_OBJECTIVE["ranks"]),
    "tokenize": _NO_OBJECTIVE["own"],
}
"""{field of a loader's options: why it is no key of [data]}."""

_SETS = dict.fromkeys(("sets", *(n for n, (part, _) in FIELDS.items() if part == "sets")), _NO_SETS)
"""The same of the fields of sets."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which cells are trained on, what a batch is made of, and how shards are read.

    In a config, [data] has the fields of all three classes side by side: `data.where`,
    `data.max_length`, `data.lanes`, ... Evaluations see all cells, whatever `choose` says.
    """

    choose: ChoiceOptions = field(default_factory=ChoiceOptions)
    collate: CollateOptions = field(default_factory=CollateOptions)
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        c = self.collate
        check(
            all(ratio > 0 for ratio in c.ratios),
            "data.mask_ratio",
            "must lie between 0 and 1, e.g. 0.4",
        )
        check(c.n_bins == 0 or c.n_bins >= 3, "data.n_bins", "must be 0 or at least 3")

    @classmethod
    def of(cls, table: Any) -> DataSettings:
        """Those of the table [data]; Damaged or ConfigError for what it can't be."""
        if not isinstance(table, Mapping):
            raise Damaged(f"a table is needed, not {shown(table)}")
        tables, others = by_part(table)
        tables.pop("sets", None)
        known = FIELDS.keys() - _ELSEWHERE.keys() - _SETS.keys()
        for name in (*others, *(n for n in _SETS | _ELSEWHERE if n in table)):
            why = (_SETS | _ELSEWHERE).get(name) or did_you_mean(name, known)
            raise Damaged(f"unknown key {name!r:.60}", advice=why)
        try:
            parts: dict[str, Any] = {
                part: from_tree(PARTS[part], of) for part, of in tables.items()
            }
            return cls(**parts)
        except ConfigError as e:
            at = None if e.where is None else f"data.{e.where.removeprefix('data.')}"
            raise ConfigError(e.what, where=at, advice=e.advice) from None

    def table(self) -> dict[str, Any]:
        """The table [data]: all that `of` takes."""
        tables: dict[str, Any] = {}
        for options in (self.choose, self.collate, self.read):
            tables |= to_tree(options)
        return {name: value for name, value in tables.items() if name not in _ELSEWHERE}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run is told, apart from where the shards are and where to write."""

    task: TaskSettings = field(default_factory=TaskSettings)
    data: Annotated[DataSettings, Form(DataSettings.of, DataSettings.table)] = field(
        default_factory=DataSettings
    )
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)

    def __post_init__(self) -> None:
        d = self.collate
        if d.tokens_per_batch is not None:
            check(
                self.run.micro_batch is None,
                "data.tokens_per_batch",
                "packed batches are not cut: leave run.micro_batch out",
            )
        check(
            not self.optim.lora_rank or self.task.start is not None,
            "optim.lora_rank",
            "adapters stand beside weights that were trained before: give task.start",
        )
        by = self.data.choose.domain_by
        if self.task.name == "integrate" and self.task.domain_norm:
            check(
                by in (None, self.task.domain),
                "data.domain_by",
                f"batches are of one domain of task.domain={self.task.domain!r} each: leave it out",
            )
        if self.model.value_style == "category":
            check(
                d.has_bins and (d.pad_value, d.mask_value) == (d.n_bins, d.n_bins + 1),
                "model.value_style",
                f"category wants bins, data.pad_value={d.n_bins} and data.mask_value={d.n_bins + 1}: "
                "every value is a row of a table",
            )
            return
        check(
            d.pad_value < 0 and d.mask_value < 0 and d.pad_value != d.mask_value,
            "data.mask_value",
            "pad_value and mask_value must be negative and differ, so that no count equals them",
        )

    @property
    def collate(self) -> CollateOptions:
        """What a batch is made of, with what the task hides."""
        task, given = self.task, self.data.collate
        try:
            if not task.masks:
                return replace(given, objective="none", mask_ratio=None)
            return replace(given, objective=task.objective)
        except ConfigError as e:
            hides = f"task.objective={task.objective!r}" if task.masks else f"the task {task.name}"
            raise ConfigError(
                f"data.{e.where} does not go with {hides}: {e.what}",
                where=f"data.{e.where}",
                advice=e.advice,
            ) from None

    @classmethod
    def read(
        cls,
        file: str | Path | None = None,
        settings: Iterable[str] = (),
        *,
        base: Mapping[str, Any] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> TrainConfig:
        """The config of a TOML file (or the defaults) with `a.b=value` settings on top.

        `file` may be the name of a config that comes with scshards. What is not stated is as in the
        tables `base`; without these, with `task.start`, sizes and values are those of that checkpoint,
        which `storage_options` lead to.
        """
        tables = override(read_toml(_file(file)) if file is not None else {}, settings)
        _check_addresses(tables)
        task = tables.get("task")
        _check_tasks(tables, task)
        if base is None:
            start = task.get("start") if isinstance(task, dict) else None
            base = tables_of(start, storage_options) if isinstance(start, str) else {}
        length = {"steps", "epochs"}  # who states one of them does not want the other
        for name, old in base.items():
            if isinstance(stated := tables.get(name, {}), dict):
                instead = length if name == "run" and length & stated.keys() else set()
                tables[name] = {k: v for k, v in old.items() if k not in instead} | stated
        return build(cls, tables)

    def tables(self) -> dict[str, Any]:
        """The resolved config as plain nested dicts, ready for JSON."""
        return to_tree(self)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.run.steps or (self.run.epochs or 1) * steps_per_epoch

    def rank_batch(self, world_size: int) -> tuple[int, int]:
        """Cells per rank and step, and cells per rank and forward pass.

        Raises
        ------
        ConfigError
            When the batch can't be cut into equal micro-batches; says which numbers fit.
        """
        batch, micro = self.run.batch_size, self.run.micro_batch
        unit = (micro or 1) * world_size
        if batch % unit == 0:
            return batch // world_size, micro or batch // world_size
        below, above = batch - batch % unit, batch - batch % unit + unit
        sizes = " or ".join(str(n) for n in (below, above) if n)
        advice = f"run.batch_size={sizes} fits"
        if micro and batch % world_size == 0:
            share = batch // world_size
            fits = max(d for d in range(1, min(micro, share) + 1) if share % d == 0)
            advice += f"; so does run.micro_batch={fits}"
        each = f"{micro} cells in each micro-batch on " if micro else ""
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        raise ConfigError(
            f"a batch of {batch} cells can't be dealt equally: {each}{ranks} needs a multiple "
            f"of {unit}",
            where="run.batch_size",
            advice=advice,
        )

    def check_lanes(self, world_size: int) -> None:
        """ConfigError when a new run's lanes are not the same number on each rank; says which fit."""
        lanes = self.data.read.lanes
        more = lanes % world_size
        if not more:
            return
        fit = " or ".join(str(n) for n in (lanes - more, lanes - more + world_size) if n)
        raise ConfigError(
            f"{lanes} lanes can't be dealt equally to {world_size} ranks",
            where="data.lanes",
            advice=f"data.lanes={fit} fits; many world sizes divide 240",
        )


def _check_tasks(tables: Mapping[str, Any], task: Any) -> None:
    """ConfigError for what loaders give and no task takes: to be told so, not which names are near."""
    objective = task.get("objective") if isinstance(task, Mapping) else None
    for is_asked, what, at, advice in (
        ("sets" in tables, "there is no table [sets]", "sets", _NO_SETS),
        (
            objective in (*_NO_OBJECTIVE,),
            f"no task has the objective {objective!r}",
            "task.objective",
            _NO_OBJECTIVE.get(str(objective)),
        ),
    ):
        if is_asked:
            raise ConfigError(what, where=at, advice=advice)


def _check_addresses(tables: Any, at: str = "") -> None:
    """ConfigError for an address with credentials: what a run is told is written down, many times."""
    if isinstance(tables, Mapping):
        for name, value in tables.items():
            _check_addresses(value, f"{at}.{name}" if at else str(name))
    elif isinstance(tables, str) and "://" in tables and redact(tables) != tables:
        raise ConfigError(
            "an address in a config has no credentials and no query in it",
            where=f"{at}: {redact(tables)}",
            advice="leave them to the environment: AWS_* variables, or a profile",
        )


def _file(given: str | Path) -> Path:
    """A file that is there, or that of a config which comes with scshards, by its name."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    path, name = Path(given), str(given)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    if name not in shipped:
        raise ConfigError(
            f"there is no file {name!r}, and no config of that name comes with scshards",
            where="--config",
            advice=did_you_mean(name, shipped),
        )
    return shipped[name]


def recorded(tables: Any) -> TrainConfig:
    """The config that a run wrote down, whichever version of scshards it was that did.

    A setting that its version did not have is as by default; one that this version does not have is left
    aside: `unknown_settings`.

    Raises
    ------
    Damaged
        For what it can't be, at the setting.
    """
    unknown = unknown_settings(tables)
    from_tree(dict[str, Any], unknown)
    known = {n: t for n, t in tables.items() if n in _keys()}
    for name in known.keys() & unknown.keys():
        known[name] = {k: v for k, v in known[name].items() if k in _keys()[name]}
    try:
        return from_tree(TrainConfig, known)
    except ConfigError as e:
        at = e.where or ""
        raise Damaged(e.what.removeprefix(f"{at}: "), at, advice=e.advice) from None


def recorded_tables(tables: Any) -> dict[str, Any]:
    """The tables of a config that this version can read, as they are: another one may know more."""
    recorded(tables)
    return dict(tables)


def unknown_settings(tables: Any) -> dict[str, Any]:
    """Of the tables that a run wrote down, what this version has no setting for."""
    if not isinstance(tables, Mapping):
        raise Damaged(f"a table is needed, not {shown(tables)}")
    unknown: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in _keys():
            unknown[name] = table
        elif isinstance(table, Mapping) and (more := table.keys() - _keys()[name]):
            unknown[name] = {k: table[k] for k in sorted(more)}
    return unknown


def with_unknown(tables: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The tables of a config, with those settings of `old` tables that this version does not know."""
    out = dict(tables)
    for name, value in unknown_settings(old).items():
        out[name] = {**out[name], **value} if name in _keys() else value
    return out


def unknown_names(tables: dict[str, Any]) -> list[str]:
    """What `unknown_settings` are called: `table.key`."""
    return [
        f"{name}.{key}" if key else name
        for name, value in unknown_settings(tables).items()
        for key in (value if isinstance(value, Mapping) and value else [""])
    ]


@functools.cache
def _keys() -> dict[str, frozenset[str]]:
    """{table: the settings that this version has in it}."""
    return {name: frozenset(table) for name, table in TrainConfig().tables().items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys (`table.key`) whose values differ, each with the old and the new value."""
    a, b = _flat(old), _flat(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{table}.{key}": list(value) if isinstance(value, tuple) else value
        for table, keys in tables.items()
        for key, value in keys.items()
    }

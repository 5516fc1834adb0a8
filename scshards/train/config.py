"""What a training run is made of: data, model, optimizer, run; from TOML and `key=value`.

    [task]  what is trained for         [data]  what a batch looks like
    [model] the encoder's shape         [optim] optimizer and schedule
    [run]   how long, how big a batch, what to save and show

All but [data] are in train.config_task, config_model and config_run. The resolved config goes into
RUN/config.json. Called by the loop, `evaluate` and the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scshards.base.access import Access
from scshards.base.config import build, override, read_toml
from scshards.base.errors import ConfigError
from scshards.streaming.order.strata import ChoiceOptions
from scshards.streaming.quarantine import OnBadShard
from scshards.train.config_model import ModelSettings, tables_of
from scshards.train.config_run import OptimSettings, RunSettings, check
from scshards.train.config_task import TaskSettings

MAY_CHANGE = frozenset(
    {
        "data.threads",
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
        "run.parallel",
        "run.compile",
        "optim.max_skipped",
    }
)
"""Keys that a resumed run may set anew: none of them changes which batch a step sees, if all is well."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How cells become batches; the names are those of `CellLoader`."""

    max_length: int = 1200
    """Tokens per cell, `<cls>` included; longer cells are sampled anew in every epoch."""
    mask_ratio: float | tuple[float, ...] | None = None
    """The share of values, or of genes, that the model has to predict; of several, one is drawn for
    each batch. None: 0.4 of values, 0.25, 0.5 or 0.75 of genes."""
    tokens_per_batch: int | None = None
    """Packs the cells of a rank's batch one behind another into so many tokens, without padding
    between them; None: they lie side by side. On CUDA in bf16 there is a kernel for it."""
    include_zero_genes: int = 0
    """Unexpressed genes that each cell gets, with the value 0."""
    n_bins: int = 51
    """Bins per cell (bin 0 is zero); 0 leaves the counts as they are."""
    tie_break: Literal["high", "random"] = "high"
    """Which bin equal values get: the highest, or a random one of those they span."""
    pad_value: float = -2.0
    mask_value: float = -1.0
    lanes: int = 64
    """Readers that an epoch is dealt to; world sizes that divide it see the same global batches."""
    shuffle_buffer: int = 8192
    where: str | None = None
    """Train on the cells for which it is true: "tissue == 'blood'". Evaluations see all cells."""
    take: int | None = None
    """Of these, train on so many: the same ones in every run."""
    weights: str | dict[str, Any] | None = None
    """How often a training cell comes in an epoch, as CellLoader has it: {cell_type = "balanced"}."""
    epoch_cells: int | None = None
    """Cells of an epoch, repeated ones counted each time; None: as many as are trained on."""
    threads: int = 2
    retries: int | None = None
    """How often a read over a network is tried again; None: as --retries says."""
    timeout: float | None = None
    """Seconds without an answer, or more of it, after which a request has failed; None: as --timeout."""
    cache_dir: str | None = None
    """A folder on a local disk that keeps what was read, for all ranks of a node."""
    cache_size: str | int | None = None
    """How much it may hold: bytes, or as in "200 GB"."""
    on_bad_shard: OnBadShard = "raise"
    """"quarantine" trains on without the cells of chunks that stay bad."""
    max_bad_cells: int = 10_000
    """With more of them in an epoch, on a rank, training stops."""

    def __post_init__(self) -> None:
        check(self.max_length >= 2, "data.max_length", "must be at least 2 (<cls> and one gene)")
        ratios = self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio,)
        check(
            bool(ratios) and all(r is None or 0 < r < 1 for r in ratios),
            "data.mask_ratio",
            "must lie between 0 and 1, e.g. 0.4",
        )
        check(
            0 <= self.include_zero_genes < self.max_length - 1,
            "data.include_zero_genes",
            "must be at least 0 and leave room for an expressed gene in data.max_length",
        )
        check(self.n_bins == 0 or self.n_bins >= 3, "data.n_bins", "must be 0 or at least 3")
        check(self.lanes >= 1, "data.lanes", "must be at least 1")
        check(self.shuffle_buffer >= 1, "data.shuffle_buffer", "must be at least 1")
        check(self.threads >= 1, "data.threads", "must be at least 1")
        check(self.max_bad_cells >= 0, "data.max_bad_cells", "must be at least 0")
        check(
            (self.cache_dir is None) == (self.cache_size is None),
            "data.cache_dir",
            "is given together with data.cache_size, or neither is",
        )
        Access().changed(retries=self.retries, timeout=self.timeout)  # refuses what can't be
        # Refuses what is no choice whatever the shard set holds.
        ChoiceOptions(
            where=self.where, take=self.take, weights=self.weights, epoch_cells=self.epoch_cells
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run is told, apart from where the shards are and where to write."""

    task: TaskSettings = field(default_factory=TaskSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        d = self.data
        if d.tokens_per_batch is not None:
            check(
                self.task.objective == "mask",
                "data.tokens_per_batch",
                'packs whole cells, and task.objective="generate" splits them: leave it out',
            )
            check(
                self.run.micro_batch is None,
                "data.tokens_per_batch",
                "packed batches are not cut: leave run.micro_batch out",
            )
        if self.model.value_style == "category":
            check(
                d.n_bins > 0 and (d.pad_value, d.mask_value) == (d.n_bins, d.n_bins + 1),
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

    @classmethod
    def read(cls, file: str | Path | None = None, settings: Iterable[str] = ()) -> TrainConfig:
        """The config of a TOML file (or the defaults) with `a.b=value` settings on top.

        With `task.start`, sizes and values that are not stated are those of that checkpoint.
        """
        tables = override(read_toml(file) if file is not None else {}, settings)
        task = tables.get("task")
        start = task.get("start") if isinstance(task, dict) else None
        if isinstance(start, str):
            for name, found in tables_of(start).items():
                if isinstance(stated := tables.get(name, {}), dict):
                    tables[name] = found | stated
        return build(cls, tables)

    def tables(self) -> dict[str, Any]:
        """The resolved config as plain nested dicts, ready for JSON."""
        return dataclasses.asdict(self)

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
        lanes, more = self.data.lanes, self.data.lanes % world_size
        if not more:
            return
        fit = " or ".join(str(n) for n in (lanes - more, lanes - more + world_size) if n)
        raise ConfigError(
            f"{lanes} lanes can't be dealt equally to {world_size} ranks",
            where="data.lanes",
            advice=f"data.lanes={fit} fits; many world sizes divide 240",
        )


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

"""What is trained for: the table [task] of a config.

    pretrain    masked values, or unknown genes (objective="generate")
    integrate   masked values, and cells of different domains made to look alike
    annotate    the class of a cell

training.config reads it, and tasks.make makes the task of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from scshards.base.config import check
from scshards.base.errors import ConfigError

TaskName = Literal["pretrain", "integrate", "annotate"]

_FOR: dict[str, tuple[TaskName, ...]] = {
    "objective": ("pretrain",),
    "label": ("integrate", "annotate"),
    "domain": ("integrate",),
    "mvc_weight": ("pretrain", "integrate"),
    "zero_weight": ("pretrain", "integrate"),
    "prompt_weight": ("pretrain",),
    "cell_prompt_after": ("pretrain",),
    "similarity_weight": ("integrate",),
    "similarity_threshold": ("integrate",),
    "adversary_weight": ("integrate",),
    "domain_norm": ("integrate",),
    "domain_labels": ("integrate",),
    "metric_cells": ("integrate",),
}
"""Which tasks a setting means something to; another task refuses it."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What a run trains for, from which weights, by which labels, and what each loss weighs."""

    name: TaskName = "pretrain"
    """pretrain, integrate or annotate; `--task` is short for it."""
    objective: Literal["mask", "generate"] = "mask"
    """pretrain: predict masked values, or the values of genes that are not shown at all."""
    start: str | None = None
    """A folder in scGPT's layout whose weights are trained on; sizes come from its args.json."""
    label: str | None = None
    """The label column with the classes: annotate learns them, integrate is measured by them."""
    domain: str | None = None
    """integrate: the label column with the domains that are to look alike."""
    mvc_weight: float = 1.0
    """Of predictions made from the cell embedding."""
    zero_weight: float = 1.0
    """Of the log likelihood that a value is above zero, with model.explicit_zero_prob."""
    prompt_weight: float = 1.0
    """generate: of the second pass, which is given the cell embedding."""
    cell_prompt_after: int = 1000
    """generate: steps before the second pass begins."""
    similarity_weight: float = 10.0
    """integrate: of elastic cell similarity (ECS)."""
    similarity_threshold: float = 0.8
    """integrate: the cosine that ECS draws pairs of cells towards or away from."""
    adversary_weight: float = 1.0
    """integrate: of telling domains apart, with its gradient reversed; 0: no such head."""
    domain_norm: bool = True
    """integrate: a batch norm for each domain, and batches of one domain each."""
    domain_labels: bool = True
    """integrate: tell decoders the domain, so that the cell embedding need not know it."""
    metric_cells: int = 2000
    """integrate: valid cells that integration is measured on; 0: it is not measured."""

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for key, tasks in _FOR.items():
            if self.name not in tasks and getattr(self, key) != defaults[key]:
                raise ConfigError(
                    f"task.{key} means nothing to the task {self.name}",
                    where=f"task.{key}",
                    advice=f"leave it out; it is for {' and '.join(tasks)}",
                )
        for key in ("mvc", "zero", "prompt", "similarity", "adversary"):
            weight = f"{key}_weight"
            check(getattr(self, weight) >= 0, f"task.{weight}", "must be at least 0")
        check(self.cell_prompt_after >= 0, "task.cell_prompt_after", "must be at least 0")
        check(self.metric_cells >= 0, "task.metric_cells", "must be at least 0")
        check(
            0 <= self.similarity_threshold <= 1,
            "task.similarity_threshold",
            "is a cosine, between 0 and 1",
        )
        if self.name == "annotate" and self.label is None:
            raise ConfigError(
                "the task annotate needs the label column that holds the classes",
                where="task.label",
                advice="for example --set task.label=cell_type; scshards info shows the columns",
            )
        if self.name == "integrate" and self.domain is None:
            raise ConfigError(
                "the task integrate needs the label column that holds the domains",
                where="task.domain",
                advice="for example --set task.domain=donor; scshards info shows the columns",
            )

    @property
    def masks(self) -> bool:
        """Whether values are hidden, or genes: not when the class alone is learnt."""
        return self.name != "annotate"

    @property
    def needed(self) -> str | None:
        """The label column without which a cell is of no use to the task."""
        return {"pretrain": None, "integrate": self.domain, "annotate": self.label}[self.name]

    @property
    def batch_domain(self) -> str | None:
        """The label column that all cells of a batch have to agree in."""
        return self.domain if self.name == "integrate" and self.domain_norm else None

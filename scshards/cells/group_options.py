"""GroupOptions: which labels make groups of cells, which cells are controls, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from scshards.base.config import Options
from scshards.base.errors import ConfigError
from scshards.base.records import Form
from scshards.cells.holdout import Holdout, read_holdout

HoldoutOption = Annotated[str | Path | Holdout | None, Form(read_holdout)]


@dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """Groups of cells, their controls, and a holdout: what `SetOptions` and `verify` have in common.

    Attributes
    ----------
    by
        Labels whose combination makes a group, such as cell_line and perturbation. The last of them
        says what was done to a cell.
    control
        The category of the last label of `by` that means that nothing was done: its cells are the
        controls, and make no sets of their own.
    match
        Labels that the i-th control of a set shares with the set's i-th cell. Without it, all of `by`
        but the last; none at all lets any control stand beside any cell.
    holdout
        A TOML file that says which lines (categories of the first label of `by`) and which
        perturbations are not trained on, in the tables [zeroshot] and [fewshot] of cell-load.
    """

    by: tuple[str, ...]
    control: str
    match: tuple[str, ...] | None = None
    holdout: HoldoutOption = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.by:
            raise ConfigError(
                "it is at least one label: the last one has the control",
                where="by",
                advice='for example by=("cell_line", "perturbation")',
            )
        for name in ("by", "match"):
            given = getattr(self, name) or ()
            if len(set(given)) != len(given):
                raise ConfigError(f"a label is twice in it: {', '.join(given)}", where=name)
        if self.holdout is not None and len(self.by) < 2:
            raise ConfigError(
                "a holdout is of lines and their perturbations, and by has one label",
                where="holdout",
                advice='for example by=("cell_line", "perturbation")',
            )
        if self.by[-1] in self.matched:
            raise ConfigError(
                f"{self.by[-1]!r} is the label that has the control: no control shares it with a cell",
                where="match",
                advice=f"leave {self.by[-1]!r} out of match",
            )

    @property
    def matched(self) -> tuple[str, ...]:
        """The labels that a control shares with its cell."""
        return self.by[:-1] if self.match is None else self.match

    @property
    def columns(self) -> tuple[str, ...]:
        """All labels that groups and their controls are made by."""
        return tuple(dict.fromkeys((*self.by, *self.matched)))

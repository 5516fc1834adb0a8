"""SetOptions: sets of cells of one group, each beside as many controls."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from scshards.base.config import Options
from scshards.base.errors import ConfigError
from scshards.base.records import Form, Positive
from scshards.streaming.sets.holdout import Holdout, Part, read_holdout

SMALL = Literal["leave", "repeat"]
UNMATCHED = Literal["raise", "leave"]

DIGESTS = ("holdout",)
"""Options that a state tells by a digest."""

HoldoutOption = Annotated[Holdout | str | Path | None, Form(read_holdout)]


@dataclass(frozen=True, kw_only=True)
class SetOptions(Options):
    """Sets of cells of one group beside as many controls: `CellLoader(..., sets=...)`.

    A batch is then a `SetBatch`, and `batch_size` counts sets.

    Attributes
    ----------
    by
        Labels whose combination makes a group, such as ("cell_line", "perturbation"). The last of them
        says what was done to a cell.
    size
        Cells of a set, and as many controls.
    control
        The category of the last label of `by` that means that nothing was done: its cells are the
        controls, and make no sets of their own.
    match
        Labels that the i-th control of a set shares with the set's i-th cell. Without it, all of `by`
        but the last; () lets any control stand beside any cell.
    small
        What becomes of groups with fewer cells than a set. leave: they make no set, and a line says how
        many. repeat: they make one set, in which cells come again.
    unmatched
        What becomes of cells that no control matches. raise: they are refused. leave: they are left
        out, and a line says how many.
    holdout
        A TOML file that says which lines (categories of the first label of `by`) and which
        perturbations are not trained on, in the tables [zeroshot] and [fewshot] of cell-load.
    part
        Of `holdout`: which groups make sets, those to train on or those held out. Controls are in
        every part.
    """

    by: tuple[str, ...]
    size: Positive = 64
    control: str
    match: tuple[str, ...] | None = None
    small: SMALL = "leave"
    unmatched: UNMATCHED = "raise"
    holdout: HoldoutOption = None
    part: Part = "train"

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
        if self.holdout is None and self.part != "train":
            raise ConfigError(
                f"it is {self.part!r}, and no holdout says what is held out",
                where="part",
                advice='give holdout="splits.toml"',
            )
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
        """All labels that sets are made by."""
        return tuple(dict.fromkeys((*self.by, *self.matched)))

    def state(self) -> dict[str, Any]:
        """What a loader's state has to agree on, ready for JSON."""
        told = {f.name: getattr(self, f.name) for f in fields(self)} | {"match": self.matched}
        if isinstance(self.holdout, Holdout):
            told["holdout"] = self.holdout.digest()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}

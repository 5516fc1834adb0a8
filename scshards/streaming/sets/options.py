"""SetOptions: sets of cells of one group, each beside as many controls."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from scshards.base.errors import ConfigError
from scshards.base.records import Positive
from scshards.cells.group_options import GroupOptions
from scshards.cells.holdout import Holdout, Part

SMALL = Literal["leave", "repeat"]
UNMATCHED = Literal["raise", "leave"]

DIGESTS = ("holdout",)
"""Options that a state tells by a digest."""


@dataclass(frozen=True, kw_only=True)
class SetOptions(GroupOptions):
    """Sets of cells of one group beside as many controls: `CellLoader(..., sets=...)`.

    A batch is then a `SetBatch`, and `batch_size` counts sets.

    Attributes
    ----------
    by
        As in GroupOptions.
    size
        Cells of a set, and as many controls.
    control, match
        As in GroupOptions.
    small
        What becomes of groups with fewer cells than a set. leave: they make no set, and a line says how
        many. repeat: they make one set, in which cells come again.
    unmatched
        What becomes of cells that no control matches. raise: they are refused. leave: they are left
        out, and a line says how many.
    holdout
        As in GroupOptions.
    part
        Of `holdout`: which groups make sets, those to train on or those held out. Controls are in
        every part.
    """

    size: Positive = 64
    small: SMALL = "leave"
    unmatched: UNMATCHED = "raise"
    part: Part = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.holdout is None and self.part != "train":
            raise ConfigError(
                f"it is {self.part!r}, and no holdout says what is held out",
                where="part",
                advice='give holdout="splits.toml"',
            )

    def state(self) -> dict[str, Any]:
        """What a loader's state has to agree on, ready for JSON."""
        told = {f.name: getattr(self, f.name) for f in fields(self)} | {"match": self.matched}
        if isinstance(self.holdout, Holdout):
            told["holdout"] = self.holdout.digest()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}

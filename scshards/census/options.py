"""What of an index is downloaded: what a person chooses, and nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from scshards.base.errors import ConfigError

MAX_CELLS = 200_000
"""Cells of a partition, as in scGPT's scripts: some 2 GB as a compressed h5ad file."""


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """What is downloaded.

    Attributes
    ----------
    partitions
        Only these partitions of each query, counted from 0.
    max_cells
        Cells of a partition; the last one has what is left.
    share
        Every N-th partition from the I-th on, beside other processes that make the others, such as the
        tasks of a Slurm array.
    """

    partitions: tuple[int, ...] | None = None
    max_cells: int = MAX_CELLS
    share: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.max_cells < 1:
            raise ConfigError(
                f"a partition has at least 1 cell, not {self.max_cells}", where="max_cells"
            )
        if self.share is not None and not 1 <= self.share[0] <= self.share[1]:
            i, n = self.share
            raise ConfigError(
                f"{i}/{n} is no share", where="share", advice="give I/N with I from 1 to N"
            )
        if self.share is not None and self.partitions is not None:
            raise ConfigError("only one of them can be given", where="partitions, share")

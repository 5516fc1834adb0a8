"""What `reshard` and `merge` are asked for, and the options that the new set has by it.

What is not given stays as it was in the (first) set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scshards.base import where as where_
from scshards.base.errors import ConfigError
from scshards.packing.options import PackOptions
from scshards.shards import Compression

if TYPE_CHECKING:
    from scshards.shards.manifest import Manifest

_OF_SPLITS = ("valid_fraction", "test_fraction", "split_by", "held_out")
_NOT_ASKED = ("workers", "scratch", "storage_options")


@dataclass(frozen=True, kw_only=True)
class ReshardOptions:
    """Options of `reshard` and `merge`; what is not given is as it is in the set, the first of several.

    Attributes
    ----------
    obs
        The labels to keep, in this order; an empty name keeps none. Without it, all of them.
    cells_per_shard, compression, shuffle, seed
        As in PackOptions.
    valid_fraction
        Split all cells anew: the share of them (of the values of `split_by`, where it is given) that
        goes to the split "valid". Without any option of splits, every cell stays in its split.
    test_fraction
        Split all cells anew: the share that goes to the split "test".
    split_by
        Split all cells anew: those with the same value of this label go to one split.
    held_out
        As in PackOptions.
    one_split
        Put all cells into the split "train".
    splits
        Take the cells of these splits only.
    where
        Take the cells this is true for: an expression over labels, n_genes and total (the sum of a
        cell's values) in pandas query syntax, such as "tissue == 'lung' and n_genes > 500".
    min_genes
        Leave out cells with values of fewer genes.
    max_genes
        Leave out cells with values of more genes.
    min_counts
        Leave out cells whose values sum to less.
    same_names
        Take inputs of the same name in two sets for different files; else they are refused.
    workers, scratch, storage_options
        As in PackOptions.
    """

    obs: tuple[str, ...] | None = None
    cells_per_shard: int | None = None
    compression: Compression | None = None
    shuffle: bool | None = None
    seed: int | None = None
    valid_fraction: float | None = None
    test_fraction: float | None = None
    split_by: str | None = None
    held_out: Mapping[str, Sequence[str]] | None = None
    one_split: bool = False
    splits: tuple[str, ...] | None = None
    where: str | None = None
    min_genes: int | None = None
    max_genes: int | None = None
    min_counts: float | None = None
    same_names: bool = False
    workers: int | None = None
    scratch: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("obs", "splits"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} takes a list of names", where=name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.splits is not None and not self.splits:
            raise ConfigError("no split is named", where="splits")
        if self.one_split and any(getattr(self, name) is not None for name in _OF_SPLITS):
            raise ConfigError(
                "choose either one split or new splits", where=", ".join(("one_split", *_OF_SPLITS))
            )
        if self.where is not None:
            where_.parse(self.where)

    @property
    def keeps_splits(self) -> bool:
        """Whether every cell stays in its split."""
        return not self.one_split and all(getattr(self, name) is None for name in _OF_SPLITS)

    @property
    def takes_all(self) -> bool:
        """Whether no cell is left out."""
        chosen = (self.splits, self.where, self.min_genes, self.max_genes, self.min_counts)
        return all(option is None for option in chosen)

    def asked(self) -> dict[str, Any]:
        """What decides over the output, ready for JSON; no secrets."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.held_out is not None:
            options["held_out"] = {name: list(values) for name, values in self.held_out.items()}
        return {name: v for name, v in options.items() if name not in _NOT_ASKED}

    def of_new_set(self, manifests: Sequence[Manifest], labels: Sequence[str]) -> PackOptions:
        """The options that the new set is written by; how it was split, where that stays, is not in
        them, and what cells must have only where it is asked for here.

        Parameters
        ----------
        manifests
            Of the old sets.
        labels
            Of the new set.

        Raises
        ------
        ConfigError
            When an option can't be used.
        """
        old = manifests[0].options
        seed = old.get("seed", 0)
        if self.keeps_splits:
            seed = old.get("order_seed", seed)
        chosen: dict[str, Any] = {
            "obs": tuple(labels),
            "cells_per_shard": _given(self.cells_per_shard, old.get("cells_per_shard")),
            "compression": _given(self.compression, manifests[0].compression),
            "shuffle": _given(self.shuffle, old.get("shuffle")),
            "seed": _given(self.seed, seed),
            "where": self.where,
            "min_genes": _given(self.min_genes, 0),
            "max_genes": self.max_genes,
            "min_counts": self.min_counts,
            "values": manifests[0].value_kind,
            "workers": self.workers,
            "scratch": self.scratch,
            "storage_options": self.storage_options,
        }
        if not self.keeps_splits and not self.one_split:
            chosen |= self._new_splits(manifests)
        return PackOptions(**{name: value for name, value in chosen.items() if value is not None})

    def _new_splits(self, manifests: Sequence[Manifest]) -> dict[str, Any]:
        if self.split_by is not None:
            split_by: str | None = self.split_by
        else:
            split_by = _common_split_by(manifests)
        if self.held_out is not None:
            given = {"valid_fraction": self.valid_fraction, "test_fraction": self.test_fraction}
            return {"held_out": self.held_out, "split_by": split_by, **given}
        old = manifests[0].options
        return {
            "valid_fraction": _given(self.valid_fraction, old.get("valid_fraction")),
            "test_fraction": _given(self.test_fraction, old.get("test_fraction")),
            "split_by": split_by,
        }


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _common_split_by(manifests: Sequence[Manifest]) -> str | None:
    """The column that the old splits were made by; new ones without a word about it go by it too."""
    columns = {m.options.get("split_by") for m in manifests} - {None}
    if len(columns) > 1:
        raise ConfigError(
            f"the sets are split by different columns: {', '.join(sorted(map(str, columns)))}",
            where="split_by",
            advice="name one of them with --split-by",
        )
    return columns.pop() if columns else None

"""The tensor contract between stream and model: stream makes batches, model and train read them.

    Batch          cells side by side, some values masked, or none
    PackedBatch    the same, one cell behind another in a fixed number of tokens
    GenerateBatch  each cell's known genes and its unknown ones, side by side each
    RankBatch      each cell's genes by falling value, some masked, as Geneformer has them
    SetBatch       two of these: sets of cells of one group each, and as many controls

Shapes: B cells, L tokens (the longest cell of the batch, or as `pad_to` says). Token 0 is `<cls>`;
then come conditions, the cell's expressed genes in ascending id, its unexpressed genes in
ascending id, and padding. Imports no torch: it only holds tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_FIRST = 3
"""How many values of a column `print` shows."""

KEY_ROW_BITS = 40
"""A cell's key is `source << 40 | row`: the ordinal of its source and its row in that source."""


def cell_keys(source: int | NDArray[np.integer], rows: NDArray[np.integer]) -> NDArray[np.int64]:
    """The keys of rows of a source, or of one source each, int64."""
    return np.asarray(source, np.int64) << KEY_ROW_BITS | rows.astype(np.int64)


def split_keys(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sources and the rows of keys."""
    return keys >> KEY_ROW_BITS, keys & ((1 << KEY_ROW_BITS) - 1)


class Labels(dict[str, Any]):
    """Columns of labels by name, and of what categories their codes are.

    Attributes
    ----------
    categories
        {column: its categories, none for numbers}; left behind where a batch goes to another process,
        and where a library makes the dict anew, of tensors on another device: `type(labels)({...})`.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        categories: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        super().__init__(columns)
        self.categories = categories

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def text(self, name: str) -> list[str]:
        """A column's values in words: the category of each code, "-" where there is none."""
        known = self.categories[name]
        if not _is_here(self[name]):
            return []
        if not known:
            return [f"{value:g}" for value in self[name].tolist()]
        return [known[code] if code >= 0 else "-" for code in self[name].tolist()]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class SparseArray:
    """Rows of a sparse array beside the genes: compressed sparse rows, N values in `width` columns.

    Attributes
    ----------
    indptr
        int64 [B + 1]: cell b has the values indptr[b] to indptr[b + 1].
    columns
        int32 [N]: the column of each; they ascend in a cell.
    values
        int32 or float32 [N].
    width
        How many columns there are.
    """

    indptr: Tensor
    columns: Tensor
    values: Tensor
    width: int

    def __len__(self) -> int:
        return int(self.indptr.shape[0]) - 1

    def __getitem__(self, rows: slice) -> SparseArray:
        """Some cells that lie next to each other."""
        first, end, step = rows.indices(len(self))
        assert step == 1
        indptr = self.indptr[first : max(first, end) + 1]
        a, b = int(indptr[0]), int(indptr[-1])
        return dataclasses.replace(
            self, indptr=indptr - a, columns=self.columns[a:b], values=self.values[a:b]
        )

    def __repr__(self) -> str:
        return f"SparseArray of {_shown(self.values)} in {len(self)} rows of {self.width:,} columns"

    def to(self, device: Any, *, non_blocking: bool = False) -> SparseArray:
        """The rows on another device."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SparseArray:
        """The rows in page-locked memory."""
        return self._each(lambda t: t.pin_memory())

    def dense(self) -> Tensor:
        """All values [B, width], zeros included, of their dtype, on the device where they are."""
        numbers_B = self.indptr.new_ones(len(self)).cumsum(0) - 1
        rows_N = numbers_B.repeat_interleave(self.indptr.diff(), output_size=len(self.columns))
        out_BW = self.values.new_zeros((len(self), self.width))
        out_BW.view(-1)[rows_N * self.width + self.columns.long()] = self.values
        return out_BW

    def _each(self, change: Callable[[Tensor], Tensor]) -> SparseArray:
        return dataclasses.replace(
            self,
            indptr=change(self.indptr),
            columns=change(self.columns),
            values=change(self.values),
        )


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class CellBatch:
    """What batches of every kind say about their cells.

    `arrays` has, by name, what was asked for of what lies beside the genes: [B, width] of the array's
    dtype, zeros in rows of weight 0, and a SparseArray of one that is stored sparse.

    `batch["genes"]` is `batch.genes`, and `model(**batch)` gives all fields by name. It is no Mapping
    for all that: its length is that of its cells, and `values` are theirs.
    """

    key: Tensor
    labels: dict[str, Tensor]
    weight: Tensor
    arrays: dict[str, Tensor | SparseArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.key.shape[0])

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    __iter__ = None  # or whoever asks for its items by their places would be given none

    def keys(self) -> list[str]:
        """The names of the fields; `arrays` is one where some were asked for."""
        # A model that takes no arrays is given none.
        return [n for n in self.__dataclass_fields__ if n != "arrays" or self.arrays]

    def items(self) -> list[tuple[str, Any]]:
        """The fields by name."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """A field, `default` where a batch has none of that name."""
        return dict(self.items()).get(name, default)

    def __repr__(self) -> str:
        about = {
            name: _shown(value)
            for name, value in self.items()
            if name not in ("key", "labels", "arrays")
        }
        about["key"] = f"{_shown(self.key)} {_first(self.cell_keys)}" if _is_here(self.key) else ""
        labels = self.labels if isinstance(self.labels, Labels) else Labels(self.labels)
        for name, column in labels.items():
            texts = labels.text(name) if name in labels.categories else ()
            about[f"labels[{name!r}]"] = f"{_shown(column)} {_first(texts)}".rstrip()
        about |= {f"arrays[{name!r}]": _shown(array) for name, array in self.arrays.items()}
        lines = (f"    {name:<19} {said}" for name, said in about.items())
        return "\n".join([f"{type(self).__name__} of {len(self)} cells", *lines])

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """The batch on another device; `key` stays where it is."""

        fields = [name for name in self.keys() if name != "key"]
        return self._each(fields, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; `DataLoader(pin_memory=True)` asks for it."""
        return self._each(self.keys(), lambda t: t.pin_memory())

    def _each(self, fields: Sequence[str], change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with the tensors of some fields changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                made = {k: changed(v) for k, v in value.items()}
                return Labels(made, value.categories) if isinstance(value, Labels) else made
            return change(value) if hasattr(value, "to") else value

        return dataclasses.replace(self, **{name: changed(getattr(self, name)) for name in fields})

    @property
    def cell_keys(self) -> list[str]:
        """The keys as the shards spell them, `SSSSSS-RRRRRRRRRR`."""
        return [key_text(k) for k in self.key.tolist() if k >= 0]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Batch(CellBatch):
    """Padded, masked cells.

    Attributes
    ----------
    genes
        int32 [B, L]: token ids; `<cls>` first, `<pad>` last.
    values
        float32 [B, L]: what the model sees: the value, `mask_value` where masked, `pad_value` at
        padding, `cls_value` at `<cls>` and conditions.
    targets
        float32 [B, L]: as `values`, with nothing masked.
    is_masked
        bool [B, L]: where the model has to predict. Never `<cls>`, conditions or padding.
    is_pad
        bool [B, L]: padding. `<cls>` is not.
    key
        int64 [B]: the cell's key (`source << 40 | row`), -1 in rows that only fill up a batch.
    labels
        {column: [B]}: int64 codes of the manifest's categories, -1 when missing; float64 for
        numeric columns, NaN when missing.
    weight
        float32 [B]: 1, or 0 in rows that only fill up the last batch of an evaluation.
    """

    genes: Tensor
    values: Tensor
    targets: Tensor
    is_masked: Tensor
    is_pad: Tensor

    def to_scgpt(self) -> dict[str, Tensor]:
        """What scGPT's DataCollator gives in the style "pcpt": `gene` int64, `expr` and `masked_expr`
        float32, all [B, L]."""
        return {"gene": self.genes.long(), "expr": self.targets, "masked_expr": self.values}


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class PackedBatch(CellBatch):
    """Masked cells one behind another, T tokens in all; every batch of a loader has the same shapes.

    Attributes
    ----------
    genes, values, targets, is_masked
        int32, float32, float32 and bool [T]: as in Batch.
    is_pad
        bool [T]: what is left over behind the last cell.
    cu_seqlens
        int32 [B + 1]: cell b has the tokens cu_seqlens[b] to cu_seqlens[b + 1], as variable-length
        attention wants them. No cell has the padding, so such attention leaves it as it was.
    max_seqlen
        The most tokens that a cell of any batch can have.
    genes_cut
        Genes that were left out so that all cells fit, beside those that `max_length` leaves out.
    key, labels, weight
        As in Batch, [B]. A row of weight 0 has `<cls>` and conditions alone.
    """

    genes: Tensor
    values: Tensor
    targets: Tensor
    is_masked: Tensor
    is_pad: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    genes_cut: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class GenerateBatch(CellBatch):
    """Cells whose genes are split: from the known ones the model predicts the unknown ones.

    Attributes
    ----------
    known_genes
        int32 [B, P]: `<cls>` first, `<pad>` last; genes in the order of a Batch.
    known_values
        float32 [B, P]: their values, `pad_value` at padding, `cls_value` at `<cls>` and conditions.
    known_is_pad
        bool [B, P].
    unknown_genes
        int32 [B, G]: genes in the order of a Batch, then `<pad>`.
    unknown_targets
        float32 [B, G]: the values to predict, `pad_value` at padding.
    unknown_is_pad
        bool [B, G]. All the rest is to be predicted.
    ratio
        The share of genes that is unknown, the same for the whole batch.
    key, labels, weight
        As in Batch.
    """

    known_genes: Tensor
    known_values: Tensor
    known_is_pad: Tensor
    unknown_genes: Tensor
    unknown_targets: Tensor
    unknown_is_pad: Tensor
    ratio: float

    def to_scgpt(self) -> dict[str, Tensor]:
        """What scGPT's DataCollator gives in the style "both": `pcpt_gene` int64 and `pcpt_expr`
        float32 [B, P], `gen_gene` int64 and `gen_expr_target` float32 [B, G]."""
        return {
            "pcpt_gene": self.known_genes.long(),
            "pcpt_expr": self.known_values,
            "gen_gene": self.unknown_genes.long(),
            "gen_expr_target": self.unknown_targets,
        }


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class RankBatch(CellBatch):
    """Padded cells told by the order of their genes, the one of the highest value first.

    Attributes
    ----------
    genes
        int32 [B, L]: what the model sees: `<cls>`, genes or what is in their place (`<mask>`, another
        gene), `<eos>`, `<pad>`.
    targets
        int32 [B, L]: the gene that is there, where the model has to predict it; else -100.
    is_pad
        bool [B, L]: padding.
    left_out
        int32 [B]: how many expressed genes of the cell have no median.
    key, labels, weight
        As in Batch. A row of weight 0 has `<cls>` and `<eos>` alone.
    """

    genes: Tensor
    targets: Tensor
    is_pad: Tensor
    left_out: Tensor

    def to_bert(self) -> dict[str, Tensor]:
        """What BertForMaskedLM and its kin take by name: `input_ids`, `attention_mask` (1 where there
        is a token) and `labels` (-100 where nothing is predicted), all int64 [B, L]."""
        return {
            "input_ids": self.genes.long(),
            "attention_mask": (~self.is_pad).long(),
            "labels": self.targets.long(),
        }


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class SetBatch:
    """Sets of cells of one group each, S of them, beside as many controls; its length is S.

    Attributes
    ----------
    cells
        The cells, S * size rows, set by set: whatever batch the loader's objective makes.
    controls
        A batch of the same kind: the i-th control of a set stands beside its i-th cell.
    groups
        {label: int64 [S]}: the codes of each set's group, -1 in sets that only fill up a batch.
        `groups.text(label)` has the categories.
    weight
        float32 [S]: 1, or 0 in sets that only fill up the last batch of an evaluation, and in those
        that lost all their cells or all their controls.
    size
        Cells of a set.
    """

    cells: CellBatch
    controls: CellBatch
    groups: dict[str, Tensor]
    weight: Tensor
    size: int

    def __len__(self) -> int:
        return int(self.weight.shape[0])

    __iter__ = None

    def __repr__(self) -> str:
        groups = self.groups if isinstance(self.groups, Labels) else Labels(self.groups)
        lines = [
            f"{type(self).__name__} of {len(self)} sets of {self.size} cells and as many controls"
        ]
        for name, column in groups.items():
            texts = groups.text(name) if name in groups.categories else ()
            lines.append(f"    groups[{name!r}] {_shown(column)} {_first(texts)}".rstrip())
        return "\n".join([*lines, f"cells: {self.cells!r}", f"controls: {self.controls!r}"])

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """The batch on another device; keys stay where they are."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; `DataLoader(pin_memory=True)` asks for it."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        groups: dict[str, Any] = {name: change(column) for name, column in self.groups.items()}
        if isinstance(self.groups, Labels):
            groups = Labels(groups, self.groups.categories)
        changed = {name: change(getattr(self, name)) for name in ("cells", "controls", "weight")}
        return dataclasses.replace(self, groups=groups, **changed)


def format_key(source: int, row: int) -> str:
    """A cell's key as text: six digits of source ordinal, ten of source row."""
    return f"{source:06d}-{row:010d}"


def key_text(key: int) -> str:
    """A cell's key, as batches have it, as `format_key` spells it."""
    return format_key(key >> KEY_ROW_BITS, key & ((1 << KEY_ROW_BITS) - 1))


def _is_here(value: Any) -> bool:
    """Whether a tensor has values that can be looked at."""
    return bool(value.device.type != "meta")


def _shown(value: Any) -> str:
    """A tensor's type, shape and device, and of what is true or false the share; else the value."""
    if not hasattr(value, "dtype"):
        return str(value)
    kind, where = str(value.dtype).removeprefix("torch."), str(value.device)
    said = f"{kind} {list(value.shape)}{'' if where == 'cpu' else f' on {where}'}"
    if kind == "bool" and value.numel() and _is_here(value):
        said += f", {value.float().mean().item():.1%} true"
    return said


def _first(texts: Sequence[str]) -> str:
    return ", ".join([*texts[:_FIRST], *(["..."] if len(texts) > _FIRST else [])])

"""What all kinds of batches share: the cells of one, how long its rows are, which ratio it has.

Called by streaming.collate.batches, whose Collator makes batches of it.
"""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import FormatError
from scshards.cells.batch import CellBatch, Labels, SparseArray, key_text
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.kernels import cells as kernels
from scshards.kernels.bits import DIGITS
from scshards.kernels.members import MEMBER_FIELDS, OK, measure_members, read_only
from scshards.shards.arrays import ArrayReader, SparseRows, check_arrays
from scshards.shards.manifest import ArrayInfo, LabelInfo
from scshards.shards.members import STATUS
from scshards.shards.tar import arrays_offsets
from scshards.streaming.collate.lead_tokens import LeadTokens, gene_ids
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.packing import fitting_room
from scshards.streaming.collate.pinned import as_tensor, pinned_memory
from scshards.streaming.read.pool import BufferPool
from scshards.streaming.read.source import CellBytes

_COPY_STEP = np.int64(0x2545F4914F6CDD1D)
"""What a cell's key grows by, wrapping, where it appears again: no other cell's key is there."""

Made = TypeVar("Made", bound=CellBatch)
"""The kind of batches that a collator makes."""

_MARK = {"mask": "mask", "none": "mask", "generate": "generate"}
"""What an objective's draws of hidden genes are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """The cells of a batch, B of them, or of several batches.

    Attributes
    ----------
    read
        The members, and what comes with them.
    fields
        Where the parts of each member are: `members.measure_members`.
    is_cell
        bool [B].
    drawn_by
        int64 [B]: the keys that draws are made by.
    ratio
        The share of genes that is hidden.
    """

    read: CellBytes
    fields: NDArray[np.int64]
    is_cell: NDArray[np.bool_]
    drawn_by: NDArray[np.int64]
    ratio: float
    epoch: int

    @property
    def keys(self) -> NDArray[np.int64]:
        """int64 [B]: as in the shards."""
        return self.read.keys


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCells(Cells):
    """Cells that become rows of tokens.

    Attributes
    ----------
    leads
        int32 [B, tokens]: the leading tokens.
    tokens
        int64 [B]: of each cell, `<cls>` included, padding not.
    rules
        Of the collator, or with less room where cells are packed.
    """

    leads: NDArray[np.int32]
    tokens: NDArray[np.int64]
    rules: kernels.CellRules


class CollatorBase(ABC, Generic[Made]):
    """What a collator of any objective has: options, labels, and buffers for batches.

    Parameters
    ----------
    options
        See CollateOptions.
    vocab
        Gives `<cls>`, `<pad>`, the genes, and the bound on gene ids.
    kind
        "counts" or "float", as the manifest says.
    seed
        Of masks, samples, ties and all other draws.
    labels
        The label columns that come with each member, in order.
    pin_memory
        Whether batches, but not their keys, lie in page-locked memory, which `to(device,
        non_blocking=True)` copies from while the host goes on; None: where there is a CUDA device.
    """

    genes: tuple[str, ...] = ()
    """The genes that are columns of a batch, where it has columns."""

    arrays: ArrayReader | None = None
    """Reads what batches have beside the genes; behind the labels of cells are the sizes of their first
    members then."""

    def __init__(
        self,
        options: CollateOptions,
        vocab: Vocab,
        kind: ValueKind,
        seed: int,
        labels: Mapping[str, LabelInfo] | None = None,
        *,
        pin_memory: bool | None = False,
        arrays: Mapping[str, ArrayInfo] = MappingProxyType({}),
    ) -> None:
        options.check_kind(kind)
        self.options, self.vocab = options, vocab
        self._seed = seed
        self._labels = dict(labels or {})
        self._categories = {name: info.categories for name, info in self._labels.items()}
        self._local = threading.local()
        self._pinned = pinned_memory(pin_memory)
        self._buffers = self._pinned or BufferPool()
        if options.arrays:
            self.arrays = ArrayReader(arrays, options.arrays)
        self._prepare(kind)

    @property
    def makes_several(self) -> bool:
        """Whether several batches can be made at once."""
        return False

    @abstractmethod
    def _prepare(self, kind: ValueKind) -> None:
        """What an objective needs besides, of values of that kind."""

    @abstractmethod
    def _batches(self, cells: Cells, batches: int) -> Sequence[Made]:
        """So many batches of as many cells each."""

    def collate(
        self,
        read: CellBytes,
        epoch: int,
        position: int = 0,
        copies: NDArray[np.int64] | None = None,
        batches: int = 1,
    ) -> Sequence[Made]:
        """So many batches of as many cells each, one behind another.

        They share memory, which is used again when all of them are gone. One call for 8 batches takes
        a fifth of the time in Python, which only one thread can spend at a time, of 8 calls.

        Parameters
        ----------
        read
            The members. A size of 0 makes a row of weight 0; keys, with seed and epoch, decide masks,
            samples and ties.
        position
            Of the first batch in its epoch: with seed and epoch, it decides which of several ratios is
            used.
        copies
            int64 [B]: how often each cell appeared before in this epoch; another appearance has
            another sample and other masks.
        batches
            More than one only if `makes_several`.

        Raises
        ------
        FormatError
            For a member that is not a cell of format 1, naming its key; there is no batch then.
        """
        assert batches == 1 or self.makes_several
        read = dataclasses.replace(read, data=read_only(read.data))
        is_cell, fields = self._measured(read)
        cells = Cells(
            read=read,
            fields=fields,
            is_cell=is_cell,
            drawn_by=read.keys if copies is None else read.keys + copies * _COPY_STEP,
            ratio=self._ratio(epoch, position),
            epoch=epoch,
        )
        return self._batches(cells, batches)

    def _measured(self, read: CellBytes) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which rows hold a cell (bool [B]), and where the parts of members are: `Cells.fields`."""
        is_cell = read.sizes > 0
        fields = np.zeros((len(read.keys), MEMBER_FIELDS), np.int64)
        status = np.zeros(len(read.keys), np.int64)
        measure_members(read.data, read.starts, self._cell_sizes(read), fields, status)
        if status.any():
            for bad in np.flatnonzero((status != OK) & is_cell):
                self._check((int(status[bad]), int(bad)), read.keys)
        return is_cell, fields

    def _cell_sizes(self, read: CellBytes) -> NDArray[np.int64]:
        """The size of each cell's first member, which has the genes."""
        if self.arrays is None:
            return read.sizes
        return np.where(read.sizes > 0, read.labels[:, len(self._labels)], 0)

    def _arrays(self, read: CellBytes) -> dict[str, torch.Tensor | SparseArray]:
        """What the cells have beside their genes, of what was asked for."""
        if self.arrays is None:
            return {}
        is_cell, ends = read.sizes > 0, read.starts + read.sizes
        at = arrays_offsets(read.starts, self._cell_sizes(read))
        rows, status = self.arrays.read(read.data, at, np.where(is_cell, ends - at, 0))
        check_arrays(status, lambda i: f"cell {key_text(int(read.keys[i]))}")
        made: dict[str, torch.Tensor | SparseArray] = {}
        for name, found in rows.items():
            info = self.arrays.infos[name]
            if isinstance(found, SparseRows):
                made[name] = SparseArray(
                    indptr=self._shared(found.indptr),
                    columns=self._shared(found.columns),
                    values=self._shared(found.values),
                    width=info.width,
                )
            else:
                made[name] = self._shared(found.astype(info.dtype, copy=False))
        return made

    def _shared(self, array: NDArray[Any]) -> torch.Tensor:
        """An array that nobody else has as a tensor."""
        return torch.from_numpy(array) if self._pinned is None else self._kept(array)

    def _about(
        self, read: CellBytes, is_cell: NDArray[np.bool_], batches: int = 1
    ) -> Iterator[dict[str, Any]]:
        """key, labels, weight and arrays of each of so many batches that the cells make."""
        columns = []
        for j, info in enumerate(self._labels.values()):
            column = read.labels[:, j]
            if info.kind == "number":
                column = np.where(is_cell, column.view(np.float64), np.nan)
            columns.append(self._kept(column))
        all_of_it = [torch.from_numpy(read.keys.copy()), self._kept(is_cell.astype(np.float32))]
        rows = len(is_cell) // batches
        arrays = self._arrays(read)
        first = 0
        for key, weight, *labels in zip(
            *(x.split(rows) for x in [*all_of_it, *columns]), strict=True
        ):
            named = dict(zip(self._labels, labels, strict=True))
            some = slice(first, first + rows)
            yield {
                "key": key,
                "labels": Labels(named, self._categories),
                "weight": weight,
                "arrays": arrays if batches == 1 else {n: a[some] for n, a in arrays.items()},
            }
            first += rows

    def about_sets(
        self,
        codes: NDArray[np.int64],
        categories: Mapping[str, Sequence[str]],
        is_set: NDArray[np.bool_],
    ) -> dict[str, Any]:
        """groups and weight of a SetBatch; `codes`, [sets, labels], are of these categories."""
        columns = map(self._kept, codes.T)
        named = dict(zip(categories, columns, strict=True))
        return {
            "groups": Labels(named, categories),
            "weight": self._kept(is_set.astype(np.float32)),
        }

    def _kept(self, array: NDArray[Any]) -> torch.Tensor:
        """A small array as a tensor that shares no memory with it."""
        if self._pinned is None:
            return torch.from_numpy(array.copy())
        memory = self._pinned.take(array.nbytes).view(array.dtype).reshape(array.shape)
        memory[...] = array
        return as_tensor(memory)

    def _outputs(self, shapes: list[tuple[int, int]], kinds: list[Any]) -> list[NDArray[Any]]:
        """Arrays of these shapes and kinds, in one buffer of the pool."""
        used = [r * c * np.dtype(k).itemsize for (r, c), k in zip(shapes, kinds, strict=True)]
        starts = np.cumsum([0, *(-(-n // 64) * 64 for n in used)]).tolist()
        buffer = self._buffers.take(starts[-1])
        return [
            buffer[a : a + n].view(kind).reshape(shape)
            for a, n, kind, shape in zip(starts, used, kinds, shapes, strict=False)
        ]

    def _length(self, longest: int) -> int:
        """Tokens of each row of a batch whose longest cell has so many, padding included."""
        to = self.options.pad_to
        if to == "longest":
            return longest
        if to == "max":
            return self.options.max_length
        return min(self.options.max_length, -(-longest // to) * to)

    def _ratio(self, epoch: int, position: int) -> float:
        """The ratio of the batch at that position: one draw, the same on every rank."""
        ratios = self.options.ratios
        if len(ratios) < 2:
            return ratios[0] if ratios else 0.0
        draw = seeds.draws(seeds.key(self._seed, "ratio", epoch), np.array([position]))[0]
        return ratios[int(draw >> np.uint64(32)) * len(ratios) >> 32]

    def _check(self, result: tuple[int, int], keys: NDArray[np.int64]) -> None:
        status, member = result
        if status != OK:
            key = int(keys[member])
            raise FormatError(
                STATUS[status],
                where=f"cell {key_text(key)}",
                advice="run scshards verify on the shard set",
            )


class TokenCollator(CollatorBase[Made]):
    """Tokens and values of cells, as scGPT has them: what all kinds of its batches share."""

    def _prepare(self, kind: ValueKind) -> None:
        options, vocab = self.options, self.vocab
        self._leads = LeadTokens(vocab, options.conditions, self._labels)
        self.vocab = self._leads.vocab
        self._pad_id = vocab.pad_id
        self._cls_value = options.pad_value if options.cls_value is None else options.cls_value
        self._rules = kernels.CellRules(
            n_tokens=len(vocab),
            as_counts=kind == "counts",
            room=int(options.room),
            kept=int(options.kept_genes),
            quantiles=np.linspace(0, 1, options.n_bins - 1) if options.has_bins else np.zeros(0),
            ties=options.tie_break == "random",
        )
        self._scale = (float(options.target_sum or 0), options.values == "log1p")
        self._gene_ids = gene_ids(vocab)
        self._packed_tokens = options.tokens_per_batch
        self._epoch_keys: tuple[int, kernels.DrawKeys] | None = None

    def _with_tokens(self, cells: Cells) -> TokenCells:
        n_genes, rules = cells.fields[:, 0].copy(), self._rules
        if self._packed_tokens is not None:
            rules = self._packed_rules(n_genes, cells.is_cell, self._packed_tokens)
        return TokenCells(
            read=cells.read,
            fields=cells.fields,
            is_cell=cells.is_cell,
            drawn_by=cells.drawn_by,
            ratio=cells.ratio,
            epoch=cells.epoch,
            leads=self._leads.ids(cells.read.labels),
            tokens=self._tokens(n_genes, cells.is_cell, rules),
            rules=rules,
        )

    def _read(
        self,
        cells: TokenCells,
        at: NDArray[np.int64],
        genes: NDArray[np.int32],
        values: NDArray[np.float32],
    ) -> None:
        """The genes and values of cell b, without leading tokens, into flat arrays from at[b] on.

        What is behind them, up to SLACK elements, may be written to as well.
        """
        src, fields, rules = cells.read.data, cells.fields, cells.rules
        keys, scratch = self._draw_keys(cells.epoch), self._scratch()
        is_scaled = any(self._scale)
        totals = np.zeros(len(fields) if is_scaled else 0, np.uint64)
        is_left = np.ones(len(fields), np.bool_)
        if rules.as_counts:
            status = kernels.read_cells(
                src,
                fields,
                cells.drawn_by,
                at,
                rules,
                keys,
                scratch,
                genes,
                values,
                totals,
                is_left,
            )
            self._check(status, cells.keys)
        if is_left.any():
            status = kernels.read_others(
                src, fields, cells.drawn_by, at, rules, keys, scratch, self._scale, genes, values,
                is_left,
            )  # fmt: skip
            self._check(status, cells.keys)
        if is_scaled:
            kernels.scale_rows(fields, rules.room, at, totals, *self._scale, values, is_left)
        if self.options.include_zero_genes:
            tokens = cells.tokens - self.options.n_leads
            bits = np.zeros((2, (rules.n_tokens + 63) // 64), np.uint64)
            kernels.add_zeros(
                src, fields, cells.drawn_by, at, tokens, rules, self._gene_ids, keys.zeros, scratch.ids,
                bits, genes, values,
            )  # fmt: skip

    def _packed_rules(
        self, n_genes: NDArray[np.int64], is_cell: NDArray[np.bool_], tokens: int
    ) -> kernels.CellRules:
        """With as much room for each cell as all of them need to fit together."""
        others = self._tokens(n_genes, is_cell, self._rules._replace(room=0))
        room = fitting_room(n_genes, self._rules.room, tokens - int(others.sum()))
        return self._rules._replace(room=room)

    def _genes_cut(self, cells: TokenCells) -> int:
        """Genes that the cells have no room for in a packed batch, and would have in a padded one."""
        n_genes = cells.fields[cells.is_cell, 0]
        whole, packed = (np.minimum(n_genes, r.room).sum() for r in (self._rules, cells.rules))
        return int(whole - packed)

    def _tokens(
        self, n_genes: NDArray[np.int64], is_cell: NDArray[np.bool_], rules: kernels.CellRules
    ) -> NDArray[np.int64]:
        """Tokens of each row, without padding."""
        genes = np.minimum(n_genes, rules.room)
        if self.options.include_zero_genes:
            genes += np.clip(len(self._gene_ids) - n_genes, 0, self.options.include_zero_genes)
        return self.options.n_leads + genes * is_cell

    def _draw_keys(self, epoch: int) -> kernels.DrawKeys:
        known = self._epoch_keys
        if known is None or known[0] != epoch:
            names = ("sample", "tie", "zeros", _MARK[self.options.objective])
            keys = (np.uint64(seeds.key(self._seed, name, epoch)) for name in names)
            self._epoch_keys = known = (epoch, kernels.DrawKeys(*keys))
        return known[1]

    def _scratch(self) -> kernels.Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = kernels.new_scratch(self._rules, self.options.n_leads)
        scratch: kernels.Scratch = self._local.scratch
        return scratch


def share_of(ratio: float) -> int:
    """A ratio below 1 as a chance of `kernels.bits.chances`."""
    return min(round(ratio * (1 << DIGITS)), (1 << DIGITS) - 1)

"""The cells that a checkpoint is applied to: an input that pack reads, or a shard set, as batches.

    SourceCells   rows of a matrix -> tokens -> members -> Batch (nothing masked)
    ShardCells    the splits of a shard set through a CellLoader, in the order of the shards

Both hold a block of cells at a time and can begin at any cell. Called by applying.apply.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.applying.options import EmbedOptions
from scshards.applying.output import copy_of, file_of_shards, file_of_source
from scshards.base.config import build
from scshards.base.errors import CheckpointError, ConfigError, SourceError
from scshards.base.storage import Storage
from scshards.cells.batch import Batch, key_text
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.model.classes import DOMAINS, LabelNames, read_names
from scshards.model.scgpt import LoadedModel
from scshards.packing.labels import Label, read_label
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import MANIFEST, LabelInfo
from scshards.shards.members import pack_block
from scshards.shards.shardset import ShardSet
from scshards.sources.anndata import AnnDataSource
from scshards.sources.genes import NamedMatch, match_source
from scshards.sources.ids import GENE_VOCAB
from scshards.sources.inputs import InputFile
from scshards.sources.open import open_source
from scshards.sources.options import GENES_ALONE
from scshards.sources.rows import Source, missing_column
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.lead_tokens import LeadTokens
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.loader import CellLoader
from scshards.streaming.read.options import ReadOptions
from scshards.streaming.read.source import CellBytes
from scshards.training.micro import cells_of

ALL = "all"
"""Names all splits of a shard set."""

DOMAIN = "domain"
"""The label of batches that holds the model's domain codes, where it needs them."""

_OWN = (
    "tie_break", "include_zero_genes", "values", "target_sum", "cls_value", "keep_first", "conditions",
)  # fmt: skip
"""What runs of ours keep of a cell's look that scGPT has no word for."""

Members = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Encoded cells one behind another, and the size of each."""


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a model wants to be given: what a checkpoint, and who applies it, say of how cells are read.

    Attributes
    ----------
    vocab
        The model's.
    collate
        How the model was trained to see cells, with nothing hidden.
    domains
        What the model's domains are called, when it needs to know them.
    options, storage_options
        Which cells and genes, and how they are reached.
    """

    vocab: Vocab
    collate: CollateOptions
    domains: LabelNames | None
    options: EmbedOptions
    storage_options: Mapping[str, Any] | None

    @classmethod
    def of(
        cls,
        checkpoint: str,
        loaded: LoadedModel,
        options: EmbedOptions,
        storage_options: Mapping[str, Any] | None,
    ) -> ModelInput:
        """Of a checkpoint that was loaded.

        Raises
        ------
        CheckpointError
            When args.json or domains.json say what can't be.
        ConfigError
            For a `max_length` that the options give and that leaves no room, and a column of domains
            for a model that has none.
        """
        config, domains = loaded.model.config, None
        if not config.domain_norm:
            if options.domain_column is not None:
                raise ConfigError(
                    "this model does not look at domains", advice="leave --domain-column out"
                )
        else:
            domains = read_names(checkpoint, DOMAINS, storage_options)
            if len(domains) != config.n_domains:
                raise CheckpointError(
                    f"domains.json names {len(domains)} domains, and the model has "
                    f"{config.n_domains}",
                    where=checkpoint,
                )
        return cls(
            vocab=Vocab.from_dict(loaded.vocab, where=checkpoint),
            collate=_collate_options(loaded.args, options),
            domains=domains,
            options=options,
            storage_options=storage_options,
        )

    @property
    def domain_column(self) -> str | None:
        """The column of obs with the domains; None where the model needs none."""
        return None if self.domains is None else self.options.domain_column or self.domains.column


class Cells(abc.ABC):
    """What applying.apply asks of an input; a context manager.

    Attributes
    ----------
    parts
        How many cells each part has; the parts lie one behind another.
    columns, matched
        Gene columns (of a shard set: tokens), and those that the model's vocabulary has.
    gene_column
        The column of var that names the genes, "index" for its index; None of a shard set.
    """

    name: str
    parts: tuple[int, ...]
    columns: int
    matched: int
    gene_column: str | None = None

    @abc.abstractmethod
    def batches(self, part: int, begin: int, end: int, size: int) -> Iterator[Batch]:
        """The cells begin:end of a part, in order, `size` at a time, on the CPU."""

    @abc.abstractmethod
    def label(self, column: str) -> Label:
        """A column of obs as categories, of all cells in order; SourceError when there is none."""

    @abc.abstractmethod
    def new_file(self, path: Path) -> None:
        """The output, without results."""

    @abc.abstractmethod
    def at(self, key: int) -> str:
        """Where a cell of a batch is, by its key, for errors."""

    def close(self) -> None:  # noqa: B027  # most have nothing open
        """Close what was opened."""


def is_shard_set(url: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether an address is the root of a shard set."""
    storage = Storage(url, storage_options)
    # scBank's folders have a manifest.json too.
    return storage.exists(MANIFEST) and not storage.exists(GENE_VOCAB)


class SourceCells(Cells):
    """The cells of an h5ad file, a zarr store, a 10x file or an mtx folder.

    Parameters
    ----------
    scratch
        A folder that is not there yet, for what has to be written before rows can be read; the same
        on all ranks.

    Raises
    ------
    SourceError
        When the input can't be used, has no cells, or too few of its genes have a token; when two of
        its columns name genes, and not the same.
    """

    def __init__(self, file: InputFile, wants: ModelInput, scratch: Path) -> None:
        options, collate, url = wants.options, wants.collate, file.url
        if options.split is not None:
            raise ConfigError("only a shard set has splits", where=url, advice="leave --split out")
        if collate.conditions:
            named = ",".join(collate.conditions)
            raise SourceError(
                f"the model is told {named} of each cell, by the categories of a shard set's labels",
                where=url,
                advice=f"give a shard set that was packed with --obs {named}",
            )
        self._url, self._storage_options = url, wants.storage_options
        self._source = open_source(
            url,
            name=file.name,
            gene_column=file.gene_column or options.gene_column,
            layer=options.layer,
            raw=options.raw,
            storage_options=wants.storage_options,
            scratch=scratch,
            ids_vocab=options.ids_vocab,
            list_columns=options.list_columns,
            trust_pickle=options.trust_pickle,
            feature_types=options.feature_types,
        )
        try:
            self.name, self.parts = self._source.name, (self._source.n_rows,)
            self.columns = self._source.n_columns
            match = _matched(self._source, wants.vocab, options)
            self._match, self.gene_column = match.match, match.column
            self.matched = self._match.matched
            self._kind = _kind(self._source, collate)
            self._collator = Collator(collate, wants.vocab, self._kind, options.seed)
            self._domains = None
            if wants.domains is not None and (column := wants.domain_column):
                label, where = self.label(column), f"{self.name}: obs, column {column!r}"
                used = np.unique(label.values)
                self._domains = _domain_table(label.categories, used, wants.domains, where)[
                    label.values
                ]
            if self._source.needs_transposing:
                self._source.transpose()
        except BaseException:
            self._source.close()
            raise

    def batches(self, part: int, begin: int, end: int, size: int) -> Iterator[Batch]:
        assert part == 0, "a source is one part"
        key = begin
        for data, sizes in regrouped(self._members(begin, end), size):
            keys = np.arange(key, key + len(sizes), dtype=np.int64)
            starts = np.cumsum(sizes) - sizes
            no_labels = np.zeros((len(sizes), 0), np.int64)
            cells = CellBytes(data, starts, sizes, keys, no_labels)
            (batch,) = self._collator.collate(cells, epoch=0)
            assert isinstance(batch, Batch), "objective='none' makes another kind of batch"
            if self._domains is not None:
                codes = torch.from_numpy(self._domains[keys])
                batch = dataclasses.replace(batch, labels={DOMAIN: codes})
            yield batch
            key += len(sizes)

    def label(self, column: str) -> Label:
        where = f"{self.name}: obs, column {column!r}"
        return read_label(self._source.obs(column), where=where).as_category()

    def new_file(self, path: Path) -> None:
        if isinstance(self._source, AnnDataSource) and self._source.is_hdf5:
            copy_of(self._url, path, self._storage_options)
        else:
            file_of_source(path, self._source)

    def at(self, key: int) -> str:
        return f"{self._url}, row {key}"

    def close(self) -> None:
        self._source.close()

    def _members(self, begin: int, end: int) -> Iterator[Members]:
        for block in self._source.blocks(begin, end):
            data, ends = pack_block(
                block.indptr,
                block.indices,
                block.data,
                self._match,
                self._kind,
                first_row=block.first_row,
                where=f"{self._source.name}, {self._source.matrix_name}",
            )
            yield data, np.diff(ends, prepend=np.int64(0)).astype(np.int64)


class ShardCells(Cells):
    """The cells of a shard set, one split behind another.

    Raises
    ------
    ConfigError
        When there is no such split, or for options that only other inputs have.
    CheckpointError
        When the shards hold tokens that the model's vocabulary lacks.
    """

    def __init__(self, url: str, wants: ModelInput) -> None:
        options, collate = wants.options, wants.collate
        self._url, self._wants = url, wants
        self._shardset = ShardSet(url, wants.storage_options)
        self.name = self._shardset.storage.at("")
        choices = ("gene_column", "strip_versions", "layer", "raw", "ids_vocab", "trust_pickle")
        others = [n for n in choices if getattr(options, n)]
        others += ["feature_types"] if options.feature_types != GENES_ALONE else []
        if others:
            raise ConfigError(
                f"a shard set has no such choice: {', '.join(others)}", where=self.name
            )
        manifest = self._shardset.manifest
        all_splits = [s for s, shards in manifest.splits.items() if shards]
        self._splits = all_splits if options.split in (None, ALL) else [str(options.split)]
        for split in self._splits:
            self._shardset.shards(split)  # refuses what is none, naming those that there are
        if manifest.value_kind == "float" and not collate.has_bins:
            raise SourceError(
                "the model was trained on counts as they are, and these shards hold fractions",
                where=self.name,
                advice="pack the counts",
            )
        self.parts = tuple(manifest.cells(s) for s in self._splits)
        theirs = LeadTokens(self._shardset.vocab, collate.conditions, manifest.labels).vocab
        self._tokens = _token_table(theirs, wants.vocab, self.name)
        self.columns = self.matched = len(self._shardset.vocab)
        column = wants.domain_column
        if column is not None and self._info(column).kind == "number":
            raise ConfigError(
                f"the label {column!r} holds numbers, and domains have names", where=self.name
            )

    def batches(self, part: int, begin: int, end: int, size: int) -> Iterator[Batch]:
        loader = CellLoader(
            self._url,
            split=self._splits[part],
            batch_size=size,
            seed=self._wants.options.seed,
            rank=0,
            world_size=1,
            shuffle=False,
            drop_last=False,
            collate=self._wants.collate,
            read=ReadOptions(lanes=1, storage_options=self._wants.storage_options),
        )
        loader.load_state_dict(loader.state_dict() | {"position": begin})
        stream = iter(loader)
        try:
            while begin < end:
                batch = cells_of(next(stream), slice(0, min(size, end - begin)))
                if self._tokens is not None:
                    batch = dataclasses.replace(batch, genes=self._tokens[batch.genes.long()])
                yield self._with_domains(batch)
                begin += len(batch)
        finally:
            stream.close()

    def _with_domains(self, batch: Batch) -> Batch:
        domains, column = self._wants.domains, self._wants.domain_column
        if domains is None or column is None:
            return batch
        codes = batch.labels[column].numpy()
        where = f"{self.name}, label {column!r}"
        table = _domain_table(self._info(column).categories, np.unique(codes), domains, where)
        return dataclasses.replace(batch, labels={DOMAIN: torch.from_numpy(table[codes])})

    def label(self, column: str) -> Label:
        name, info = OBS_PREFIX + column, self._info(column)
        of_splits = (self._shardset.manifest.splits[split] for split in self._splits)
        parts = [self._shardset.index(s, [name])[name] for shards in of_splits for s in shards]
        return Label(
            kind=info.kind, values=np.concatenate(parts), categories=tuple(info.categories)
        ).as_category()

    def new_file(self, path: Path) -> None:
        file_of_shards(path, self._shardset, self._splits)

    def at(self, key: int) -> str:
        return f"{self._url}, cell {key_text(key)}"

    def _info(self, column: str) -> LabelInfo:
        labels = self._shardset.manifest.labels
        if column not in labels:
            raise missing_column(column, list(labels), frame="the shard set", where=self.name)
        return labels[column]


def regrouped(members: Iterator[Members], size: int) -> Iterator[Members]:
    """The same members, `size` at a time; the last are as many as are left."""
    data, sizes = np.zeros(0, np.uint8), np.zeros(0, np.int64)
    for more, more_sizes in members:
        data, sizes = np.concatenate((data, more)), np.concatenate((sizes, more_sizes))
        ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
        whole = len(sizes) // size * size
        for i in range(0, whole, size):
            yield data[ends[i] : ends[i + size]], sizes[i : i + size]
        data, sizes = data[ends[whole] :], sizes[whole:]
    if len(sizes):
        yield data, sizes


def _collate_options(args: Mapping[str, Any], options: EmbedOptions) -> CollateOptions:
    """How the model of these args.json was trained to see cells, with nothing hidden."""
    binned = args.get("input_style", "binned") == "binned"
    settings: dict[str, Any] = {
        "max_length": options.max_length or args.get("max_seq_len", 1200),
        "n_bins": args.get("n_bins", 51) if binned else 0,
        "pad_value": float(args.get("pad_value", -2)),
        "mask_value": float(args.get("mask_value", -1)),
        "objective": "none",
    }
    own: Any = args
    for name in ("scshards", "config", "data"):
        own = own.get(name) if isinstance(own, Mapping) else None
    if isinstance(own, Mapping):
        settings |= {k: own[k] for k in _OWN if k in own}
    try:
        return build(CollateOptions, settings, "args.json")
    except ConfigError as e:
        if options.max_length is not None:
            raise
        raise CheckpointError(f"args.json can't be used: {e.what}", where=e.where) from None


def _matched(cells: Source, vocab: Vocab, options: EmbedOptions) -> NamedMatch:
    """As pack matches them, but that one gene has to be known, whatever `min_match` is."""
    if not cells.n_rows:
        raise SourceError("the input has no cells", where=cells.name)
    return match_source(
        cells,
        vocab,
        cells.gene_column,
        strip_versions=options.strip_versions,
        min_match=max(options.min_match, 1 / max(cells.n_columns, 1)),
    )


def _kind(cells: Source, options: CollateOptions) -> ValueKind:
    """Counts when the matrix holds whole numbers. Bins go by rank, so they take fractions too."""
    values = cells.sample(1 << 16)
    whole = values.dtype.kind in "iub" or bool((values == np.floor(values)).all())
    if not whole and not options.has_bins:
        raise SourceError(
            "the model was trained on counts as they are, and this matrix holds fractions",
            where=f"{cells.name}, {cells.matrix_name}",
            advice="choose the matrix that holds counts with --layer NAME or --raw",
        )
    return "counts" if whole else "float"


def _domain_table(
    categories: Sequence[str], used: NDArray[Any], domains: LabelNames, where: str
) -> NDArray[np.int64]:
    """The model's code of each category that is used; SourceError for one that it does not know."""
    code = {name: i for i, name in enumerate(domains.names)}
    table = np.full(len(categories) + 1, -1, np.int64)
    for i in used.tolist():
        if i < 0 or categories[i] not in code:
            what = "a cell without a domain" if i < 0 else f"the domain {categories[i]!r}"
            raise SourceError(
                f"{what} can't be embedded: the model normalises its input by domain, and knows "
                f"{', '.join(domains.names[:5])}{', ...' if len(domains) > 5 else ''}",
                where=where,
                advice="name the obs column with the model's domains with --domain-column",
            )
        table[i] = code[categories[i]]
    return table


def _token_table(shards: Vocab, model: Vocab, where: str) -> torch.Tensor | None:
    """int32 [tokens of the shards]: the model's id of each; None where they are the same."""
    theirs, ours = shards.to_dict(), model.to_dict()
    if theirs == ours:
        return None
    missing = [token for token in theirs if token not in ours]
    if missing:
        raise CheckpointError(
            f"{len(missing):,} of the {len(theirs):,} tokens of these shards are not in the model's "
            f"vocabulary: {', '.join(missing[:5])}",
            where=where,
            advice="pack the cells with --vocab CHECKPOINT/vocab.json, or give the h5ad files "
            "instead: there, genes without a token are left out",
        )
    table = torch.empty(len(theirs), dtype=torch.int32)
    for token, i in theirs.items():
        table[i] = ours[token]
    return table

"""Look at one input before anything is packed: does it fit, and which of its cells are kept?

    survey(SurveyTask) -> Survey        and, in the scratch folder, arrays that the tasks of pass 1 read:
                                        tokens.npy, split.npy, label-0.npy, ..., unique.bin

and of shard sets whose order is kept, keys-0.npy, ...: the sorted keys of each split. Every refusal that
can be known without reading the whole matrix is raised here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scshards.base import where
from scshards.base.errors import (
    ConfigError,
    FormatError,
    SourceError,
)
from scshards.base.files import publish_array, scratch_writes
from scshards.base.storage import Storage, redact
from scshards.cells.tokenizer import GeneMatch
from scshards.cells.vocab import Vocab
from scshards.census.address import is_soma
from scshards.packing import plan
from scshards.packing.labels import Label, LabelSurvey, check_size, read_label
from scshards.packing.marks import SPLIT, source_folder
from scshards.packing.options import PackOptions, ReshardOptions
from scshards.packing.unique import dropped_reason, write_hashes
from scshards.packing.values import check_values, matrix_advice, rounding_advice
from scshards.shards.manifest import SourceInfo
from scshards.sources.genes import NamedMatch, match_source
from scshards.sources.inputs import InputFile
from scshards.sources.open import input_identity, open_source
from scshards.sources.rows import INDEX, SOURCE, Source, reading
from scshards.sources.shardset import ShardRun, ShardSource

ANOTHER_SPLIT, WHERE = "in another split", "where"
_REASONS = ("fewer than {} genes", "more than {} genes", "fewer than {} counts")
"""Why a cell is left out, in the order of the codes of kernels.rows."""

KEYS = "keys-{}.npy"
"""The file of the sorted keys of a split's cells."""

AnyInput = InputFile | ShardRun

BAD = (SourceError, FormatError)
"""What an input is refused for that is itself at fault, and not a disk, a store or an option."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What all tasks of a job share.

    Attributes
    ----------
    folder
        The scratch folder, which holds vocab.json.
    fingerprint
        Of the vocabulary.
    options
        Of the set that is written.
    splits
        Its splits, in the order of their codes.
    reshard
        What is asked for where it is made of other sets; None when it is packed.
    apart
        Labels of these sets of which no value may be in two splits.
    """

    folder: str
    fingerprint: str
    options: PackOptions
    splits: tuple[str, ...]
    reshard: ReshardOptions | None = None
    apart: tuple[str, ...] = ()

    @property
    def keeps_splits(self) -> bool:
        """Whether every cell stays in the split of the set that it is from."""
        return self.reshard is not None and self.reshard.keeps_splits

    @property
    def group_by(self) -> tuple[str, ...]:
        """The labels by which cells are sorted."""
        return () if self.reshard is None else self.reshard.group_by or ()

    @property
    def keeps_order(self) -> bool:
        """Whether cells come in the order of their keys, which is not that of the inputs."""
        return self.reshard is not None and not self.options.shuffle


@dataclass(frozen=True, kw_only=True, slots=True)
class SurveyTask:
    """One input to look at, and its number."""

    file: AnyInput
    ordinal: int
    work: Work


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySurvey:
    """What an array of one input is, as of ArrayInfo; no dtype where the kind of values decides."""

    kind: Literal["dense", "sparse"]
    dtype: str
    width: int
    columns: tuple[str, ...] | None
    source: Literal["obsm", "feature_type"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What packing.pack must know of one input; of one that is left out nothing beyond `info`.

    Attributes
    ----------
    ordinal, n_values, needs_transposing, tiles
        As the source says.
    info
        What the manifest is to say of the input; what becomes of its cells is not known yet.
    identity
        What tells this state of the input from another; see Storage.identity.
    has_source
        Whether obs has a column SOURCE of its own.
    cells
        Cells of each split, before any is dropped for its genes, or because another input has it.
    dropped
        (source, reason, cells) so far.
    labels
        The columns of `options.labels`.
    apart
        {label: its values in each split}, of those that must be apart.
    fraction
        The value that is furthest from whole numbers; None when all that were seen are whole numbers.
    is_empty
        Whether no value was seen that is not zero.
    is_log1p
        Whether the file says that it is log-normalised.
    advice
        What to do when counts are wanted and there are fractions.
    arrays
        {name: what it is}, of the arrays that are kept beside the genes.
    seconds
        That the survey took.
    """

    ordinal: int
    info: SourceInfo
    identity: dict[str, Any]
    n_values: int
    needs_transposing: bool
    tiles: tuple[int, int]
    has_source: bool
    cells: tuple[int, ...]
    dropped: tuple[tuple[int, str, int], ...]
    labels: tuple[LabelSurvey, ...]
    apart: dict[str, list[list[str]]]
    fraction: float | None
    is_empty: bool
    is_log1p: bool
    advice: str
    arrays: dict[str, ArraySurvey]
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.info.name


def survey(task: SurveyTask) -> Survey:
    """Look at one input; one that can't be used is a survey of no cells where it is to be left out.

    Raises
    ------
    SourceError
        When too few genes match, a column is missing or not a label, or the file is damaged.
    ValueKindError
        When a negative, NaN or infinite value is seen.
    ConfigError
        When `where` does not fit, or cells have no value of `split_by` or `unique`.
    """
    identity = identity_of(task.file, task.work.options)
    try:
        return _survey(task, identity)
    except BAD as e:
        if task.work.options.on_bad_input == "refuse":
            raise
        return Survey(
            ordinal=task.ordinal, info=_info(task.file, identity, skipped=e.what), identity=identity,
            n_values=0, needs_transposing=False, tiles=(0, 1), has_source=False,
            cells=(), dropped=(), labels=(), apart={}, fraction=None, is_empty=True, is_log1p=False,
            advice="", arrays={},
        )  # fmt: skip


def _survey(task: SurveyTask, identity: dict[str, Any]) -> Survey:
    work, options = task.work, task.work.options
    with open_input(task.file, task.ordinal, work) as source:
        named = _match(source, task.file, work)
        match = named.match
        kept, dropped = _kept(source, work)
        labels = {name: _label(source, name).only(kept) for name in options.labels}
        if not isinstance(source, ShardSource):
            for name, label in labels.items():
                check_size(name, label.categories, options.max_categories, where=source.name)
        split = _split(source, kept, labels, work)
        fraction, off, is_empty = None, None, False
        if not isinstance(source, ShardSource):  # whose values were looked at when they were packed
            fraction, off, is_empty = check_values(source, kept, options.round_within)
        folder = _folder(task)
        if options.unique is not None:
            column = source.column(options.unique)
            again = write_hashes(folder, column, split, name=source.name, column=options.unique)
            dropped += _by_source(source, again, dropped_reason(options))
            split[again] = plan.DROPPED
        for name, array in _arrays(source, match, labels, split, work):
            publish_array(folder / name, array, is_last=False)
        advice = "pack a file with counts, or keep the values as they are with --values float"
        return Survey(
            ordinal=source.ordinal,
            info=_info(
                task.file,
                identity,
                rows=source.n_rows,
                columns=source.n_columns,
                matched=match.matched,
                unmatched=match.unmatched,
                merged=match.merged,
                left_out=dict(source.left_out),
                gene_column=named.column,
                n_values=source.n_values,
                cells="" if isinstance(source, ShardSource) else source.cells_hash(),
            ),
            identity=identity,
            n_values=source.n_values,
            needs_transposing=source.needs_transposing,
            tiles=source.tiles,
            has_source=SOURCE in source.obs_columns,
            cells=tuple(int((split == code).sum()) for code in range(len(work.splits))),
            dropped=tuple(dropped),
            labels=tuple(
                label.survey(as_text=options.held_out is not None and name == options.split_by)
                for name, label in labels.items()
            ),
            apart={name: labels[name].by_split(split, len(work.splits)) for name in work.apart},
            fraction=fraction,
            is_empty=is_empty,
            is_log1p=source.is_log1p,
            advice="" if off is None else rounding_advice(off) + matrix_advice(source, advice),
            arrays=_arrays_beside(source),
        )


def _arrays_beside(source: Source) -> dict[str, ArraySurvey]:
    """What the arrays of an open input are."""
    found: dict[str, Any] = dict(source.beside)
    if isinstance(source, ShardSource):
        found = {name: source.run.arrays[name] for name in source.run.wanted}
    return {
        name: ArraySurvey(
            kind=a.kind, dtype=a.dtype, width=a.width, columns=a.columns, source=a.source
        )
        for name, a in found.items()
    }


def _folder(task: SurveyTask) -> Path:
    """Where what the decision and pass 1 need of an input is left."""
    folder = source_folder(task.work.folder, task.ordinal)
    with scratch_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _info(
    file: AnyInput, identity: Mapping[str, Any], *, n_values: int = 0, cells: str = "", **more: Any
) -> SourceInfo:
    """What the manifest says of an input before it is packed; `cells` is its Source.cells_hash."""
    state = {name: value for name, value in identity.items() if name != "ids_vocab"}
    told = {} if isinstance(file, ShardRun) else {"at": place_of(file), **state, "values": n_values}
    names = "rows kept columns matched unmatched merged values unmatched_values bytes"
    counts = dict.fromkeys(names.split(), 0)
    return SourceInfo(
        **{"name": file.name, "dropped": {}, "gene_column": "", **counts, **more},
        identity=told | ({"cells": cells} if cells else {}),
    )


def place_of(file: InputFile) -> str:
    """The address of an input, without what is secret in it."""
    # The query of a SOMA address says which cells, and is no secret.
    return file.url if is_soma(file.url) else redact(file.place)


def open_input(
    file: AnyInput, ordinal: int, work: Work, identity: Mapping[str, Any] | None = None
) -> Source:
    """Open an input as the options say, with its place in the pack's scratch folder.

    Parameters
    ----------
    identity
        What the survey found the input to be; None while it is surveyed.

    Raises
    ------
    SourceError
        Also when it is not the file that was surveyed.
    """
    options = work.options
    if isinstance(file, ShardRun):
        return ShardSource(file, ordinal, options.storage_options)
    if identity is not None and identity != identity_of(file, options):
        raise SourceError(
            "the input has changed since this pack began",
            where=file.name,
            advice="put the old file back, or add --restart to throw away what was packed",
        )
    return open_source(
        file.url,
        ordinal,
        name=file.name,
        gene_column=file.gene_column or options.gene_column,
        layer=options.layer,
        raw=options.raw,
        storage_options=options.storage_options,
        scratch=source_folder(work.folder, ordinal) / "transposed",
        ids_vocab=options.ids_vocab,
        list_columns=options.list_columns,
        trust_pickle=options.trust_pickle,
        feature_types=options.feature_types,
        obsm=options.obsm,
        feature_arrays=options.feature_arrays,
    )


def limit_reasons(options: PackOptions) -> tuple[str, ...]:
    """Why cells are left out by `min_genes`, `max_genes` and `min_counts`, in words."""
    limits = (options.min_genes, options.max_genes, options.min_counts)
    shown = (str(limit).removesuffix(".0") for limit in limits)
    return tuple(reason.format(limit) for reason, limit in zip(_REASONS, shown, strict=True))


def identity_of(file: AnyInput, options: PackOptions) -> dict[str, Any]:
    """What tells this state of an input, read as the options say, from another, ready for JSON."""
    if isinstance(file, ShardRun):
        return {}  # every shard and index is checked when it is read
    identity = input_identity(file.url, options.storage_options)
    if options.ids_vocab is not None:
        identity["ids_vocab"] = Storage(options.ids_vocab, options.storage_options).identity()
    return identity


def _kept(source: Source, work: Work) -> tuple[NDArray[np.bool_], list[tuple[int, str, int]]]:
    """Which cells are kept, and (source, reason, cells) of the others."""
    kept = np.ones(source.n_rows, np.bool_)
    dropped: list[tuple[int, str, int]] = []
    for reason, mask in _masks(source, work):
        rows = np.flatnonzero(kept & ~mask)
        kept &= mask
        dropped += _by_source(source, rows, reason)
    return kept, dropped


def _by_source(source: Source, rows: NDArray[Any], reason: str) -> Iterator[tuple[int, str, int]]:
    """(source, reason, cells) of some rows."""
    first, n_sources = source.sources
    if n_sources == 1:
        counts = [len(rows)]
    else:
        sources = plan.split_keys(source.keys(0, source.n_rows))[0][rows] - first
        counts = np.bincount(sources, minlength=n_sources).tolist()
    return ((first + i, reason, n) for i, n in enumerate(counts) if n)


def _masks(source: Source, work: Work) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """(why cells are left out, which are not), in the order in which they are asked."""
    options = work.options
    if isinstance(source, ShardSource) and work.reshard is not None and work.reshard.splits:
        yield ANOTHER_SPLIT, source.in_splits(work.reshard.splits) >= 0
    if options.where is not None:
        expression = where.parse(options.where)
        columns = {}
        for column in expression.columns:
            try:
                columns[column] = source.column(column)
            except SourceError as e:
                # A name that is in no column is a mistake in the expression.
                raise ConfigError(e.what, where=f"{e.where}: --where", advice=e.advice) from None
        yield WHERE, expression.mask(columns, source.n_rows, where=source.name)


def _match(source: Source, file: AnyInput, work: Work) -> NamedMatch:
    if isinstance(file, ShardRun):
        n = source.n_columns
        match = GeneMatch(tokens=np.arange(n, dtype=np.int32), n_tokens=n)
        return NamedMatch(column=INDEX, names=(), match=match)
    options = work.options
    return match_source(
        source,
        _vocab(work.folder, work.fingerprint),
        file.gene_column or options.gene_column,
        strip_versions=options.strip_versions,
        min_match=options.min_match,
    )


def _arrays(
    source: Source,
    match: GeneMatch,
    labels: Mapping[str, Label],
    split: NDArray[np.int8],
    work: Work,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """What pass 1 and the decision need, by name."""
    yield "tokens.npy", match.tokens
    yield SPLIT, split
    for i, label in enumerate(labels.values()):
        yield f"label-{i}.npy", label.values
    if work.keeps_order:
        keys = source.keys(0, source.n_rows)
        for code in range(len(work.splits)):
            yield KEYS.format(code), np.sort(keys[split == code])


def _label(source: Source, column: str) -> Label:
    where = f"{source.name}: obs, column {column!r}"
    with reading(where):
        return read_label(source.column(column), where=where)


def _split(
    source: Source, kept: NDArray[np.bool_], labels: Mapping[str, Label], work: Work
) -> NDArray[np.int8]:
    options = work.options
    if work.keeps_splits:
        assert isinstance(source, ShardSource)
        split = source.in_splits(work.splits)
    elif options.split_by is None:
        keys = source.keys(0, source.n_rows)
        split = plan.split_cells(options.seed, options.valid_fraction, options.test_fraction, keys)
    else:
        label = labels[options.split_by].as_category()
        n_missing = int((label.missing & kept).sum())
        if n_missing:
            raise ConfigError(
                f"{n_missing:,} cells have no value of {options.split_by!r}, so no split",
                where=source.name,
                advice=f"drop them with --where '`{options.split_by}` == `{options.split_by}`' "
                "(true where there is a value)",
            )
        texts, held_out = label.categories, options.held_out
        of_value = (
            plan.split_values(options.seed, options.valid_fraction, options.test_fraction, texts)
            if held_out is None
            else plan.split_listed(held_out, texts)
        )
        split = np.append(of_value, np.int8(plan.DROPPED))[label.values]
    return np.where(kept, split, plan.DROPPED).astype(np.int8)


@functools.lru_cache(maxsize=1)
def _vocab(folder: str, fingerprint: str) -> Vocab:
    """The pack's vocabulary, which a process reads once for all of its surveys."""
    vocab = Vocab.load(Path(folder) / "vocab.json")
    assert vocab.fingerprint == fingerprint
    return vocab

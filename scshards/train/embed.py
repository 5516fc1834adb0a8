"""Cell embeddings of an h5ad file: the file once more, with `obsm["X_scshards"]` in it.

    rows of the file -> tokens -> members -> Batch (nothing masked) -> model -> position 0, normalised

The matrix streams through in blocks; the output is a copy of the input's bytes plus one array. Called
by `scshards embed`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.base.config import build
from scshards.base.errors import (
    CheckpointError,
    ConfigError,
    OutputExistsError,
    SourceError,
    StorageError,
)
from scshards.base.progress import Progress
from scshards.base.storage import Storage, is_local
from scshards.cells.batch import Batch
from scshards.cells.tokenizer import GeneMatch, ValueKind, match_genes, tokenize_rows
from scshards.cells.vocab import Vocab
from scshards.model.scgpt import LoadedModel, load_model
from scshards.pack.sources import open_source
from scshards.pack.sources_base import Source
from scshards.pack.sources_h5ad import H5ad
from scshards.shards.codec import encode_rows
from scshards.stream.collate import Collator
from scshards.stream.collate_options import CollateOptions
from scshards.train.setup import Ranks, ranks

OBSM_KEY = "X_scshards"


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How a file is embedded.

    Attributes
    ----------
    gene_column, layer, raw
        Which names and which matrix of the file, as in pack.
    batch_size
        Cells in a forward pass.
    max_length
        Tokens of a cell; None takes the checkpoint's `max_seq_len`.
    min_match
        The share of the file's gene columns that the vocabulary must have.
    seed
        Of the sample of genes in cells longer than `max_length`, keyed by the cell's row.
    key
        The name in obsm.
    device, precision
        As in training.
    """

    gene_column: str | None = None
    layer: str | None = None
    raw: bool = False
    batch_size: int = 64
    max_length: int | None = None
    min_match: float = 0.5
    seed: int = 0
    key: str = OBSM_KEY
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is at least 1, not {self.batch_size}")
        if self.layer is not None and self.raw:
            raise ConfigError("a layer and raw are two matrices", advice="choose one of them")


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What was embedded: cells, dimensions, gene columns with a token, cells without any gene."""

    output: str
    key: str
    cells: int
    dimensions: int
    columns: int
    matched: int
    empty_cells: int
    seconds: float

    def tables(self) -> dict[str, Any]:
        return asdict(self)


def embed(
    checkpoint: str,
    source: str,
    output: str | os.PathLike[str],
    options: EmbedOptions | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> EmbedReport:
    """Write a copy of an h5ad file with the embedding of every cell in `obsm`.

    As in scGPT's `embed_data`, a cell's embedding is the encoder's output at `<cls>`, divided by its
    Euclidean norm: float32 [cells, d_model]. Long cells are sampled by a draw keyed by seed and row,
    so the result does not depend on batches or order.

    Parameters
    ----------
    checkpoint
        A run's folder, or any folder in scGPT's layout.
    source
        The h5ad file: a local path or an fsspec URL.
    output
        A local path that does not exist yet.

    Raises
    ------
    OutputExistsError, SourceError, CheckpointError, ConfigError
        Before anything is written.
    """
    options = options or EmbedOptions()
    target = Path(output)
    if not is_local(os.fspath(output)):
        raise ConfigError("the output of embed is a local file", where=os.fspath(output))
    if target.exists():
        raise OutputExistsError(
            "the output exists already", where=target, advice="remove it, or choose another name"
        )
    loaded = load_model(checkpoint, storage_options)
    with (
        ranks(options.device, options.precision) as here,
        open_source(
            source,
            gene_column=options.gene_column,
            layer=options.layer,
            raw=options.raw,
            storage_options=storage_options,
        ) as cells,
    ):
        if here.world_size > 1:
            raise ConfigError("embed runs in one process", advice="start it without torchrun")
        if not isinstance(cells, H5ad):
            raise SourceError(
                "embed writes a copy of an h5ad file, and this input is none",
                where=cells.name,
                advice="write it as h5ad with anndata or scanpy first",
            )
        vocab = Vocab.from_dict(loaded.vocab, where=checkpoint)
        match = _matched(cells, vocab, options)
        with Progress("embed", cells.n_rows, "cells", shown=shown) as progress:
            vectors, empty = _embed(loaded, vocab, cells, match, options, here, progress)
        _write(source, target, options.key, vectors, storage_options)
        return EmbedReport(
            output=str(target),
            key=options.key,
            cells=cells.n_rows,
            dimensions=vectors.shape[1],
            columns=cells.n_columns,
            matched=match.matched,
            empty_cells=empty,
            seconds=progress.seconds,
        )


def _matched(cells: Source, vocab: Vocab, options: EmbedOptions) -> GeneMatch:
    match = match_genes(cells.genes, vocab)
    if match.matched < options.min_match * cells.n_columns or not match.matched:
        raise SourceError(
            f"{match.matched:,} of {cells.n_columns:,} gene columns are in the model's vocabulary",
            where=cells.name,
            advice="not found: "
            + ", ".join(match.unmatched_names[:5])
            + "; choose the column with the gene names by --gene-column"
            + (f" ({', '.join(cells.gene_columns)})" if cells.gene_columns else "")
            + ", or lower --min-match",
        )
    return match


def _embed(
    loaded: LoadedModel,
    vocab: Vocab,
    cells: Source,
    match: GeneMatch,
    options: EmbedOptions,
    here: Ranks,
    progress: Progress,
) -> tuple[NDArray[np.float32], int]:
    """float32 [cells, D] of unit length, and how many cells had no gene in the vocabulary."""
    collate_options = _collate_options(loaded.args, options)
    kind = _kind(cells, collate_options)
    collator = Collator(collate_options, vocab, kind, options.seed)
    model = loaded.model.to(here.device).eval()
    out = np.empty((cells.n_rows, model.config.d_model), np.float32)
    empty = 0
    with torch.inference_mode(), here.autocast():
        for first, block in _members(cells, match, kind):
            data, starts, sizes, lengths = block
            empty += int((lengths == 0).sum())
            for i in range(0, len(starts), options.batch_size):
                rows = slice(i, i + options.batch_size)
                keys = np.arange(first + i, first + i + len(starts[rows]), dtype=np.int64)
                labels = np.zeros((len(keys), 0), np.int64)
                batch = collator.collate(data, starts[rows], sizes[rows], keys, labels, epoch=0)
                assert isinstance(batch, Batch), "objective='none' makes another kind of batch"
                batch = batch.to(here.device)
                vectors_BD = model.embed(batch)
                unit_BD = torch.nn.functional.normalize(vectors_BD.float(), dim=1)
                out[keys[0] : keys[-1] + 1] = unit_BD.cpu().numpy()
                progress.add(len(keys))
    return out, empty


def _members(
    cells: Source, match: GeneMatch, kind: ValueKind
) -> Iterator[tuple[int, tuple[NDArray[Any], ...]]]:
    """Blocks of members: (first row, (data, starts, sizes, genes of each))."""
    if cells.needs_transposing:
        cells.transpose()
    for block in cells.blocks():
        rows = tokenize_rows(
            block.indptr,
            block.indices,
            block.data,
            match,
            kind,
            first_row=block.first_row,
            where=f"{cells.name}, {cells.matrix_name}",
        )
        data, ends = encode_rows(rows)
        sizes = np.diff(np.concatenate((np.zeros(1, np.int64), ends)))
        yield block.first_row, (data, ends - sizes, sizes, np.diff(rows.indptr))


def _collate_options(args: Mapping[str, Any], options: EmbedOptions) -> CollateOptions:
    binned = args.get("input_style", "binned") == "binned"
    settings: dict[str, Any] = {
        "max_length": options.max_length or args.get("max_seq_len", 1200),
        "n_bins": args.get("n_bins", 51) if binned else 0,
        "pad_value": float(args.get("pad_value", -2)),
        "mask_value": float(args.get("mask_value", -1)),
        "objective": "none",
    }
    try:
        return build(CollateOptions, settings, "args.json")
    except ConfigError as e:
        raise CheckpointError(f"args.json can't be used: {e.what}", where=e.where) from None


def _kind(cells: Source, options: CollateOptions) -> ValueKind:
    """Counts when the matrix holds whole numbers. Bins go by rank, so they take fractions too."""
    values = cells.sample(1 << 16)
    whole = values.dtype.kind in "iub" or bool((values == np.floor(values)).all())
    if not whole and not options.n_bins:
        raise SourceError(
            "the model was trained on counts as they are, and this matrix holds fractions",
            where=f"{cells.name}, {cells.matrix_name}",
            advice="choose the matrix that holds counts with --layer NAME or --raw",
        )
    return "counts" if whole else "float"


def _write(
    source: str,
    target: Path,
    key: str,
    vectors: NDArray[np.float32],
    storage_options: Mapping[str, Any] | None,
) -> None:
    """Copy the file and add the array; the copy gets its name when it is whole."""
    import h5py
    from anndata.io import write_elem

    with _temporary(target) as path:
        with Storage(source, storage_options).open() as original, path.open("wb") as copy:
            shutil.copyfileobj(original, copy, 1 << 22)
        with h5py.File(path, "r+") as f:
            if "obsm" not in f:
                write_elem(f, "obsm", {})
            if not isinstance(f["obsm"], h5py.Group):
                raise SourceError(
                    "the file's obsm is of an old layout that can't be added to",
                    where=source,
                    advice="write the file again with a current anndata",
                )
            write_elem(f["obsm"], key, vectors)
        os.replace(path, target)  # noqa: PTH105


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A file beside the target that is gone afterwards, unless it was renamed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as e:
        raise StorageError(f"the output can't be written: {e.strerror}", where=target) from None
    os.close(handle)
    path = Path(name)
    try:
        path.chmod(0o644)
        yield path
    except OSError as e:
        raise StorageError(f"the output can't be written: {e}", where=target) from None
    finally:
        path.unlink(missing_ok=True)

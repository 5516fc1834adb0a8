"""Cell embeddings: `obsm["X_scshards"]` of the cells of h5ad files, zarr stores, shard sets.

Called by `scshards embed`, and by applying.annotate for what both need of a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from scshards.applying.apply import ApplyReport, Job, apply
from scshards.applying.options import OBSM_KEY as OBSM_KEY
from scshards.applying.options import EmbedOptions as EmbedOptions
from scshards.applying.output import Result
from scshards.base.config import build
from scshards.base.errors import CheckpointError, ConfigError
from scshards.cells.batch import Batch
from scshards.cells.vocab import Vocab
from scshards.model.classes import DOMAINS, LabelNames, read_names
from scshards.model.scgpt import LoadedModel, load_model
from scshards.ranks.ranks import ranks
from scshards.streaming.collate.options import CollateOptions


def embed(
    checkpoint: str,
    inputs: str | Sequence[str],
    output: str | os.PathLike[str],
    options: EmbedOptions | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> ApplyReport:
    """Write an h5ad file with the embedding of every cell in `obsm`.

    As in scGPT's `embed_data`, a cell's embedding is the model's cell embedding (of most models the
    encoder's output at `<cls>`), divided by its Euclidean norm: float32 [cells, d_model]. Long cells
    are sampled by a draw keyed by seed and cell. On CPU a cell's embedding is a function of the cell
    alone, and the file's bytes are the same on any number of processes and threads.

    Of an h5ad file the output is a copy. Of other inputs it has their obs (of a shard set: keys, split,
    source, row and labels), in their order, and no X.

    Parameters
    ----------
    checkpoint
        A run's folder, or any folder in scGPT's layout.
    inputs
        What pack reads (h5ad, zarr, 10x .h5, mtx folders; local or fsspec URLs; globs, folders and
        lists of them), and roots of shard sets.
    output
        A local path that does not exist yet, which all ranks see: for one input a file, for several a
        folder, where each has a file of its name.
    storage_options
        For the file systems of checkpoint and inputs.

    Raises
    ------
    OutputExistsError, SourceError, CheckpointError, ConfigError
        Nothing is at `output` then.
    """
    options = options or EmbedOptions()
    loaded = load_model(checkpoint, storage_options)
    with ranks(options.device, options.precision) as here:
        model = loaded.model.to(here.device).eval()

        def compute(batch: Batch, domains_B: Tensor | None) -> Tensor:
            return normalize(model.embed(batch, domains_B=domains_B).float(), dim=1)

        job = Job(
            label="embed",
            loaded=loaded,
            vocab=Vocab.from_dict(loaded.vocab, where=checkpoint),
            compute=compute,
            width=model.config.d_model,
            results=[embedding_result(options, model.config.d_model)],
            collate=collate_options(loaded.args, options),
            domains=model_domains(loaded, checkpoint, options, storage_options),
        )
        return apply(
            job, inputs, output, options, here, storage_options=storage_options, shown=shown
        )


def embedding_result(options: EmbedOptions, d_model: int) -> Result:
    """The embedding, in the first `d_model` columns of the rows that are computed."""
    return Result(
        frame="obsm", name=options.key, of=lambda rows: rows[:, :d_model], columns=d_model
    )


_OWN = (
    "tie_break", "include_zero_genes", "values", "target_sum", "cls_value", "keep_first", "conditions",
)  # fmt: skip
"""What runs of ours keep of a cell's look that scGPT has no word for."""


def collate_options(args: Mapping[str, Any], options: EmbedOptions) -> CollateOptions:
    """How the model of these args.json was trained to see cells, with nothing hidden.

    Raises
    ------
    CheckpointError
        When args.json says what can't be.
    ConfigError
        For a `max_length` that the options give and that leaves no room.
    """
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


def model_domains(
    loaded: LoadedModel,
    checkpoint: str,
    options: EmbedOptions,
    storage_options: Mapping[str, Any] | None,
) -> LabelNames | None:
    """What the domains of a model are called that must know each cell's; None of others.

    Raises
    ------
    CheckpointError
        When domains.json is missing, or names another number of domains.
    ConfigError
        When a column of domains is named for a model that has none.
    """
    config = loaded.model.config
    if not config.domain_norm:
        if options.domain_column is not None:
            raise ConfigError(
                "this model does not look at domains", advice="leave --domain-column out"
            )
        return None
    domains = read_names(checkpoint, DOMAINS, storage_options)
    if len(domains) != config.n_domains:
        raise CheckpointError(
            f"domains.json names {len(domains)} domains, and the model has {config.n_domains}",
            where=checkpoint,
        )
    return domains

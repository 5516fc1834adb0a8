"""Cell embeddings: `obsm["X_scshards"]` of the cells of h5ad files, zarr stores, shard sets.

Called by `scshards embed`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from scshards.applying.apply import ApplyReport, Job, apply
from scshards.applying.cells import ModelInput
from scshards.applying.options import OBSM_KEY as OBSM_KEY
from scshards.applying.options import EmbedOptions as EmbedOptions
from scshards.applying.output import Result
from scshards.cells.batch import Batch
from scshards.model.scgpt import load_model
from scshards.ranks.ranks import ranks


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
            model=model,
            compute=compute,
            width=model.config.d_model,
            results=[embedding_result(options, model.config.d_model)],
            wants=ModelInput.of(checkpoint, loaded, options, storage_options),
            here=here,
            shown=shown,
        )
        return apply(job, inputs, output)


def embedding_result(options: EmbedOptions, d_model: int) -> Result:
    """The embedding, in the first `d_model` columns of the rows that are computed."""
    return Result(
        frame="obsm", name=options.key, of=lambda rows: rows[:, :d_model], columns=d_model
    )

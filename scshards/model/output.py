"""What a forward pass gives. Made by model.transformer, read by train."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """What a forward pass gives; a tuple, so that torch's distributed wrappers see its tensors.

    Everything is float32. A head that the model lacks, or that the batch does not ask for, gives
    None.

    Attributes
    ----------
    predictions
        The value of each token, or of each unknown gene; means nothing at padding. [B, L] for a
        Batch, [T] for a PackedBatch, [B, G] for a GenerateBatch.
    cell_embeddings
        [B, D]; not normalised, but for `cell_style="w-pool"`.
    mvc_predictions
        As `predictions`, from the cell embedding.
    zero_probs, mvc_zero_probs
        As `predictions`: the probability that a value is not zero (the name is scGPT's).
    class_logits
        [B, n_classes].
    domain_logits
        [B, n_domains], behind gradient reversal.
    prompt_predictions
        [B, G]: the unknown genes once more, with the cell embedding in the place of `<cls>`.
    """

    predictions: Tensor
    cell_embeddings: Tensor
    mvc_predictions: Tensor | None = None
    zero_probs: Tensor | None = None
    mvc_zero_probs: Tensor | None = None
    class_logits: Tensor | None = None
    domain_logits: Tensor | None = None
    prompt_predictions: Tensor | None = None

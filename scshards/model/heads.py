"""The heads: values from each token and from the cell embedding (MVC), classes and domains of cells.

`ModelOutput` is what all of them give. Called by model.transformer. Module and attribute names are
scGPT's, its checkpoints' keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scshards.model.config import ModelConfig
from scshards.model.layout import Packed, Padded


class Values(NamedTuple):
    """Predicted values and, with `explicit_zero_prob`, the probability that each is not zero."""

    predictions: Tensor
    zero_probs: Tensor | None


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


class ExprDecoder(nn.Module):
    """One value for each token, from what the encoder made of it (and, with labels, its domain)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model * (2 if config.use_domain_labels else 1)
        self.fc = _to_one(width, config.d_model)
        self.zero_logit = _to_one(width, config.d_model) if config.explicit_zero_prob else None

    def forward(self, x_BLD: Tensor) -> Values:
        """float [..., D] to float32 [...]."""
        predictions_BL = self.fc(x_BLD).squeeze(-1).float()
        if self.zero_logit is None:
            return Values(predictions_BL, None)
        return Values(predictions_BL, torch.sigmoid(self.zero_logit(x_BLD).squeeze(-1).float()))


class MVCDecoder(nn.Module):
    """One value for each gene of a cell from the cell embedding alone: scGPT's inner product.

    value = W(sigmoid(gene2query(gene))) . cell
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model = config.d_model
        width = d_model * (2 if config.use_domain_labels else 1)
        self.detach = config.mvc_style == "inner product, detach"
        self.gene2query = nn.Linear(d_model, d_model)
        self.W = nn.Linear(d_model, width, bias=False)
        self.W_zero_logit = nn.Linear(d_model, width) if config.explicit_zero_prob else None

    def forward(self, cells_BD: Tensor, genes_BLD: Tensor, layout: Padded | Packed) -> Values:
        """Cell embeddings [B, D] (then domains, 2 D) and tokens' embeddings to float32 [B, L]."""
        if self.detach:
            genes_BLD = genes_BLD.detach()
        query_BLD = torch.sigmoid(self.gene2query(genes_BLD))
        # (W q) . c = q . (c W): the same number with L times fewer products, and no W q to keep.
        values_BL = layout.products(query_BLD, cells_BD @ self.W.weight).float()
        if self.W_zero_logit is None:
            return Values(values_BL, None)
        logits_BL = layout.products(query_BLD, cells_BD @ self.W_zero_logit.weight)
        bias_B1 = (cells_BD @ self.W_zero_logit.bias)[:, None]
        logits_BL = logits_BL.float() + layout.spread(bias_B1).squeeze(-1).float()
        return Values(values_BL, torch.sigmoid(logits_BL))


class ClsDecoder(nn.Module):
    """A logit for each class from the cell embedding; the adversary is one for domains.

    `n_layers` linears, each but the last followed by an activation and a norm.
    """

    def __init__(
        self, d_model: int, n_classes: int, n_layers: int, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        hidden: list[nn.Module] = []
        for _ in range(n_layers - 1):
            hidden += [nn.Linear(d_model, d_model), activation(), nn.LayerNorm(d_model)]
        self._decoder = nn.Sequential(*hidden)
        self.out_layer = nn.Linear(d_model, n_classes)

    def forward(self, cells_BD: Tensor) -> Tensor:
        """float [B, D] to float32 [B, n_classes]."""
        return self.out_layer(self._decoder(cells_BD)).float()


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def reversed_gradient(x: Tensor) -> Tensor:
    """x itself, whose gradient comes back with its sign turned (Ganin & Lempitsky, 2015)."""
    return _Reversed.apply(x)


def _to_one(width: int, d_model: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, d_model),
        nn.LeakyReLU(0.01),
        nn.Linear(d_model, d_model),
        nn.LeakyReLU(0.01),
        nn.Linear(d_model, 1),
    )

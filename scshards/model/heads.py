"""The heads that predict values: from each token, and from the cell embedding (MVC).

Called by model.transformer. Module and attribute names are scGPT's, its checkpoints' keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExprDecoder(nn.Module):
    """One value for each token, from what the encoder made of it."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(0.01),
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(0.01),
            nn.Linear(d_model, 1),
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """float [B, L, D] to float [B, L]."""
        return self.fc(x_BLD).squeeze(-1)


class MVCDecoder(nn.Module):
    """One value for each gene of a cell from the cell embedding alone: scGPT's inner product.

    value = W(sigmoid(gene2query(gene))) . cell
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gene2query = nn.Linear(d_model, d_model)
        self.W = nn.Linear(d_model, d_model, bias=False)

    def forward(self, cells_BD: Tensor, genes_BLD: Tensor) -> Tensor:
        """Cell embeddings [B, D] and GeneEncoder's output [B, L, D] to float [B, L]."""
        query_BLD = torch.sigmoid(self.gene2query(genes_BLD))
        # (W q) . c = q . (c W): the same number with L times fewer products, and no W q to keep.
        cells_BD = cells_BD @ self.W.weight
        return torch.bmm(query_BLD, cells_BD.unsqueeze(-1)).squeeze(-1)

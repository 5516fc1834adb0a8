"""What training is measured against: scGPT's model in PyTorch's own nn.TransformerEncoder, a plain loop.

The shape of scGPT's public code (scgpt/model/model.py and examples/pretrain.py of bowang-lab/scGPT):
embeddings of genes and values added up, nn.TransformerEncoder over padded batches, a head for each
token's value and one that predicts them from the cell embedding; Adam, clipping, batch after batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scshards.model.config import ModelConfig


class PlainModel(nn.Module):
    """scGPT's model without flash attention; its state_dict has the names of such checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, dropout = config.d_model, config.dropout
        self.pad_id = config.pad_id
        self.encoder = nn.ModuleDict(
            {
                "embedding": nn.Embedding(config.n_tokens, d, padding_idx=config.pad_id),
                "enc_norm": nn.LayerNorm(d),
            }
        )
        self.value_encoder = nn.ModuleDict(
            {"linear1": nn.Linear(1, d), "linear2": nn.Linear(d, d), "norm": nn.LayerNorm(d)}
        )
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            d, config.n_heads, config.d_hid, dropout, batch_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(
            layer, config.n_layers, enable_nested_tensor=False
        )
        slope = nn.LeakyReLU(0.01)
        self.decoder = nn.ModuleDict(
            {"fc": nn.Sequential(nn.Linear(d, d), slope, nn.Linear(d, d), slope, nn.Linear(d, 1))}
        )
        self.mvc_decoder = nn.ModuleDict(
            {"gene2query": nn.Linear(d, d), "W": nn.Linear(d, d, bias=False)}
        )

    def forward(self, genes_BL: Tensor, values_BL: Tensor) -> tuple[Tensor, Tensor]:
        """int64 and float32 [B, L] to the values by token and by cell embedding, float32 [B, L]."""
        tokens_BLD = self.encoder["enc_norm"](self.encoder["embedding"](genes_BL))
        v = self.value_encoder
        hidden_BLD = torch.relu(v["linear1"](values_BL.clamp(max=512).unsqueeze(-1)))
        values_BLD = self.dropout(v["norm"](v["linear2"](hidden_BLD)))
        x_BLD = self.transformer_encoder(
            tokens_BLD + values_BLD, src_key_padding_mask=genes_BL.eq(self.pad_id)
        )
        query_BLD = torch.sigmoid(self.mvc_decoder["gene2query"](tokens_BLD))
        mvc_BL1 = torch.bmm(self.mvc_decoder["W"](query_BLD), x_BLD[:, 0].unsqueeze(2))
        return self.decoder["fc"](x_BLD).squeeze(-1).float(), mvc_BL1.squeeze(2).float()


def masked_mse(predictions_BL: Tensor, targets_BL: Tensor, is_masked_BL: Tensor) -> Tensor:
    """As scgpt/loss.py has it: the mean of the squared errors at masked places."""
    mask_BL = is_masked_BL.float()
    error = nn.functional.mse_loss(predictions_BL * mask_BL, targets_BL * mask_BL, reduction="sum")
    return error / mask_BL.sum()


def names_of_plain(name: str) -> str:
    """A parameter's name in a CellModel as the one it has here."""
    return name.replace("self_attn.Wqkv.", "self_attn.in_proj_")

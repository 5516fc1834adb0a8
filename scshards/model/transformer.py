"""CellModel: an encoder of cells in scGPT's shape, with the heads that it is trained by.

    genes ----> encoder ---------.--------------------> mvc_decoder -> mvc_predictions
                                 +-> transformer_encoder --^--------> decoder -> predictions
    values ---> value_encoder ---'        `-> position 0: cell_embeddings

Its state_dict has the keys and shapes of the official checkpoints (attention as `Wqkv`). Called by
train and by model.scgpt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scshards.base import seeds
from scshards.model.config import ModelConfig
from scshards.model.embeddings import ContinuousValueEncoder, GeneEncoder
from scshards.model.encoder import Encoder
from scshards.model.heads import ExprDecoder, MVCDecoder


class ModelOutput(NamedTuple):
    """What a forward pass gives; a tuple, so that torch's distributed wrappers see its tensors.

    Attributes
    ----------
    predictions
        float32 [B, L]: the value of each token; means nothing at padding.
    mvc_predictions
        float32 [B, L]: the same from the cell embedding, or None in a model without that head.
    cell_embeddings
        float32 [B, D]: the encoder's output at position 0, `<cls>`; not normalised.
    """

    predictions: Tensor
    mvc_predictions: Tensor | None
    cell_embeddings: Tensor


class CellModel(nn.Module):
    """The model of a config, with fresh weights.

    Parameters
    ----------
    config
        Its shape.
    seed
        The weights are a function of config and seed: the token embedding uniform in (-0.1, 0.1),
        the rest torch's defaults. They are drawn on the CPU, whatever torch's default device is
        (move the model afterwards), unless that is "meta", where nothing is drawn. torch's global
        random state is left as it was.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        meta = torch.get_default_device().type == "meta"
        with torch.device("meta" if meta else "cpu"), torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it reseeds every CUDA device too, and fork_rng([]) saves none.
            torch.default_generator.manual_seed(seeds.key(seed, "weights"))
            self.encoder = GeneEncoder(config.n_tokens, config.d_model, config.pad_id)
            self.value_encoder = ContinuousValueEncoder(config.d_model, config.dropout)
            self.transformer_encoder = Encoder(
                config.n_layers, config.d_model, config.n_heads, config.d_hid, config.dropout
            )
            self.decoder = ExprDecoder(config.d_model)
            self.mvc_decoder = MVCDecoder(config.d_model) if config.mvc else None

    def forward(self, genes_BL: Tensor, values_BL: Tensor, is_pad_BL: Tensor) -> ModelOutput:
        """Predict the value of every token of a batch.

        Parameters
        ----------
        genes_BL
            int32 or int64 [B, L], `Batch.genes`.
        values_BL
            float32 [B, L], `Batch.values`: with `mask_value` where the model has to predict.
        is_pad_BL
            bool [B, L], `Batch.is_pad`.
        """
        tokens_BLD = self.encoder(genes_BL)
        x_BLD = self._encode(tokens_BLD, values_BL, is_pad_BL)
        cells_BD = x_BLD[:, 0]
        mvc_BL = None
        if self.mvc_decoder is not None:
            mvc_BL = self.mvc_decoder(cells_BD, tokens_BLD).float()
        return ModelOutput(self.decoder(x_BLD).float(), mvc_BL, cells_BD.float())

    def embed(self, genes_BL: Tensor, values_BL: Tensor, is_pad_BL: Tensor) -> Tensor:
        """The cell embeddings alone, float32 [B, D]: `forward` without its heads."""
        return self._encode(self.encoder(genes_BL), values_BL, is_pad_BL)[:, 0].float()

    def _encode(self, tokens_BLD: Tensor, values_BL: Tensor, is_pad_BL: Tensor) -> Tensor:
        return self.transformer_encoder(tokens_BLD + self.value_encoder(values_BL), is_pad_BL)

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
from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.config import ModelConfig
from scshards.model.embeddings import ContinuousValueEncoder, GeneEncoder
from scshards.model.encoder import Encoder
from scshards.model.heads import ExprDecoder, MVCDecoder


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

    def forward(
        self,
        batch: Batch | PackedBatch | GenerateBatch,
        *,
        domains_B: Tensor | None = None,
        cell_prompt: bool = False,
    ) -> ModelOutput:
        """Predict the values of a batch's tokens, and whatever else there are heads for.

        Parameters
        ----------
        batch
            On the model's device; `values` hold `mask_value` where the model has to predict.
        domains_B
            int64 [B]: each cell's domain, for a model that was built with domains.
        cell_prompt
            Whether a GenerateBatch gets the second pass too.

        Raises
        ------
        ConfigError
            For a kind of batch, or an option, that this model was not built for.
        """
        batch = self._checked(batch, domains_B, cell_prompt)
        tokens_BLD = self.encoder(batch.genes)
        x_BLD = self._encode(tokens_BLD, batch)
        cells_BD = x_BLD[:, 0]
        mvc_BL = None
        if self.mvc_decoder is not None:
            mvc_BL = self.mvc_decoder(cells_BD, tokens_BLD).float()
        return ModelOutput(self.decoder(x_BLD).float(), cells_BD.float(), mvc_BL)

    def embed(
        self, batch: Batch | PackedBatch | GenerateBatch, *, domains_B: Tensor | None = None
    ) -> Tensor:
        """The cell embeddings alone, float32 [B, D]: `forward` without its heads."""
        batch = self._checked(batch, domains_B, False)
        return self._encode(self.encoder(batch.genes), batch)[:, 0].float()

    def _encode(self, tokens_BLD: Tensor, batch: Batch) -> Tensor:
        return self.transformer_encoder(tokens_BLD + self.value_encoder(batch.values), batch.is_pad)

    def _checked(
        self,
        batch: Batch | PackedBatch | GenerateBatch,
        domains_B: Tensor | None,
        cell_prompt: bool,
    ) -> Batch:
        """The batch, when this model can take it."""
        if not isinstance(batch, Batch):
            raise ConfigError(f"this model can't take a {type(batch).__name__}, only a Batch")
        if domains_B is not None:
            raise ConfigError("this model was built without domains and is given some")
        if cell_prompt:
            raise ConfigError("only a GenerateBatch has unknown genes to prompt for")
        return batch

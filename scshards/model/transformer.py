"""CellModel: an encoder of cells in scGPT's shape, with the heads that it is trained by.

    genes ----> encoder ---------.--------------------> mvc_decoder -> mvc_predictions
                                 +-> transformer_encoder --^--------> decoder -> predictions
    values ---> value_encoder ---'        `-> cell_embeddings -> cls_decoder, adversary

The unknown genes of a GenerateBatch have `flag_encoder` in the place of a value. The state_dict has
the keys and shapes of the official checkpoints (attention as `Wqkv`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.config import ModelConfig
from scshards.model.embeddings import RowEncoder, gene_encoder, value_encoder
from scshards.model.encoder import Encoder
from scshards.model.heads import (
    ClsDecoder,
    ExprDecoder,
    ModelOutput,
    MVCDecoder,
    Values,
    reversed_gradient,
)
from scshards.model.layout import Packed, Padded, Split
from scshards.model.norm import DomainNorm

__all__ = ["CellModel", "ModelOutput"]

AnyBatch = Batch | PackedBatch | GenerateBatch

ADVERSARY_LAYERS = 3
"""Depth of the adversary, as in scGPT."""


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
        random state is left as it was. What the config adds to encoder and value decoder changes
        no weight of these.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        d_model, n_domains = config.d_model, config.n_domains
        meta = torch.get_default_device().type == "meta"
        with torch.device("meta" if meta else "cpu"), torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it reseeds every CUDA device too, and fork_rng([]) saves none.
            torch.default_generator.manual_seed(seeds.key(seed, "weights"))
            self.encoder = gene_encoder(config)
            self.value_encoder = value_encoder(config)
            self.transformer_encoder = Encoder(config)
            self.decoder = ExprDecoder(config)
            self.mvc_decoder = MVCDecoder(config) if config.mvc else None
            self.flag_encoder = nn.Embedding(2, d_model) if config.generate else None
            self.batch_encoder = (
                RowEncoder(n_domains, d_model) if config.use_domain_labels else None
            )
            self.dsbn = DomainNorm(n_domains, d_model) if config.domain_norm else None
            self.cls_decoder = (
                ClsDecoder(d_model, config.n_classes, config.n_class_layers)
                if config.n_classes
                else None
            )
            self.grad_reverse_discriminator = (
                ClsDecoder(d_model, n_domains, ADVERSARY_LAYERS, nn.LeakyReLU)
                if config.adversary
                else None
            )

    def forward(
        self, batch: AnyBatch, *, domains_B: Tensor | None = None, cell_prompt: bool = False
    ) -> ModelOutput:
        """Predict the values of a batch's tokens, and whatever else there are heads for.

        Predictions are scGPT's without `do_sample`: with `explicit_zero_prob` they are those of
        values that are not zero, and `zero_probs * predictions` is what to expect.

        Parameters
        ----------
        batch
            On the model's device; `values` hold `mask_value` where the model has to predict.
        domains_B
            int64 [B]: each cell's domain, 0 to n_domains - 1, for `use_domain_labels` and
            `domain_norm`.
        cell_prompt
            Whether a GenerateBatch gets the second pass too.

        Raises
        ------
        ConfigError
            For a kind of batch, or an option, that this model was not built for.
        """
        config = self.config
        self._check_domains(domains_B, config.use_domain_labels or config.domain_norm)
        if isinstance(batch, GenerateBatch):
            return self._generate(batch, domains_B, cell_prompt)
        if cell_prompt:
            raise ConfigError("only a GenerateBatch has unknown genes to prompt for")
        layout = _layout(batch)
        tokens_BLD = self.encoder(batch.genes)
        x_BLD = self._encode(tokens_BLD, batch, layout, domains_B)
        cells_BD = self._cells(x_BLD, batch.values, layout)
        return self._heads(x_BLD, tokens_BLD, cells_BD, layout, domains_B)

    def embed(self, batch: Batch | PackedBatch, *, domains_B: Tensor | None = None) -> Tensor:
        """The cell embeddings alone, float32 [B, D]: `forward` without its heads.

        Domains are needed for `domain_norm` alone.
        """
        self._check_domains(domains_B, self.config.domain_norm)
        layout = _layout(batch)
        x_BLD = self._encode(self.encoder(batch.genes), batch, layout, domains_B)
        return self._cells(x_BLD, batch.values, layout).float()

    def _encode(
        self,
        tokens_BLD: Tensor,
        batch: Batch | PackedBatch,
        layout: Padded | Packed,
        domains_B: Tensor | None,
    ) -> Tensor:
        x_BLD = self._with_values(tokens_BLD, batch.values)
        if self.dsbn is not None:
            assert domains_B is not None, "checked"
            x_BLD = self.dsbn(x_BLD, domains_B, batch.weight, layout)
        return self.transformer_encoder(x_BLD, layout)

    def _with_values(self, tokens_BLD: Tensor, values_BL: Tensor) -> Tensor:
        values_BLD = self.value_encoder(values_BL)
        if self.config.value_style == "scaling":
            return tokens_BLD * values_BLD
        return tokens_BLD + values_BLD

    def _cells(self, x_BLD: Tensor, values_BL: Tensor, layout: Padded | Packed) -> Tensor:
        """Cell embeddings as `cell_style` says, which scGPT pools over padding as well."""
        if self.config.cell_style == "cls":
            return layout.first(x_BLD)
        x_BLD = x_BLD.float()
        if self.config.cell_style == "avg-pool":
            ones_BL1 = torch.ones_like(x_BLD[..., :1])
            return layout.sums(x_BLD) / layout.sums(ones_BL1).clamp(min=1)
        weighed_BLD = x_BLD * values_BL.unsqueeze(-1)
        return nn.functional.normalize(layout.sums(weighed_BLD), dim=1)

    def _generate(
        self, batch: GenerateBatch, domains_B: Tensor | None, cell_prompt: bool
    ) -> ModelOutput:
        if self.flag_encoder is None:
            raise ConfigError(
                "this model was not built to predict unknown genes and is given a GenerateBatch",
                where="model.generate",
                advice="build it with generate=True, or read batches with objective='mask'",
            )
        n_known, n_unknown = batch.known_genes.shape[1], batch.unknown_genes.shape[1]
        layout = Split.of(batch.known_is_pad, n_unknown)
        tokens_BND = self.encoder(torch.cat([batch.known_genes, batch.unknown_genes], 1))
        known_BPD, unknown_BGD = tokens_BND.tensor_split([n_known], dim=1)
        flagged_BGD = unknown_BGD + self.flag_encoder(batch.unknown_genes.new_ones(()))
        seen_BPD = self._with_values(known_BPD, batch.known_values)
        x_BND = self.transformer_encoder(torch.cat([seen_BPD, flagged_BGD], 1), layout)
        cells_BD = x_BND[:, 0]
        unknown_only = Padded(batch.unknown_is_pad)
        out = self._heads(x_BND[:, n_known:], unknown_BGD, cells_BD, unknown_only, domains_B)
        if not cell_prompt:
            return out
        # Once more, with what the first pass made of the cell where `<cls>` went in.
        seen_BPD = self._with_values(known_BPD, batch.known_values)
        cell_B1D = cells_BD.detach()[:, None].to(seen_BPD.dtype)
        inputs_BND = torch.cat([cell_B1D, seen_BPD[:, 1:], flagged_BGD], 1)
        x_BND = self.transformer_encoder(inputs_BND, layout)
        prompted = self._decode(x_BND[:, n_known:], unknown_only, self._domain(domains_B))
        return out._replace(prompt_predictions=prompted.predictions)

    def _heads(
        self,
        x_BLD: Tensor,
        tokens_BLD: Tensor,
        cells_BD: Tensor,
        layout: Padded | Packed,
        domains_B: Tensor | None,
    ) -> ModelOutput:
        domain_BD = self._domain(domains_B)
        values = self._decode(x_BLD, layout, domain_BD)
        mvc = None
        if self.mvc_decoder is not None:
            told_BD = cells_BD if domain_BD is None else torch.cat([cells_BD, domain_BD], 1)
            mvc = self.mvc_decoder(told_BD, tokens_BLD, layout)
        classes_BC = domains_BK = None
        if self.cls_decoder is not None:
            classes_BC = self.cls_decoder(cells_BD)
        if self.grad_reverse_discriminator is not None:
            domains_BK = self.grad_reverse_discriminator(reversed_gradient(cells_BD))
        return ModelOutput(
            predictions=values.predictions,
            cell_embeddings=cells_BD.float(),
            mvc_predictions=None if mvc is None else mvc.predictions,
            zero_probs=values.zero_probs,
            mvc_zero_probs=None if mvc is None else mvc.zero_probs,
            class_logits=classes_BC,
            domain_logits=domains_BK,
        )

    def _decode(self, x_BLD: Tensor, layout: Padded | Packed, domain_BD: Tensor | None) -> Values:
        if domain_BD is not None:
            x_BLD = torch.cat([x_BLD, layout.spread(domain_BD)], -1)
        return self.decoder(x_BLD)

    def _domain(self, domains_B: Tensor | None) -> Tensor | None:
        return None if self.batch_encoder is None else self.batch_encoder(domains_B)

    def _check_domains(self, domains_B: Tensor | None, needed: bool) -> None:
        if domains_B is None and needed:
            raise ConfigError(
                "this model normalises or decodes by domain and is not told the cells' domains",
                where="model.n_domains",
                advice="give domains_B, int64 [B]",
            )
        if domains_B is not None and not self.config.n_domains:
            raise ConfigError(
                "this model was built without domains and is given some", where="model.n_domains"
            )


def _layout(batch: Batch | PackedBatch) -> Padded | Packed:
    if isinstance(batch, PackedBatch):
        return Packed.of(batch.cu_seqlens, batch.max_seqlen, batch.is_pad)
    return Padded(batch.is_pad)

"""TransformerModel: a CellModel that is made, called and answers as scGPT's model. See compat.

It is a CellModel, so its state_dict has scGPT's keys, and `write_folder` takes it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch
from scshards.cells.vocab import Vocab
from scshards.model.config import ModelConfig
from scshards.model.loss import similarity_loss
from scshards.model.transformer import CellModel


class TransformerModel(CellModel):
    """scGPT's constructor and forward over CellModel.

    Parameters
    ----------
    ntoken, d_model, nhead, d_hid, nlayers, nlayers_cls, n_cls
        Sizes. With `n_cls` above 1 there is a class head.
    vocab, pad_token
        Give the id of padding.
    do_mvc, do_dab, use_batch_labels, num_batch_labels, domain_spec_batchnorm
        Which heads, and domains for what.
    input_emb_style, n_input_bins, cell_emb_style, mvc_decoder_style, explicit_zero_prob
        As in ModelConfig; of "category", `n_input_bins` counts those of padding and mask.
    ecs_threshold
        Of the similarity loss.
    use_fast_transformer, fast_transformer_backend
        Taken for the sake of scripts: they choose among attentions that compute the same numbers, and
        CellModel chooses its own.
    pre_norm
        Only False.
    mask_value
        What hides a value, for args.json.
    seed
        Of the weights.

    Raises
    ------
    ConfigError
        For what CellModel can't be.
    """

    def __init__(
        self,
        ntoken: int,
        d_model: int,
        nhead: int,
        d_hid: int,
        nlayers: int,
        nlayers_cls: int = 3,
        n_cls: int = 1,
        vocab: Vocab | Mapping[str, int] | None = None,
        dropout: float = 0.5,
        pad_token: str = "<pad>",
        pad_value: float = 0,
        do_mvc: bool = False,
        do_dab: bool = False,
        use_batch_labels: bool = False,
        num_batch_labels: int | None = None,
        domain_spec_batchnorm: bool | str = False,
        input_emb_style: Any = "continuous",
        n_input_bins: int | None = None,
        cell_emb_style: Any = "cls",
        mvc_decoder_style: Any = "inner product",
        ecs_threshold: float = 0.3,
        explicit_zero_prob: bool = False,
        use_fast_transformer: bool = False,
        fast_transformer_backend: str = "flash",
        pre_norm: bool = False,
        *,
        mask_value: float | None = None,
        seed: int = 0,
    ) -> None:
        if vocab is None:
            raise ConfigError("vocab is needed: it gives the id of padding")
        if pre_norm or isinstance(domain_spec_batchnorm, str):
            raise ConfigError(
                f"pre_norm={pre_norm!r}, domain_spec_batchnorm={domain_spec_batchnorm!r}: this model "
                "has post-norm layers, and batch norm by domain or none",
                advice="use pre_norm=False, and domain_spec_batchnorm=True or False",
            )
        by_domain = do_dab or use_batch_labels or domain_spec_batchnorm
        if by_domain and not num_batch_labels:
            raise ConfigError("num_batch_labels is needed: how many domains there are")
        is_category = input_emb_style == "category"
        if is_category and n_input_bins is None:
            raise ConfigError("n_input_bins is needed for input_emb_style='category'")
        n_bins = n_input_bins or ModelConfig.n_bins
        if is_category:
            n_bins -= 2  # padding and mask have a row each
        if mask_value is None:
            mask_value = n_bins + 1 if is_category else ModelConfig.mask_value
        config = ModelConfig(
            n_tokens=ntoken,
            pad_id=vocab[pad_token],
            d_model=d_model,
            n_heads=nhead,
            d_hid=d_hid,
            n_layers=nlayers,
            dropout=dropout,
            mvc=do_mvc,
            pad_value=float(pad_value),
            mask_value=float(mask_value),
            n_bins=n_bins,
            value_style=input_emb_style,
            explicit_zero_prob=explicit_zero_prob,
            cell_style=cell_emb_style,
            mvc_style=mvc_decoder_style,
            n_classes=n_cls if n_cls > 1 else 0,
            n_class_layers=nlayers_cls,
            n_domains=(num_batch_labels or 0) if by_domain else 0,
            use_domain_labels=use_batch_labels,
            adversary=do_dab,
            domain_norm=bool(domain_spec_batchnorm),
        )
        super().__init__(config, seed=seed)
        self.ecs_threshold = ecs_threshold

    def forward(  # type: ignore[override]  # scGPT's arguments in place of a batch are its purpose
        self,
        src: Tensor,
        values: Tensor,
        src_key_padding_mask: Tensor,
        batch_labels: Tensor | None = None,
        CLS: bool = False,
        CCE: bool = False,
        MVC: bool = False,
        ECS: bool = False,
        do_sample: bool = False,
    ) -> dict[str, Tensor]:
        """Predict, under scGPT's names.

        Parameters
        ----------
        src, values, src_key_padding_mask
            Token ids, values and where padding is, [B, L].
        batch_labels
            int64 [B]: domains, for a model that needs them.
        CLS, MVC, ECS
            Whether "cls_output" [B, n_cls], "mvc_output" [B, L] and "loss_ecs" are asked for.
        CCE, do_sample
            Only False.

        Returns
        -------
        dict
            "mlm_output" [B, L] and "cell_emb" [B, D] always, "dab_output" [B, domains] of a model with
            that head, "mlm_zero_probs" and "mvc_zero_probs" [B, L] with `explicit_zero_prob`.
        """
        if CCE or do_sample:
            raise ConfigError("CCE and do_sample are not here", advice="call the model without")
        out = super().forward(batch_of(src, values, src_key_padding_mask), domains_B=batch_labels)
        found = {"mlm_output": out.predictions, "cell_emb": out.cell_embeddings}
        found |= _asked("mlm_zero_probs", out.zero_probs, self.config.explicit_zero_prob)
        found |= _asked("cls_output", out.class_logits, CLS, "n_cls above 1")
        found |= _asked("mvc_output", out.mvc_predictions, MVC, "do_mvc=True")
        found |= _asked(
            "mvc_zero_probs", out.mvc_zero_probs, MVC and self.config.explicit_zero_prob
        )
        found |= _asked("dab_output", out.domain_logits, self.config.adversary)
        if ECS:
            ones_B = torch.ones(len(src), device=src.device)
            total, pairs = similarity_loss(
                out.cell_embeddings, ones_B, threshold=self.ecs_threshold
            )
            found["loss_ecs"] = total / pairs
        return found


def batch_of(src: Tensor, values: Tensor, src_key_padding_mask: Tensor) -> Batch:
    """scGPT's arguments as a Batch of cells that count, with nothing to predict."""
    return Batch(
        genes=src,
        values=values.float(),
        targets=values.float(),
        is_masked=torch.zeros_like(src_key_padding_mask),
        is_pad=src_key_padding_mask,
        key=torch.arange(len(src)),
        labels={},
        weight=torch.ones(len(src), device=src.device),
    )


def _asked(name: str, tensor: Tensor | None, asked: bool, needs: str = "") -> dict[str, Tensor]:
    if not asked:
        return {}
    if tensor is None:
        raise ConfigError(f"the model has no head for {name}", advice=f"build it with {needs}")
    return {name: tensor}

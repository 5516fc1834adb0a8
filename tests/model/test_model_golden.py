"""Every golden folder (README there) through the public loader: what scGPT's own code computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_support import NEAR, golden_batch, golden_generate, golden_io

from scshards.model.config import ModelConfig
from scshards.model.loss import masked_squared_error, similarity_loss
from scshards.model.scgpt import load_model, read_folder

SHAPE = {"n_tokens": 203, "pad_id": 200, "d_model": 32, "n_heads": 4, "d_hid": 48, "n_layers": 3}

FOLDERS = {
    "mask_in_proj": {"n_classes": 5},
    "mask_category_zeroprob": {
        "n_classes": 5,
        "value_style": "category",
        "explicit_zero_prob": True,
        "pad_value": 51.0,
        "mask_value": 52.0,
    },
    "mask_batch_labels": {
        "n_classes": 5,
        "n_domains": 3,
        "use_domain_labels": True,
        "adversary": True,
    },
    "generate_wqkv": {"generate": True},
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_config_is_read(golden: Path, folder: str) -> None:
    model, _, vocab, unused = load_model(str(golden / folder))
    expected = ModelConfig(**SHAPE, max_length=40, **FOLDERS[folder])  # type: ignore[arg-type]
    assert model.config == expected
    assert unused == []
    assert vocab["<pad>"] == 200
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.startswith("mask")])
def test_masked_values(golden: Path, folder: str) -> None:
    model = load_model(str(golden / folder)).model
    io = golden_io(golden / folder)
    batch = golden_batch(io)
    is_real = ~batch.is_pad
    assert len(set(is_real.sum(1).tolist())) > 1, "cells differ in padding"
    with torch.no_grad():
        out = model(batch, domains_B=io.get("in_batch_labels"))
        cells = model.embed(batch)
    by_token = {
        "mlm_output": out.predictions,
        "mvc_output": out.mvc_predictions,
        "mlm_zero_probs": out.zero_probs,
        "mvc_zero_probs": out.mvc_zero_probs,
    }
    for name, found in by_token.items():
        assert (found is None) == (f"out_{name}" not in io)
        if found is not None:
            torch.testing.assert_close(found[is_real], io[f"out_{name}"][is_real], **NEAR)
    by_cell = {
        "cell_emb": out.cell_embeddings,
        "cls_output": out.class_logits,
        "dab_output": out.domain_logits,
    }
    for name, found in by_cell.items():
        assert (found is None) == (f"out_{name}" not in io)
        if found is not None:
            torch.testing.assert_close(found, io[f"out_{name}"], **NEAR)
    assert torch.equal(cells, out.cell_embeddings)
    for predictions, name in ((out.predictions, "mse"), (out.mvc_predictions, "mvc_mse")):
        s, n = masked_squared_error(predictions, batch.targets, batch.is_masked, batch.weight)
        torch.testing.assert_close(s / n, io[f"out_loss_{name}"], **NEAR)
    s, n = similarity_loss(out.cell_embeddings, batch.weight, threshold=0.3)
    torch.testing.assert_close(s / n, io["out_loss_ecs"], **NEAR)


def test_unknown_genes(golden: Path) -> None:
    model = load_model(str(golden / "generate_wqkv")).model
    io = golden_io(golden / "generate_wqkv")
    batch = golden_generate(io)
    n_known = batch.known_genes.shape[1]
    is_real = ~batch.unknown_is_pad
    assert batch.known_is_pad.any()
    assert batch.unknown_is_pad.any()
    with torch.no_grad():
        out = model(batch, cell_prompt=True)
        assert model(batch).prompt_predictions is None
    mvc = io["out_mvc_output"][:, n_known:]
    for found, expected, loss in (
        (out.predictions, io["out_gen_preds"], "gene_prompt"),
        (out.mvc_predictions, mvc, "mvc"),
        (out.prompt_predictions, io["out_cellprompt_gen_preds"], "cell_prompt"),
    ):
        torch.testing.assert_close(found[is_real], expected[is_real], **NEAR)
        s, n = masked_squared_error(found, batch.unknown_targets, is_real, batch.weight)
        torch.testing.assert_close(s / n, io[f"out_loss_{loss}"], **NEAR)
    torch.testing.assert_close(out.cell_embeddings, io["out_cell_emb"], **NEAR)


def test_every_tensor_is_the_files_own(golden: Path) -> None:
    model = load_model(str(golden / "generate_wqkv")).model
    state = read_folder(str(golden / "generate_wqkv")).state
    assert "flag_encoder.weight" in state
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())

"""On a CUDA device: the same numbers as on the CPU, and gradients that are numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_support import golden_batch, golden_io

from scshards.model.attention import attend
from scshards.model.scgpt import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 37, 256, 1200])
def test_gradients_with_padding_are_finite(dtype: torch.dtype, length: int) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(3, 4, 8, length, 64, device="cuda", dtype=dtype, generator=g)
    qkv.requires_grad_(True)
    is_pad = torch.arange(length, device="cuda") >= torch.tensor(
        [[length], [length // 2 + 1], [1], [0]], device="cuda"
    )
    out = attend(*qkv, is_pad, 0.0)
    out.float().square().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(qkv.grad).all()
    on_cpu = attend(*qkv.detach().float().cpu(), is_pad.cpu(), 0.0)
    near = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.detach().float().cpu(), on_cpu, atol=near, rtol=near)


def test_computes_what_scgpt_computes(golden: Path) -> None:
    model = load_model(str(golden / "mask_in_proj")).model.cuda()
    io = {k: v.cuda() for k, v in golden_io(golden / "mask_in_proj").items()}
    is_pad = io["in_is_pad"]
    with torch.no_grad():
        out = model(golden_batch(io).to("cuda"))
    torch.testing.assert_close(
        out.predictions[~is_pad], io["out_mlm_output"][~is_pad], atol=1e-4, rtol=1e-4
    )

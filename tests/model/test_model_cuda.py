"""On a CUDA device: the same numbers as on the CPU, and gradients that are numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_support import golden_batch, golden_generate, golden_io, packed_batch

from scshards.model.attention import attend, attend_packed, attend_split
from scshards.model.layout import Packed, Split
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_cells(dtype: torch.dtype) -> None:
    """varlen_attn in half precision, side by side in float32: outputs and gradients as on the CPU,
    whatever memory the kernel leaves as it was."""
    ends = torch.tensor([0, 300, 301, 900, 1100])
    layout = Packed.of(ends.int(), 600, torch.arange(1300) >= 1100)
    on_cuda = Packed(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in layout))
    qkv = torch.randn(3, 1300, 8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    a = qkv.float().requires_grad_(True)
    b = qkv.cuda().requires_grad_(True)
    expected, found = attend_packed(*a, layout), attend_packed(*b, on_cuda)
    expected.square().sum().backward()
    found.float().square().sum().backward()
    near = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.detach().float().cpu(), expected, atol=near, rtol=near)
    torch.testing.assert_close(b.grad.float().cpu(), a.grad, atol=near, rtol=near)
    assert (found[1100:] == 0).all()
    assert (b.grad[:, 1100:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unknown_genes(dtype: torch.dtype) -> None:
    is_pad = torch.arange(200) >= torch.tensor([[200], [77], [1], [0]])
    qkv = torch.randn(3, 4, 8, 330, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    a = qkv.float().requires_grad_(True)
    b = qkv.cuda().requires_grad_(True)
    expected = attend_split(*a, Split.of(is_pad, 130), 0.0)
    found = attend_split(*b, Split.of(is_pad.cuda(), 130), 0.0)
    expected.square().sum().backward()
    found.float().square().sum().backward()
    near = 2e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.detach().float().cpu(), expected, atol=near, rtol=near)
    torch.testing.assert_close(b.grad.float().cpu(), a.grad, atol=near, rtol=near)


def test_generates_what_scgpt_generates(golden: Path) -> None:
    model = load_model(str(golden / "generate_wqkv")).model.cuda()
    io = {k: v.cuda() for k, v in golden_io(golden / "generate_wqkv").items()}
    batch = golden_generate(io)
    with torch.no_grad():
        out = model(batch, cell_prompt=True)
    is_real = ~batch.unknown_is_pad
    for found, name in (
        (out.predictions, "out_gen_preds"),
        (out.prompt_predictions, "out_cellprompt_gen_preds"),
    ):
        torch.testing.assert_close(found[is_real], io[name][is_real], atol=1e-3, rtol=1e-3)


def test_packed_model_in_bfloat16(golden: Path) -> None:
    model = load_model(str(golden / "mask_in_proj")).model.cuda()
    batch = golden_batch(golden_io(golden / "mask_in_proj"))
    packed = packed_batch(batch, 250, 40).to("cuda")
    with torch.no_grad():
        expected = model(batch.to("cuda"))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = model(packed)
    torch.testing.assert_close(
        found.cell_embeddings, expected.cell_embeddings, atol=5e-2, rtol=5e-2
    )

"""How much arithmetic a step is, as a function of the model and its tokens; and what a device can do.

    MFU = training FLOPs of the tokens that are no padding / seconds / peak FLOP/s of all devices

Called by metrics and tools/bench_train.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """What of a batch the arithmetic depends on. Padding is none of it.

    Attributes
    ----------
    cells
        Cells, B.
    encoded
        Tokens that go through the layers.
    valued
        Those of them that come with a value.
    projected
        Those whose context goes through the output projection: unknown genes skip it.
    predicted
        Tokens at which a value is predicted.
    pairs
        (query, key) pairs of attention: n^2 of a cell of n tokens; of a cell with P known and G
        unknown genes P^2 + G (P + 1), as an unknown gene attends to the known ones and to itself.
    cut
        Genes that a packed batch had no room for; no arithmetic at all.
    """

    cells: int
    encoded: int
    valued: int
    projected: int
    predicted: int
    pairs: int
    cut: int = 0

    @classmethod
    def of(cls, batch: Batch | PackedBatch | GenerateBatch) -> Amounts:
        """Those of a batch, which should be on the CPU: it reads the lengths of the cells."""
        if isinstance(batch, GenerateBatch):
            known_B = (~batch.known_is_pad).sum(dim=1)
            unknown_B = (~batch.unknown_is_pad).sum(dim=1)
            known, unknown = int(known_B.sum()), int(unknown_B.sum())
            return cls(
                cells=len(batch),
                encoded=known + unknown,
                valued=known,
                projected=known,
                predicted=unknown,
                pairs=int((known_B.square() + unknown_B * (known_B + 1)).sum()),
            )
        if isinstance(batch, PackedBatch):
            lengths_B = batch.cu_seqlens.diff().long()
        else:
            lengths_B = (~batch.is_pad).sum(dim=1)
        n = int(lengths_B.sum())
        return cls(
            cells=len(batch),
            encoded=n,
            valued=n,
            projected=n,
            predicted=n,
            pairs=int(lengths_B.square().sum()),
            cut=batch.genes_cut if isinstance(batch, PackedBatch) else 0,
        )


def forward_flops(config: ModelConfig, amounts: Amounts, *, cell_prompt: bool = False) -> int:
    """Floating-point operations of a forward pass: two for each multiplication with addition.

    Only matrix products count, as in PaLM's appendix B: no norms, softmax, activations, look-ups.
    With D = d_model, F = d_hid and N layers:

        layers   N (encoded (6 D^2 + 4 D F) + projected 2 D^2)       products with weights
                 N pairs 4 D                                         q k', and weights times v
        values   valued 2 (D + D^2)                                  where they are continuous
        decoder  predicted 2 (2 D^2 + D)                             twice with `explicit_zero_prob`
        MVC      predicted 2 (D^2 + D) + cells 2 D^2                 W meets the cell, not each gene

    and for each cell the heads of classes and domains. A model with domain labels has inputs of 2 D
    in its decoder and MVC. The second pass of a `cell_prompt` is layers and decoder once more.
    """
    d, wide = config.d_model, 2 if config.use_domain_labels else 1
    a, heads = amounts, 2 if config.explicit_zero_prob else 1
    weights = a.encoded * (6 * d * d + 4 * d * config.d_hid) + a.projected * 2 * d * d
    layers = config.n_layers * (weights + a.pairs * 4 * d)
    decoder = heads * a.predicted * 2 * (wide * d * d + d * d + d)
    total = layers + decoder
    if cell_prompt:
        total += layers + decoder
    if config.value_style == "continuous":
        total += a.valued * 2 * (d + d * d)
    if config.mvc:
        total += a.predicted * 2 * d * d
        total += heads * (a.predicted * 2 * d + a.cells * 2 * wide * d * d)
    if config.n_classes:
        total += a.cells * 2 * ((config.n_class_layers - 1) * d * d + d * config.n_classes)
    if config.adversary:
        total += a.cells * 2 * (2 * d * d + d * config.n_domains)
    return total


def training_flops(config: ModelConfig, amounts: Amounts, *, cell_prompt: bool = False) -> int:
    """Those of forward and backward pass: three times the forward pass.

    Each product's backward pass is two of its size: one for its input, one for its weights.
    """
    return 3 * forward_flops(config, amounts, cell_prompt=cell_prompt)


def peak_flops(device: torch.device, *, bf16: bool, told: float | None = None) -> float | None:
    """FLOP/s that a device can do in dense matrix products at most, or None when nobody knows.

    Parameters
    ----------
    device
        Of CUDA devices, the name says it; of a CPU, nothing does.
    bf16
        Whether products are in bf16; else they are in float32, as TF32 where torch may use that.
    told
        TFLOP/s that the user names (`run.peak_tflops`), for devices that the table lacks.
    """
    if told is not None:
        return told * 1e12
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    name = torch.cuda.get_device_name(device)
    return peak_of(name, "bf16" if bf16 else "tf32" if tf32 else "fp32")


def peak_of(name: str, precision: Literal["bf16", "tf32", "fp32"]) -> float | None:
    """The same by the device's name, from the table; None when it isn't there."""
    for pattern, bf16, fp32 in _PEAKS:
        if re.search(rf"\b{pattern}\b", name) and "MIG" not in name:  # a slice is not the whole
            # Tensor cores take half as many numbers of TF32 as of bf16 at a time.
            tf32 = fp32 if bf16 is None else bf16 / 2
            tera = {"bf16": bf16, "tf32": tf32, "fp32": fp32}[precision]
            return None if tera is None else tera * 1e12
    return None


_PEAKS: tuple[tuple[str, float | None, float | None], ...] = (
    ("B200", 2250.0, None),
    ("(GH200|H200)", 989.4, 66.9),
    ("H100 NVL", 835.0, 60.0),
    ("H100 PCIe", 756.0, 51.2),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("A40", 149.7, 37.4),
    ("A30", 165.0, 10.3),
    ("A10", 125.0, 31.2),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 4090$", 165.2, 82.6),
    ("V100-SXM2", None, 15.7),
)
"""Name, and NVIDIA's data sheets' TFLOP/s without sparsity: bf16 on tensor cores, float32 (no TF32)."""

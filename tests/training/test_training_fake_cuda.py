"""A whole step in bf16 on CUDA, without CUDA: forward, losses, backward, clipping, optimizer, average.

Its tensors are torch's fake ones, with a device and a dtype and no values; a stand-in for CUDA's streams
(fake_cuda.cpp) lets a torch for CPUs differentiate them. So every operator of a step is known by its
devices and dtypes. What no kernel is there for can't be seen: padded attention runs as torch's own
products in float32 here, where CUDA has fused ones, and streams are those of fake_cuda_steps.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_waits import CASES

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for CUDA needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA itself"),
]

PASSES = {name: 4 for name in CASES} | {"generate": 8, "packed": 2}
"""Forward passes of two steps; generate has two of each micro-batch."""

LAYERS = 2


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    there, built = Path(torch.__file__).parent, tmp_path_factory.mktemp("cuda") / "fake_cuda.so"
    flags = ("-std=c++20", "-O0", "-shared", "-fPIC", f"-I{there}/include", f"-L{there}/lib")
    subprocess.run(
        ["g++", *flags, str(HERE / "fake_cuda.cpp"), "-o", str(built), "-lc10", f"-Wl,-rpath,{there}/lib"],
        check=True,
        timeout=300,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda_steps.py")],
        env={**os.environ, "LD_PRELOAD": str(built), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", CASES)
def test_all_of_a_step_is_on_the_device(steps: dict[str, dict[str, Any]], name: str) -> None:
    step = steps[name]
    assert step["mixed"] == []
    assert step["operators"] > 1000
    assert step["step"] == 1, "the second step was settled"
    assert step["without"] == [], "what is trained has a gradient"
    assert step["grads"] == step["kept"] == ["cuda:0 torch.float32"]


@pytest.mark.parametrize("name", CASES)
def test_products_are_in_bf16_and_what_has_to_be_exact_is_not(
    steps: dict[str, dict[str, Any]], name: str
) -> None:
    dtypes = steps[name]["dtypes"]
    products = dtypes.pop("product")
    assert products.pop("bfloat16") >= 20 * PASSES[name]
    # The kernel of packed attention has a sum of float32 beside bf16; torch's own padded attention has
    # two products of float32, and four in the backward pass; cell similarity one, and two.
    if name == "packed":
        assert products == {"bfloat16+float32": LAYERS * PASSES[name]}
    else:
        similarity = 3 * PASSES[name] if name in ("integrate", "domain norm") else 0
        assert products.pop("float32") == 6 * LAYERS * PASSES[name] + similarity
        # Statistics by domain are summed as they are on a CPU.
        assert set(products) == ({"float64"} if name == "domain norm" else set())
    assert {"native_layer_norm"} <= set(dtypes)
    for kind, found in dtypes.items():
        assert set(found) <= {"float32", "float64"}, kind


def test_what_is_on_two_devices_is_seen(steps: dict[str, dict[str, Any]]) -> None:
    assert [said.split(":")[0] for said in steps["seen"]["mixed"]] == [
        "aten.mul.Tensor",
        "aten.index.Tensor",
        "aten.add.Tensor",
    ]
    assert "found at least two devices" in steps["seen"]["refused"]

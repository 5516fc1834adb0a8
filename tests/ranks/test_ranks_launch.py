"""Where a process computes and which of several it is, as CUDA, torchrun, Slurm and MPI say it."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from train_support import small_config

from scshards.applying.embed import embed
from scshards.applying.evaluate import evaluate_run
from scshards.applying.options import EmbedOptions
from scshards.base.errors import ConfigError
from scshards.ranks.ranks import check_packed, ranks
from scshards.training.log.flops import peak_flops
from scshards.training.loop import train

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def gpus(monkeypatch):
    """gpus(7, 0): this machine has four GPUs of that compute capability, as torch.cuda tells of them."""

    def have(major: int, minor: int, name: str = "a GPU") -> None:
        about = types.SimpleNamespace(major=major, minor=minor, name=name)
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: 4,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_properties": lambda device=None: about,
            "get_device_capability": lambda device=None: (major, minor),
            "get_device_name": lambda device=None: name,
            # What torch computes with effort in place of a GPU that can't: any will do so.
            "_check_bf16_tensor_supported": lambda device: True,
        }
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, answer)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())

    return have


@pytest.fixture
def env(monkeypatch):
    """env(RANK="1", ...): the environment says that and nothing else of other processes."""
    for name in (*TORCHRUN, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def has(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return has


def _refused(match: str, **asked: str) -> ConfigError:
    with pytest.raises(ConfigError, match=match) as e, ranks(**asked):
        pytest.fail("it was not refused")
    return e.value


def test_a_gpu_without_bf16_computes_in_fp32_and_that_is_said(gpus, caplog):
    gpus(7, 0, "Tesla V100")
    with ranks("cuda") as here:
        assert not here.bf16
        assert isinstance(here.autocast(), contextlib.nullcontext)
    assert caplog.messages == ["precision: fp32, as this GPU has no bf16: Tesla V100 has 7.0"]
    e = _refused("bf16 needs", device="cuda", precision="bf16")
    assert "Tesla V100 has 7.0" in e.what and "run.precision=fp32" in str(e)
    caplog.clear()
    with ranks("cuda", "fp32") as here:
        assert not here.bf16
    gpus(8, 0)
    for precision in ("auto", "bf16"):
        with ranks("cuda", precision) as here:
            assert here.bf16
    assert not caplog.messages


def test_a_precision_that_there_is_none_of_is_refused():
    assert "auto, fp32 or bf16" in str(_refused("no such precision: 'fp16'", precision="fp16"))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_packed_batches_are_refused_where_no_kernel_takes_them(gpus, shards, tmp_path, capability):
    gpus(*capability, "Tesla T4")
    config = small_config("run.device=cuda", "data.tokens_per_batch=640")
    with pytest.raises(ConfigError, match="packed batches need") as e:
        train(shards, tmp_path / "run", config, shown=False)
    assert "Tesla T4 has {}.{}".format(*capability) in str(e.value)
    assert "leave data.tokens_per_batch out" in str(e.value)
    assert not (tmp_path / "run").exists()
    gpus(8, 6)
    check_packed(torch.device("cuda", 0))
    check_packed(torch.device("cpu"))


def test_fp32_is_on_tensor_cores_where_there_are_some_and_only_meanwhile(gpus):
    def products(**asked: str) -> tuple[str, bool]:
        with ranks(**asked):
            return torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()

    before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    assert before[0] == "highest"
    gpus(9, 0, "NVIDIA H100 80GB HBM3")
    assert products(device="cuda", precision="fp32") == ("high", False)
    # In bf16 the few sums and products that are not are exact ones on purpose.
    assert products(device="cuda", precision="bf16") == ("highest", False)
    with ranks("cuda", "fp32") as here:
        assert peak_flops(here.device, bf16=False) == 989.4e12 / 2
    assert peak_flops(here.device, bf16=False) == pytest.approx(66.9e12)
    gpus(7, 0)
    assert products(device="cuda", precision="fp32") == ("highest", False)
    assert products(device="cpu", precision="fp32") == before
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled())


def test_each_process_of_a_machine_has_its_own_gpu(gpus, env):
    gpus(8, 0)
    with ranks("cuda:3") as here:
        assert here.device == torch.device("cuda", 3)
    env(**TORCHRUN)
    e = _refused("cuda:3 is one GPU, and 4 processes of this machine", device="cuda:3")
    assert "run.device=cuda:" in str(e)
    env(LOCAL_RANK="4")
    _refused("CUDA device 4 is not there: this machine has 4", device="cuda")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"RANK": "3"}, "RANK is set, and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, and RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set, and RANK and WORLD_SIZE are not"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "MASTER_ADDR and MASTER_PORT are not"),
        (TORCHRUN | {"MASTER_PORT": ""}, "and MASTER_PORT is not"),
        (TORCHRUN | {"RANK": "8"}, "no rank 8 of 8"),
        (TORCHRUN | {"RANK": "first"}, "RANK is 'first', which is no number"),
        (TORCHRUN | {"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', which is no number"),
    ],
)  # fmt: skip
def test_half_an_environment_is_told(env, given, missing):
    env(**given)
    assert "torchrun" in str(_refused(missing, device="cpu"))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"},
            "torchrun --nproc-per-node 8 ",
        ),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, "torchrun --nproc-per-node 8 "),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            },
            "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            "torchrun --nnodes 3 --nproc-per-node 2 ",
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "torchrun --nproc-per-node 4 "),
    ],
)
def test_what_srun_and_mpirun_started_is_told_the_line_to_write(env, monkeypatch, given, line):
    monkeypatch.setattr("sys.argv", ["/opt/bin/scshards", "train", "shards", "-o", "run"])
    env(**given)
    e = _refused("(srun|mpirun) started [0-9] processes", device="cpu")
    assert f"{line}" in str(e) and "-m scshards train ..." in str(e)
    env(RANK="0", WORLD_SIZE="1")  # as it is told, for tasks that are runs of their own
    with ranks("cpu") as here:
        assert here.world_size == 1


@pytest.mark.parametrize(
    "given",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        # A batch script of a job with eight tasks, which is one process; and a task of one in a job.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"},
        # torchrun with one process, in a task of each of two nodes.
        {
            "SLURM_PROCID": "1",
            "SLURM_STEP_NUM_TASKS": "2",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        },
    ],
)
def test_one_process_is_one_process_wherever_it_is_started(env, given):
    env(**given)
    with ranks("cpu") as here:
        assert (here.rank, here.world_size) == (0, 1)


def test_embed_and_evaluate_are_refused_alike(env, shards, tmp_path):
    train(shards, tmp_path / "run", small_config("run.steps=1"), shown=False)
    env(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="2")
    run, out = str(tmp_path / "run"), tmp_path / "out.h5ad"
    with pytest.raises(ConfigError, match="mpirun started 4"):
        embed(run, shards, out, EmbedOptions(device="cpu"), shown=False)
    with pytest.raises(ConfigError, match="mpirun started 4"):
        evaluate_run(run, shards, device="cpu", shown=False)
    assert not out.exists()

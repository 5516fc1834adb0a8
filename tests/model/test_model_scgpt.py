"""scGPT's checkpoints: what its own code computes from them, its layouts, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scshards.base.errors import CheckpointError, StorageError
from scshards.base.storage import Storage
from scshards.model.config import ModelConfig
from scshards.model.scgpt import load_model, read_folder, to_own_layout, write_folder
from scshards.model.transformer import CellModel


def edit_args(folder: Path, **changes: object) -> None:
    args = json.loads((folder / "args.json").read_text()) | changes
    args = {k: v for k, v in args.items() if v != "absent"}
    (folder / "args.json").write_text(json.dumps(args))


def edit_state(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = dict(torch.load(folder / "best_model.pt", weights_only=True))
    edit(state)
    torch.save(state, folder / "best_model.pt")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", ["Wqkv", "in_proj", "_impl"])
def test_all_layouts_come_to_ours(small: ModelConfig, layout: str, prefix: str) -> None:
    state = CellModel(small).state_dict()
    other = {}
    for name, tensor in state.items():
        if layout == "in_proj":
            name = re.sub(r"Wqkv\.(weight|bias)", r"in_proj_\1", name)
        elif layout == "_impl":
            name = re.sub(r"self_attn\.", "self_attn._impl.", name)
        other[prefix + name] = tensor
    assert len(other) == len(state)
    assert (other.keys() == state.keys()) == (layout == "Wqkv" and not prefix)
    back = to_own_layout(other)
    assert list(back) == list(state)
    assert all(
        back[name] is other_tensor for name, other_tensor in zip(back, other.values(), strict=True)
    )


def test_one_tensor_under_two_names_is_refused(small: ModelConfig) -> None:
    state = dict(CellModel(small).state_dict())
    name = "transformer_encoder.layers.0.self_attn.in_proj_bias"
    state[name] = state[name.replace("in_proj_", "Wqkv.")]
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.Wqkv\.bias twice"):
        to_own_layout(state)


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_value": -2.5},
        {"mvc": False},
        {"generate": True},
        {"value_style": "category", "pad_value": 51.0, "mask_value": 52.0, "generate": True},
        {"value_style": "scaling", "cell_style": "w-pool", "n_class_layers": 2},
        {"explicit_zero_prob": True, "mvc_style": "inner product, detach", "n_classes": 4},
        {"n_classes": 2, "n_class_layers": 1},
        {"n_classes": 2, "n_class_layers": 5, "cell_style": "avg-pool"},
        {"n_domains": 3, "use_domain_labels": True},
        {"n_domains": 3, "adversary": True},
        {"n_domains": 3, "domain_norm": True},
        {"n_domains": 1, "use_domain_labels": True, "adversary": True, "domain_norm": True},
    ],
    ids=str,
)
def test_written_and_read_back(
    tmp_path: Path, small: ModelConfig, changes: dict[str, object]
) -> None:
    config = ModelConfig(**(vars(small) | {"dropout": 0.1} | changes))
    model = CellModel(config, seed=9)
    vocab = {f"G{i}": i for i in range(37)} | {"<pad>": 37, "<cls>": 38, "<eoc>": 39}
    shuffled = dict(sorted(vocab.items()))
    folder = str(tmp_path / "run" / "best")
    write_folder(folder, model, shuffled, {"lr": 1e-3, "input_style": "log1p"})
    assert sorted(p.name for p in Path(folder).iterdir()) == [
        "args.json",
        "best_model.pt",
        "vocab.json",
    ]
    loaded = load_model(folder)
    assert loaded.model.config == config
    assert loaded.unused == []
    assert list(loaded.vocab.items()) == list(vocab.items())
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert loaded.args["lr"] == 1e-3
    assert loaded.args["input_style"] == "log1p"
    # Writing again replaces, and what was read writes the same bytes.
    before = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    write_folder(folder, loaded.model, loaded.vocab, {"lr": 1e-3, "input_style": "log1p"})
    assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == before


def test_what_scgpt_reads_is_there(tmp_path: Path, small: ModelConfig) -> None:
    vocab = {"<pad>" if i == small.pad_id else f"G{i}": i for i in range(small.n_tokens)}
    write_folder(str(tmp_path), CellModel(small).to(torch.bfloat16), vocab)
    args = json.loads((tmp_path / "args.json").read_text())
    expected = {
        "embsize": 16,
        "nheads": 4,
        "d_hid": 24,
        "nlayers": 2,
        "n_layers_cls": 3,
        "dropout": 0.2,
        "pad_token": "<pad>",
        "pad_value": -2,
        "mask_value": -1,
        "n_bins": 51,
        "max_seq_len": 1200,
        "input_emb_style": "continuous",
        "input_style": "binned",
        "training_tasks": "pcpt",
    }
    assert {k: args[k] for k in expected} == expected
    assert isinstance(args["pad_value"], int)
    state = torch.load(tmp_path / "best_model.pt", weights_only=True)
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert state.keys() == CellModel(small).state_dict().keys()


def test_published_args_are_supported(golden: Path, copy: Path) -> None:
    published = {
        "training_tasks": "both",
        "mask_ratio": [0.25, 0.5, 0.75],
        "warmup_ratio_or_step": 10000.0,
        "no_cls": True,
        "fast_transformer": True,
        "MVC": True,
        "USE_GENERATIVE_TRAINING": True,
        "load_model": None,
    }
    edit_args(copy, **published)
    assert load_model(str(copy)).args["mask_ratio"] == [0.25, 0.5, 0.75]
    for name in ("mask_value", "n_bins", "max_seq_len"):
        edit_args(copy, **{name: "absent"})
    assert load_model(str(copy)).model.config.max_length == 1200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cell_emb_style", "max-pool"),
        ("mvc_decoder_style", "concat query"),
        ("domain_spec_batchnorm", "do_affine"),
        ("domain_spec_batchnorm", "batchnorm"),
        ("input_emb_style", ["continuous"]),
        ("pre_norm", True),
    ],
)
def test_other_settings_are_refused(copy: Path, name: str, value: object) -> None:
    edit_args(copy, **{name: value})
    with pytest.raises(CheckpointError, match=name):
        load_model(str(copy))


def test_each_tensor_that_does_not_fit_is_named(copy: Path) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        del state["decoder.fc.2.bias"], state["encoder.enc_norm.weight"]
        state["mod_encoder.embedding.weight"] = torch.zeros(2, 2)
        state["value_encoder.linear1.weight"] = torch.zeros(32, 2)

    edit_state(copy, spoil)
    with pytest.raises(CheckpointError) as e:
        load_model(str(copy))
    for line in (
        "missing: decoder.fc.2.bias",
        "missing: encoder.enc_norm.weight",
        "unexpected: mod_encoder.embedding.weight",
        "shape of value_encoder.linear1.weight: [32, 2] instead of [32, 1]",
        "best_model.pt",
    ):
        assert line in str(e.value)
    assert str(e.value).count("\n    ") == 4


def test_other_heads_are_listed(copy: Path) -> None:
    edit_state(copy, lambda state: state.update({"bn.weight": torch.zeros(2)}))
    assert load_model(str(copy)).unused == ["bn.weight"]
    # scGPT gives models that do not classify a head of one class.
    out = "cls_decoder.out_layer"
    one = {f"{out}.weight": torch.zeros(1, 32), f"{out}.bias": torch.zeros(1)}
    edit_state(copy, lambda state: state.update(one))
    model, _, _, unused = load_model(str(copy))
    assert model.config.n_classes == 0
    assert len(unused) == 11
    # A model whose values scale its genes can't generate, whatever flag it carries.
    edit_args(copy, input_emb_style="scaling")

    def drop(state: dict[str, Tensor]) -> None:
        for name in [n for n in state if n.startswith("value_encoder")]:
            del state[name]
        state["flag_encoder.weight"] = torch.zeros(2, 32)

    edit_state(copy, drop)
    assert "flag_encoder.weight" in load_model(str(copy)).unused


@pytest.mark.parametrize("name", ["dsbn.bns.0.weight", "cls_decoder.embedding", "bns.0.weight"])
def test_parts_that_do_not_fit_are_named(copy: Path, name: str) -> None:
    edit_state(copy, lambda state: state.update({name: torch.zeros(32)}))
    with pytest.raises(CheckpointError, match=f"unexpected: {name}"):
        load_model(str(copy))


def test_domains_that_args_promise_are_missed(copy: Path) -> None:
    edit_args(copy, DSBN=True, num_batch_labels=2)
    with pytest.raises(CheckpointError, match=r"missing: dsbn\.bns\.1\.running_var"):
        load_model(str(copy))
    edit_args(copy, num_batch_labels="absent")
    with pytest.raises(CheckpointError, match="num_batch_labels"):
        load_model(str(copy))


def test_mvc_that_args_promise_is_missed(copy: Path) -> None:
    def drop(state: dict[str, Tensor]) -> None:
        for name in [n for n in state if n.startswith("mvc_decoder")]:
            del state[name]

    edit_state(copy, drop)
    assert load_model(str(copy)).model.mvc_decoder is None
    edit_args(copy, MVC=True)
    with pytest.raises(CheckpointError, match=r"missing: mvc_decoder\.W\.weight"):
        load_model(str(copy))


def test_vocabulary_of_another_size(copy: Path) -> None:
    vocab = json.loads((copy / "vocab.json").read_text())
    (copy / "vocab.json").write_text(json.dumps(vocab | {"extra": len(vocab)}))
    with pytest.raises(CheckpointError, match=r"encoder.embedding.weight: \[203, 32\]"):
        load_model(str(copy))


@pytest.mark.parametrize(
    "vocab", ["[]", "{}", '{"a": 0, "b": 2}', '{"a": 0, "b": 0}', '{"a": "0"}', '{"a": true}', "{"]
)
def test_vocabulary_that_is_none(copy: Path, vocab: str) -> None:
    (copy / "vocab.json").write_text(vocab)
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        read_folder(str(copy))


@pytest.mark.parametrize(
    "changes",
    [
        {"embsize": "absent"},
        {"embsize": "wide"},
        {"embsize": 32.5},
        {"nlayers": True},
        {"nheads": 5},
        {"dropout": 1.5},
        {"pad_token": "absent"},
        {"pad_token": "<none>"},
    ],
    ids=str,
)
def test_args_that_are_no_model(copy: Path, changes: dict[str, object]) -> None:
    edit_args(copy, **changes)
    with pytest.raises(CheckpointError, match=r"args\.json"):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "best_model.pt"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        read_folder(str(copy))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks args\.json, vocab\.json, best_model\.pt"):
        read_folder(str(tmp_path / "nowhere"))


class Foreign:
    """An object that plain tensors do not need."""


@pytest.mark.parametrize("kind", ["noise", "empty", "short", "object", "nested", "list"])
def test_weights_that_are_no_state(copy: Path, kind: str) -> None:
    file = copy / "best_model.pt"
    match kind:
        case "noise":
            file.write_bytes(b"\x00\x01 not a checkpoint")
        case "empty":
            file.write_bytes(b"")
        case "short":
            file.write_bytes(file.read_bytes()[:5000])
        case "object":
            torch.save({"x": Foreign()}, file)
        case "nested":
            torch.save({"model": {"w": torch.zeros(2)}, "step": 3}, file)
        case "list":
            torch.save([torch.zeros(2)], file)
    with pytest.raises(CheckpointError, match=r"best_model\.pt") as e:
        read_folder(str(copy))
    assert "weights_only" not in str(e.value)


def test_writing_with_a_vocabulary_that_does_not_fit(tmp_path: Path, small: ModelConfig) -> None:
    model = CellModel(small)
    with pytest.raises(CheckpointError, match="39 tokens, the model 40"):
        write_folder(str(tmp_path), model, {f"G{i}": i for i in range(39)})
    with pytest.raises(CheckpointError, match="once each"):
        write_folder(str(tmp_path), model, {f"G{i}": i // 2 for i in range(40)})
    assert list(tmp_path.iterdir()) == []


def test_garbage_of_a_failed_write_holds_no_view_of_a_buffer(
    tmp_path: Path, small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12.1 ends with SIGSEGV where it collects one, 3.13.0 complains on stderr."""
    written: dict[str, object] = {}

    def write(storage: Storage, name: str, data: object) -> None:
        written[name] = data
        if name == "best_model.pt":
            raise StorageError("no room")

    monkeypatch.setattr(Storage, "write", write)
    vocab = {"<pad>" if i == small.pad_id else f"G{i}": i for i in range(small.n_tokens)}
    with pytest.raises(StorageError, match="no room"):
        write_folder(str(tmp_path), CellModel(small), vocab)
    assert len(written) == 3
    assert not [name for name, data in written.items() if isinstance(data, memoryview)]

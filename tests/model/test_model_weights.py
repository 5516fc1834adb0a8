"""model.weights: damaged bytes, false claims and numbers that are not finite are refused by name."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scshards.base.errors import CheckpointError
from scshards.model import scgpt_files
from scshards.model.config import ModelConfig
from scshards.model.scgpt import load_model, load_weights, tables_of, write_folder
from scshards.model.transformer import CellModel
from scshards.model.weights import not_finite, read_weights


def saved(state: object, **options: Any) -> bytes:
    data = io.BytesIO()
    torch.save(state, data, **options)
    return data.getvalue()


def rewritten(
    data: bytes, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    """The same zip with other entries, whose sums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def edited(folder: Path, **changes: object) -> str:
    args = json.loads((folder / "args.json").read_text()) | changes
    (folder / "args.json").write_text(json.dumps(args))
    return str(folder)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


STATE = {"a": torch.arange(12.0).view(3, 4), "none": torch.zeros(0, 3), "n": torch.tensor(7)}


def test_no_flipped_bit_gives_other_weights() -> None:
    data = saved(STATE)
    refused = 0
    for i in range(len(data)):
        spoiled = bytearray(data)
        spoiled[i] ^= 1 << i % 8
        try:
            assert same(read_weights(bytes(spoiled), "best_model.pt"), STATE), i
        except CheckpointError as e:
            assert e.where == "best_model.pt" and "\n" not in e.what and e.advice
            refused += 1
    assert refused > 300  # the rest is padding, dates and the like


def test_what_has_no_sums_is_read() -> None:
    old = saved(STATE, _use_new_zipfile_serialization=False)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        without = saved(STATE)
    finally:
        torch.serialization.set_crc32_options(before)
    parameters = {k: torch.nn.Parameter(t) for k, t in STATE.items() if t.is_floating_point()}
    for data in (old, without, saved(parameters | {"n": STATE["n"]})):
        found = read_weights(data, "x")
        assert same(found, STATE)
        assert all(type(t) is Tensor for t in found.values())


def test_tensors_may_share_what_they_are_made_of() -> None:
    whole = torch.arange(12.0).view(3, 4)
    found = read_weights(saved({"a": whole, "b": whole[1:], "c": whole.T}), "x")
    assert same(found, {"a": whole, "b": whole[1:], "c": whole.T})


@pytest.mark.parametrize(
    ("data", "what"),
    [
        # Read on trust, these would be memory of something else, or terabytes.
        (
            rewritten(saved(STATE), lambda n, d: d[:4] if n.endswith("data/0") else d),
            "claims 48 bytes for the storage 0 and has 4",
        ),
        (
            rewritten(saved(STATE), lambda n, d: d, zipfile.ZIP_DEFLATED),
            "compressed",
        ),
        (saved({"w": torch.ones(1).expand(10**6, 10**6)}), r"w claims the shape \[1000000, 10"),
        (saved({"w": torch.empty(10**6, 10**6, device="meta")}), "w is strided on meta"),
        (saved({"w": torch.eye(3).to_sparse()}), "w is sparse_coo on cpu"),
        (saved({"w": torch.zeros(2, dtype=torch.complex64)}), "w is of complex64"),
        (b"PK\x03\x04", "can't be read"),
        (saved({1: torch.zeros(2)}), "state_dict"),
    ],
    ids=["claim", "compressed", "expanded", "meta", "sparse", "complex", "head", "key"],
)  # fmt: skip
def test_what_is_no_plain_weights(data: bytes, what: str) -> None:
    with pytest.raises(CheckpointError, match=what) as e:
        read_weights(data, "f.pt")
    assert e.value.where == "f.pt" and e.value.advice


class Asked:
    """Pickled as a tensor that is made by its size."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.Tensor, (1000, 1000)


def test_a_tensor_that_is_in_no_file() -> None:
    with pytest.raises(CheckpointError, match="take 4,000,000 bytes, and it has"):
        read_weights(saved({"w": Asked()}), "f.pt")


def test_an_entry_twice_is_refused() -> None:
    data = io.BytesIO(saved(STATE))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("archive/DATA/0", bytes(48))
    with pytest.raises(CheckpointError, match="twice"):
        read_weights(data.getvalue(), "f.pt")


def test_what_is_not_finite_is_found() -> None:
    nan, inf = torch.tensor([1.0, torch.nan, 2.0]), torch.tensor([[0.0, -torch.inf]])
    tensors = STATE | {"nan": nan, "inf": inf.half(), "bf": nan.bfloat16(), "f8": inf.double()}
    assert not_finite(tensors.items()) == ["nan", "inf", "bf", "f8"]
    assert not_finite({}.items()) == []


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e300])
def test_weights_that_are_not_finite_are_named(copy: Path, value: float) -> None:
    state = torch.load(copy / "best_model.pt", weights_only=True)
    config, vocab = load_model(str(copy)).model.config, load_model(str(copy)).vocab
    name = "decoder.fc.2.bias"
    state[name] = state[name].double()
    state[name][3] = value
    state["bn.weight"] = torch.full((2,), torch.nan)  # of no use, so it harms nobody
    torch.save(state, copy / "best_model.pt")
    with pytest.raises(CheckpointError, match=f"infinity in {name}\\n") as e:
        load_model(str(copy))
    assert e.value.where == str(copy / "best_model.pt")
    model = CellModel(config)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"infinity in {name}\\n"):
        load_weights(model, str(copy), vocab)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("name", ["encoder.embedding.weight", "encoder.enc_norm.bias"])
def test_whole_numbers_are_no_weights(copy: Path, name: str) -> None:
    loaded = load_model(str(copy))
    state = torch.load(copy / "best_model.pt", weights_only=True)
    torch.save(state | {name: state[name].long()}, copy / "best_model.pt")
    with pytest.raises(CheckpointError, match=f"type of {name}: int64 instead of float32"):
        load_model(str(copy))
    with pytest.raises(CheckpointError, match=f"type of {name}: int64 instead of float32"):
        load_weights(CellModel(loaded.model.config), str(copy), loaded.vocab)


def test_what_is_not_finite_is_not_written(tmp_path: Path, small: ModelConfig) -> None:
    model = CellModel(small)
    vocab = {"<pad>" if i == small.pad_id else f"G{i}": i for i in range(small.n_tokens)}
    write_folder(str(tmp_path), model, vocab)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        model.encoder.embedding.weight[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"encoder\.embedding\.weight"):
        write_folder(str(tmp_path), model, vocab, {"lr": 2.0})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nlayers", 10**9),
        ("nlayers", "12"),
        ("nlayers", 10**400),
        ("nheads", -8),
        ("nheads", 0),
        ("embsize", 10**9),
        ("embsize", 1 << 15),
        ("d_hid", 1 << 20),
        ("max_seq_len", 10**12),
        ("n_bins", 10**12),
        ("dropout", 10**400),
        ("pad_value", 10**400),
        ("mask_value", float("nan")),
        ("pad_token", ["<pad>"] * 10**5),
        ("pad_token", "x" * 10**5),
        ("input_emb_style", "x" * 10**5),
        ("cell_emb_style", [["cls"]] * 10**3),
        ("mvc_decoder_style", 10**400),
    ],
)
def test_args_are_bounded_before_anything_is_built(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    folder = edited(copy, **{name: value})

    def build(*_: object, **__: object) -> None:
        raise AssertionError("a model is built of this")

    monkeypatch.setattr("scshards.model.scgpt.CellModel", build)
    for read in (load_model, tables_of):
        with pytest.raises(CheckpointError) as e:
            read(folder)
        said = e.value
        assert (
            "args.json" in str(said.where) and len(said.what) < 300 and said.what.count("\n") <= 1
        )


def test_class_layers_that_no_weights_tell_are_bounded(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="n_layers_cls = 1000000000 is not from 1 to 100"):
        tables_of(edited(copy, n_layers_cls=10**9))


def test_domains_are_bounded_before_anything_is_built(copy: Path) -> None:
    folder = edited(copy, domain_spec_batchnorm=True, num_batch_labels=10**7)
    for read in (load_model, tables_of):
        with pytest.raises(CheckpointError, match="model of at least"):
            read(folder)


def test_a_class_head_of_a_million_layers(copy: Path) -> None:
    state = torch.load(copy / "best_model.pt", weights_only=True)
    state["cls_decoder.out_layer.weight"] = torch.zeros(3, 32)
    state["cls_decoder.out_layer.bias"] = torch.zeros(3)
    for place in ("2999999", "9" * 5000):
        torch.save(state | {f"cls_decoder._decoder.{place}.weight": torch.zeros(32)},
                   copy / "best_model.pt")  # fmt: skip
        with pytest.raises(CheckpointError, match=r"unexpected: cls_decoder\._decoder\."):
            load_model(str(copy))


def test_a_huge_vocabulary(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = json.loads((copy / "vocab.json").read_text())
    many = vocab | {f"more-{i}": i for i in range(len(vocab), 60_000)}
    (copy / "vocab.json").write_text(json.dumps(many))
    for read in (load_model, tables_of):
        with pytest.raises(CheckpointError, match="60,000 tokens"):
            read(str(copy))
    monkeypatch.setitem(scgpt_files.LARGEST, "vocab.json", 1000)
    for read in (load_model, tables_of):
        with pytest.raises(CheckpointError, match="is no vocab"):
            read(str(copy))
    (copy / "vocab.json").write_text('{"<pad>": "0", "G": 1}')
    with pytest.raises(CheckpointError, match="once each"):
        tables_of(str(copy))

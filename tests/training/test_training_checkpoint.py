"""Checkpoints on a disk and in an object store: what comes back, what is kept, what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from rank_host import RankFailed
from train_support import read_tensors, small_model

from scshards.base.errors import CheckpointError, StorageError
from scshards.base.storage import Storage
from scshards.ranks.ranks import Ranks
from scshards.training.config import OptimSettings
from scshards.training.optim import make_optimizer, moments
from scshards.training.save import store as checkpoint_store
from scshards.training.save.checkpoint import Checkpoints, TrainState, complete

ALONE = Ranks(0, 1, torch.device("cpu"))


def trained(steps: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a model and its optimizer after some steps."""
    model = small_model()
    optimizer = make_optimizer(model, OptimSettings(weight_decay=0.1))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.sin(p.detach() * 7)
        optimizer.step()
    kinds = {"model": model.state_dict(), "optimizer": moments(model, optimizer)}
    return {f"{kind}/{name}": t for kind, of in kinds.items() for name, t in of.items()}


def save(folder, *steps: int, tensors=None, **keep) -> None:
    with Checkpoints(folder, ALONE, **({"keep_last": 9} | keep)) as checkpoints:
        for step in steps:
            checkpoints.save(TrainState(step=step), trained() if tensors is None else tensors)


def load(folder, name: str, tensors) -> TrainState:
    return Checkpoints(folder, ALONE, keep_last=1).load(name, tensors)


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    state = TrainState(step=20, best_step=10, best={"loss": 0.1 + 0.2}, loader={"lanes": [1, 2]})
    tensors = trained()
    tensors["model/half"] = torch.randn(3, 5).to(torch.bfloat16)
    tensors["model/turned"] = torch.randn(4, 6).T
    tensors["model/none"] = torch.zeros(0, 7)
    tensors["model/count"] = torch.tensor(2**40 + 1)
    checkpoints = Checkpoints(tmp_path / "c", ALONE, keep_last=2)
    checkpoints.save(state, tensors)
    checkpoints.wait()
    assert checkpoints.latest() == "step-00000020"
    names = sorted(p.name for p in (tmp_path / "c" / "step-00000020").iterdir())
    assert names == ["0000-000.bin", "index.json", "state.json"]

    again = {name: torch.full_like(t, 7) for name, t in tensors.items()}
    assert checkpoints.load("step-00000020", again) == state
    assert all(t.equal(again[name]) for name, t in tensors.items())
    read = read_tensors(tmp_path / "c" / "step-00000020", "optimizer")
    assert read and all(t.equal(tensors[f"optimizer/{name}"]) for name, t in read.items())
    # The bytes are those of the tensor: read by hand.
    index = json.loads((tmp_path / "c/step-00000020/index.json").read_text())
    (piece,) = index["tensors"]["model/turned"]["pieces"]
    raw = (tmp_path / "c/step-00000020" / piece["file"]).read_bytes()[piece["start"] :]
    expected = tensors["model/turned"].contiguous().numpy().astype("<f4").tobytes()
    assert raw[: piece["nbytes"]] == expected


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    tensors = {"model/w": torch.arange(100_000.0)}
    checkpoints = Checkpoints(tmp_path, ALONE, keep_last=2)
    write, calls = Storage.write, []

    def slow(self, path, data):
        while not calls:
            pass  # until the training thread has changed the tensor
        write(self, path, data)

    monkeypatch.setattr(Storage, "write", slow)
    checkpoints.save(TrainState(step=1), tensors)
    assert checkpoints.latest() is None
    tensors["model/w"].zero_()
    calls.append(1)
    checkpoints.wait()
    assert checkpoints.latest() == "step-00000001"
    assert read_tensors(tmp_path / "step-00000001")["w"].equal(torch.arange(100_000.0))


def test_big_tensors_are_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_store, "FILE_BYTES", 5000)
    tensors = trained()
    save(tmp_path, 1, tensors=tensors)
    sizes = [p.stat().st_size for p in (tmp_path / "step-00000001").glob("*.bin")]
    assert len(sizes) > 3 and sum(sizes) == sum(t.nbytes for t in tensors.values())
    again = trained(steps=0)
    load(tmp_path, "step-00000001", again)
    assert all(t.equal(again[name]) for name, t in tensors.items())


def test_the_last_k_and_every_nth_are_kept(tmp_path):
    save(tmp_path / "a", 5, 10, 100, 15, keep_last=3)
    assert complete(tmp_path / "a") == ["step-00000010", "step-00000015", "step-00000100"]
    save(tmp_path / "b", *range(10, 80, 10), keep_last=2, keep_every=30)
    assert [int(n[5:]) for n in complete(tmp_path / "b")] == [30, 60, 70]


def killed(folder: str, writes: int) -> None:
    """Save twice, and die in the second save, after `writes` files of it or in what follows it."""
    save(folder, 1, keep_last=1)
    write, done = Storage.write, []

    def dies(self, path, data):
        write(self, path, data)
        done.append(path)
        if len(done) > writes:
            os.kill(os.getpid(), signal.SIGKILL)

    def half(self, path):
        (Path(self.local_path) / path / "index.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    Storage.write, Storage.remove_tree = dies, half
    save(folder, 2, keep_last=1)


@pytest.mark.parametrize(
    ("writes", "left"), [(0, 1), (2, 1), (9, 2)], ids=["data", "index", "removal"]
)
def test_a_run_that_is_killed_leaves_the_checkpoint_before(tmp_path, rank_host, writes, left):
    with rank_host.team(1) as one, pytest.raises(RankFailed) as e:
        one.run(f"{__name__}:killed", str(tmp_path), writes)
    assert e.value.codes == [-9], e.value
    assert len(list(tmp_path.iterdir())) == 2, "the torn one must be there, under another name"
    assert complete(tmp_path) == [f"step-{left:08d}"]
    assert load(tmp_path, f"step-{left:08d}", trained(steps=0)).step == left

    save(tmp_path, 3, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{left:08d}", "step-00000003"]


def test_an_object_store_has_them_complete_or_not_at_all(s3):
    root = f"{s3.url}/run"
    tensors = trained()
    save(root, 1, 2, tensors=tensors, keep_last=2)
    storage = Storage(root)
    storage.write("step-00000003/0000-000.bin", b"torn")  # what a killed save leaves
    assert complete(root) == ["step-00000001", "step-00000002"]
    again = trained(steps=0)
    load(root, "step-00000002", again)
    assert all(t.equal(again[name]) for name, t in tensors.items())
    save(root, 4, keep_last=1)
    assert complete(root) == ["step-00000004"]
    assert {p.split("/")[0] for p in storage.list()} == {"step-00000004"}


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    save(tmp_path, 1)
    name, path = "step-00000001", tmp_path / "step-00000001"
    with pytest.raises(CheckpointError, match=r"another model: .*model/more is missing"):
        load(tmp_path, name, trained() | {"model/more": torch.zeros(1)})
    other = trained()
    other["model/decoder.fc.0.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"\[16\] instead of \[3\]"):
        load(tmp_path, name, other)
    data = bytearray((path / "0000-000.bin").read_bytes())
    data[1000] ^= 1
    (path / "0000-000.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match="not those written") as e:
        load(tmp_path, name, trained())
    assert "remove this folder" in str(e.value)
    data[1000] ^= 1
    (path / "0000-000.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="ends early"):
        load(tmp_path, name, trained())
    index = json.loads((path / "index.json").read_text())
    for change in ({"start": -4}, {"sizes": [1 << 40]}, {"file": "../../x"}, {"nbytes": 1}):
        index["tensors"]["model/decoder.fc.0.bias"]["pieces"][0] |= change
        (path / "index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="can't be"):
            load(tmp_path, name, trained())
    (path / "state.json").write_text('{"format": 1, "step": 1}')
    with pytest.raises(CheckpointError, match="format 1, not 2"):
        load(tmp_path, name, trained())


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match=r"state\.json is of step 1"):
        load(tmp_path, "step-00000009", trained())


def test_a_save_that_fails_is_told_by_the_next_call(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(self, path, data):
        raise StorageError("the storage failed: No space left on device", where=self.at(path))

    checkpoints = Checkpoints(tmp_path, ALONE, keep_last=2)
    with monkeypatch.context() as m:
        m.setattr(Storage, "write", full)
        checkpoints.save(TrainState(step=2), trained())
        with pytest.raises(StorageError, match="No space left") as e:
            checkpoints.wait()
    assert "goes on from the checkpoint before" in str(e.value)
    assert complete(tmp_path) == ["step-00000001"]


def test_saving_a_step_again_only_renews_what_is_told_of_it(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / "0000-000.bin"
    inode = path.stat().st_ino
    state = TrainState(step=1, best_step=1, best={"loss": 2.0}, evaluated_step=1)
    Checkpoints(tmp_path, ALONE, keep_last=1).save(state, trained())
    assert path.stat().st_ino == inode
    assert load(tmp_path, "step-00000001", trained()) == state

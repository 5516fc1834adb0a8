"""A set that is added to while others read it: an epoch has the cells that it began with, and a state says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from loaders import loader_of
from pack_support import counts, quiet_pack, vocab_of, write

from scshards import verify
from scshards.base.errors import StateError
from scshards.packing.pack import append

GENES = 8


def test_an_addition_while_an_epoch_is_read(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.h5ad", counts(60, GENES, seed=i)) for i in range(2)]
    root = tmp_path / "set"
    quiet_pack(paths[:1], root, vocab_of(GENES), cells_per_shard=7)
    usual = {"batch_size": 4, "lanes": 2, "shuffle_buffer": 16, "drop_last": False, "seed": 3}
    whole = [b.key.tolist() for b in loader_of(root, **usual)]
    reading = loader_of(root, **usual)
    batches = iter(reading)
    found = [next(batches).key.tolist() for _ in range(3)]
    append(paths[1:], root, {"workers": 1}, progress=False)
    assert verify(root, progress=False).ok
    state = reading.state_dict()
    found += [b.key.tolist() for b in batches]
    assert found == whole
    # Whoever opens the set now has other cells, and a state of before is refused with a reason.
    later = loader_of(root, **usual)
    with pytest.raises(StateError, match="cells were added"):
        later.load_state_dict(state)
    keys = [k for b in later for k in b.key.tolist() if k >= 0]
    assert len(keys) == len(set(keys)) == 120

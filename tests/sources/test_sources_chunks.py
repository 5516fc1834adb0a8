"""HDF5 arrays read directly against h5py's own slices; what is not read so; damage is told."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_support import adata, counts, quiet_pack, vocab_of

from scshards.base.errors import SourceError
from scshards.sources import hdf5 as sources_chunks
from scshards.sources.hdf5 import direct

DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">i4", ">f8"]


@st.composite
def stored(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    """An array and how it is stored: in one piece or in chunks, with gzip and maybe shuffle."""
    n = draw(st.integers(1, 400))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    values = np.frombuffer(draw(st.randoms(use_true_random=False)).randbytes(8 * n), np.uint8)
    array = (values[: n * dtype.itemsize] & np.uint8(draw(st.sampled_from([1, 255])))).view(dtype)
    if draw(st.booleans()):
        return array, {}
    chunks = {"chunks": (draw(st.integers(1, 500)),), "maxshape": (None,)}
    if draw(st.booleans()):
        return array, chunks
    gzip = {"compression": "gzip", "compression_opts": draw(st.integers(0, 9))}
    return array, chunks | gzip | {"shuffle": draw(st.booleans())}


@given(stored(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=6))
def test_slices_are_those_of_h5py(
    tmp_path_factory: pytest.TempPathFactory, made: Any, slices: list[tuple[int, int]]
) -> None:
    array, options = made
    path = tmp_path_factory.mktemp("chunks") / "a.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset("a", data=array, **options)
    with h5py.File(path) as f:
        dataset = f["a"]
        fast = direct(dataset)
        assert fast is not dataset
        assert (fast.shape, fast.dtype, fast.chunks) == (array.shape, array.dtype, dataset.chunks)
        for a, b in [*slices, (0, len(array))]:
            got = fast[a:b]
            assert got.dtype == array.dtype and got.tobytes() == array[a:b].tobytes()
        assert fast[:].tobytes() == array.tobytes() and fast[-3:].tobytes() == array[-3:].tobytes()


def test_arrays_behind_a_user_block(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=1024) as f:
        f["plain"] = np.arange(1000)
        f.create_dataset("gzip", data=np.arange(1000), chunks=(77,), compression="gzip")
        f.create_dataset("chunks", data=np.arange(1000), chunks=(77,))
    with h5py.File(tmp_path / "a.h5") as f:
        for name in f:
            assert not isinstance(direct(f[name]), h5py.Dataset)
            assert direct(f[name])[5:900].tolist() == list(range(5, 900))


def test_a_remote_file_is_inflated_here_too(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["plain"] = np.arange(100)
        f.create_dataset("gzip", data=np.arange(100), chunks=(7,), compression="gzip")
    with (tmp_path / "a.h5").open("rb") as stream, h5py.File(stream) as f:
        assert isinstance(direct(f["plain"]), h5py.Dataset)
        assert not isinstance(direct(f["gzip"]), h5py.Dataset)
        assert direct(f["gzip"])[3:99].tolist() == list(range(3, 99))


OTHERS: dict[str, dict[str, Any]] = {
    "bool": {"data": np.ones(9, bool)},
    "text": {"data": np.array([b"a", b"b"])},
    "two dimensions": {"data": np.ones((3, 3)), "compression": "gzip"},
    "lzf": {"data": np.arange(9), "compression": "lzf"},
    "a checksum": {"data": np.arange(9), "compression": "gzip", "fletcher32": True},
    "too many chunks": {"data": np.arange(9), "chunks": (2,)},
    "empty": {"shape": (0,), "dtype": "i4", "maxshape": (None,), "compression": "gzip"},
    "never written": {"shape": (9,), "dtype": "i4", "fillvalue": 7},
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_stays_with_h5py(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_chunks, "MAX_CHUNKS", 4)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        dataset = f.create_dataset("a", **OTHERS[name])
        assert direct(dataset) is dataset


def test_chunks_that_were_never_written_stay_with_h5py(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as f:
        dataset = f.create_dataset("a", (20,), "i4", chunks=(5,), compression="gzip", fillvalue=3)
        dataset[:5] = 1
        assert direct(dataset)[:].tolist() == [1] * 5 + [3] * 15


def test_chunks_in_any_order(tmp_path: Path) -> None:
    """Chunks lie in the file as they were written, with others in between."""
    with h5py.File(tmp_path / "a.h5", "w") as f:
        a, b = (f.create_dataset(name, (100,), "i4", chunks=(10,)) for name in "ab")
        for k in np.random.default_rng(0).permutation(10).tolist():
            a[10 * k : 10 * k + 10] = np.arange(10 * k, 10 * k + 10)
            b[90 - 10 * k : 100 - 10 * k] = np.arange(10 * k, 10 * k + 10)
    with h5py.File(tmp_path / "a.h5") as f:
        for name in "ab":
            fast = direct(f[name])
            assert fast is not f[name]
            for low, high in [(0, 100), (13, 27), (10, 20), (99, 100), (5, 96)]:
                assert fast[low:high].tolist() == f[name][low:high].tolist()


def test_a_file_that_was_written_again_is_looked_at_again(tmp_path: Path) -> None:
    for i in range(3):
        with h5py.File(tmp_path / "a.h5", "w") as f:
            f[f"first{i}"] = np.zeros(1000 * i)
            f.create_dataset("a", data=np.arange(100) + i, chunks=(10,))
        with h5py.File(tmp_path / "a.h5") as f:
            assert direct(f["a"])[:].tolist() == list(range(i, 100 + i))


def test_a_chunk_that_went_without_its_filters(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as f:
        dataset = f.create_dataset("a", data=np.arange(20), chunks=(5,), compression="gzip")
        dataset.id.write_direct_chunk((5,), np.arange(50, 55).tobytes(), filter_mask=1)
    with h5py.File(tmp_path / "a.h5") as f:
        fast = direct(f["a"])
        assert fast is not f["a"]
        assert fast[:].tolist() == [*range(5), *range(50, 55), *range(10, 20)]


def test_a_chunk_over_two_slices_is_inflated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("a", data=np.arange(1000), chunks=(100,), compression="gzip")
        fast = direct(f["a"])
        inflated = []
        module = "scshards.sources.hdf5.isal_zlib.decompress"

        def decompress(data: bytes, bufsize: int) -> bytes:
            inflated.append(bufsize)
            return zlib.decompress(data)

        monkeypatch.setattr(module, decompress)
        read = [fast[a : a + 30] for a in range(0, 1000, 30)]
    assert np.concatenate(read).tolist() == list(range(1000))
    assert inflated == [800] * 10


# --- damage ----------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Any:
    """A function that writes an h5ad with other bytes for one chunk of its values."""

    def make(stored: bytes) -> Path:
        path = tmp_path / "damaged.h5ad"
        import scipy.sparse as sp

        adata(sp.csr_matrix(counts(50, 30))).write_h5ad(path, compression="gzip")
        with h5py.File(path, "a") as f:
            data = f["X/data"][:]
            del f["X/data"]
            made = f.create_dataset("X/data", data=data, chunks=(100,), compression="gzip")
            made.id.write_direct_chunk((200,), stored)
        return path

    return make


GOOD = np.ones(100, np.float32).tobytes()


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"no zlib stream", "chunk 2 can't be inflated"),
        (zlib.compress(GOOD)[:-6], "chunk 2 can't be inflated"),
        (zlib.compress(GOOD)[:-1] + b"!", "chunk 2 can't be inflated"),
        (zlib.compress(GOOD[:-4]), "chunk 2 has 396 bytes, not 400"),
        (zlib.compress(GOOD + bytes(4)), "chunk 2 has 404 bytes, not 400"),
    ],
)
def test_a_damaged_chunk_is_told(damaged: Any, tmp_path: Path, stored: bytes, said: str) -> None:
    path = damaged(stored)
    with pytest.raises(SourceError) as caught:
        quiet_pack(path, tmp_path / "out", vocab_of(30))
    assert said in caught.value.what and "damaged.h5ad: X" in str(caught.value.where)
    assert "download it again" in str(caught.value.advice)


def test_the_good_bytes_pack(damaged: Any, tmp_path: Path) -> None:
    quiet_pack(damaged(zlib.compress(GOOD)), tmp_path / "out", vocab_of(30))


def test_a_file_that_ends_within_an_array(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as f:
        f["a"] = np.arange(100_000)
    with h5py.File(path) as f:
        fast = direct(f["a"])
        with path.open("r+b") as g:
            g.truncate(400_000)
        with pytest.raises(OSError, match="ends within"):
            fast[:]

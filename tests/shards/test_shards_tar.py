"""Shards read by tarfile and stock webdataset; chunks, checksums and zstd frames."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from shardsets import encode_cell

from scshards.base.errors import ChecksumError, FormatError
from scshards.shards.members import EXTENSION
from scshards.shards.tar import (
    CHUNK_BYTES,
    MAX_ROWS,
    MAX_SOURCES,
    Chunks,
    Compression,
    build_tar,
    open_chunk,
    seal,
)

COMPRESSIONS: list[Compression] = ["none", "zstd"]


def tar_of(members: list[bytes], keys: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([len(m) for m in members], np.int64)
    payload = np.frombuffer(b"".join(members), np.uint8)
    return build_tar(
        payload,
        np.cumsum(sizes) - sizes,
        sizes,
        np.array([s for s, _ in keys], np.int64),
        np.array([r for _, r in keys], np.int64),
    )


MEMBERS = st.lists(
    st.tuples(
        st.integers(0, MAX_SOURCES - 1),
        st.integers(0, MAX_ROWS - 1),
        st.one_of(st.binary(max_size=60), st.integers(0, 3000).map(bytes)),
    ),
    max_size=12,
    unique_by=lambda m: m[:2],
)


@given(MEMBERS)
def test_tarfile_reads_it(members: list[tuple[int, int, bytes]]) -> None:
    tar, offsets = tar_of([m for _, _, m in members], [(s, r) for s, r, _ in members])
    with tarfile.open(fileobj=io.BytesIO(tar.tobytes()), mode="r:") as t:
        infos = t.getmembers()
        contents = [t.extractfile(i).read() for i in infos]  # type: ignore[union-attr]
    assert contents == [m for _, _, m in members]
    for info, offset, (source, row, data) in zip(infos, offsets, members, strict=True):
        assert info.name == f"{source:06d}-{row:010d}.cell.mp"
        assert info.offset_data == offset
        assert tar[offset : offset + len(data)].tobytes() == data
        assert (info.mode, info.mtime, info.uid, info.gid) == (0o644, 0, 0, 0)
        assert (info.uname, info.gname, info.type) == ("", "", tarfile.REGTYPE)


@given(MEMBERS)
def test_the_bytes_are_those_that_tarfile_writes(members: list[tuple[int, int, bytes]]) -> None:
    tar, _ = tar_of([m for _, _, m in members], [(s, r) for s, r, _ in members])
    out = io.BytesIO()
    for source, row, data in members:
        info = tarfile.TarInfo(f"{source:06d}-{row:010d}.cell.mp")
        info.size, info.mode = len(data), 0o644
        out.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
    out.write(bytes(1024))  # two closing blocks, and no padding to a "record" of 20 blocks
    assert tar.tobytes() == out.getvalue()


def test_members_may_lie_anywhere_in_the_payload() -> None:
    payload = np.frombuffer(b"--second--first", np.uint8)
    tar, _ = build_tar(
        payload, np.array([10, 2]), np.array([5, 6]), np.array([0, 0]), np.array([1, 2])
    )
    with tarfile.open(fileobj=io.BytesIO(tar.tobytes())) as t:
        contents = [t.extractfile(i).read() for i in t.getmembers()]  # type: ignore[union-attr]
    assert contents == [b"first", b"second"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its open file
def test_stock_webdataset_gives_the_msgpack_map(tmp_path: Path) -> None:
    import webdataset

    cells = [([1, 5], [2, 3], {"donor": 1}), ([7], [300], {"donor": -1}), ([], [], {"donor": 0})]
    tar, _ = tar_of([encode_cell(*c) for c in cells], [(0, 4), (0, 2), (3, 0)])
    (tmp_path / "000000.tar").write_bytes(tar.tobytes())
    url = str(tmp_path / "000000.tar")
    stock: list[Any] = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [s[EXTENSION] for s in stock] == [encode_cell(*c) for c in cells]
    samples: list[Any] = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [
        "000000-0000000004",
        "000000-0000000002",
        "000003-0000000000",
    ]
    assert [s[EXTENSION] for s in samples] == [msgpack.unpackb(encode_cell(*c)) for c in cells]


# --- chunks ----------------------------------------------------------------------------------


def noise(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A tar of members of these sizes, half of their bytes random."""
    rng = np.random.default_rng(len(sizes))
    members = [
        (rng.integers(0, 256, n, np.uint8) * rng.integers(0, 2, n, np.uint8)).tobytes()
        for n in sizes
    ]
    return tar_of(members, [(0, i) for i in range(len(sizes))])


def plain_chunks(tar: np.ndarray, offsets: np.ndarray) -> tuple[list[int], list[int]]:
    """The chunk rule in plain words: a member opens a chunk when its header is the first one at or
    after a multiple of CHUNK_BYTES; the first chunk begins with the file, the last ends with it."""
    starts, cells, mark = [], [], 0
    for offset in offsets.tolist():
        head = offset - 512
        if not starts or head >= mark:
            starts.append(head)
            cells.append(0)
            mark = (head // CHUNK_BYTES + 1) * CHUNK_BYTES
        cells[-1] += 1
    if not starts:
        starts, cells = [0], [0]
    bounds = [*starts, len(tar)]
    return cells, [b - a for a, b in itertools.pairwise(bounds)]


SIZES = st.lists(
    st.one_of(st.integers(0, 20_000), st.integers(0, 3 * CHUNK_BYTES)), max_size=12
)  # fmt: skip


@pytest.mark.parametrize("compression", COMPRESSIONS)
@given(sizes=SIZES)
def test_chunks_cover_the_file_by_the_rule(compression: Compression, sizes: list[int]) -> None:
    tar, offsets = noise(sizes)
    stored, chunks = seal(tar, offsets, compression)
    cells, raw = plain_chunks(tar, offsets)
    assert chunks.cells.tolist() == cells and chunks.raw.tolist() == raw
    assert chunks.stored.sum() == len(stored) and chunks.cells.sum() == len(sizes)
    assert len(chunks) == len(chunks.sums)
    parts = []
    for end, n, size, checksum in zip(
        np.cumsum(chunks.stored), chunks.stored, chunks.raw, chunks.sums, strict=True
    ):
        piece = stored[end - n : end]
        assert int(checksum) == xxhash.xxh64(piece.tobytes()).intdigest()
        opened = open_chunk(piece, int(size), int(checksum), compression, "here", "root")
        assert len(opened) == size
        if compression == "zstd":
            # Each chunk is one zstd frame that says how much it holds.
            frame = zstandard.get_frame_parameters(piece.tobytes())
            assert frame.content_size == size
        parts.append(opened.tobytes())
    assert b"".join(parts) == tar.tobytes()
    if compression == "none":
        assert stored.tobytes() == tar.tobytes()


def test_many_small_cells_share_chunks_of_about_a_mebibyte() -> None:
    tar, offsets = noise([5000] * 2000)
    _, chunks = seal(tar, offsets, "none")
    assert len(chunks) == -(-len(tar) // CHUNK_BYTES)
    assert (chunks.raw[:-1] > CHUNK_BYTES - 6000).all() and (chunks.raw < CHUNK_BYTES + 6000).all()


def test_the_whole_file_is_an_ordinary_tar_zst() -> None:
    tar, offsets = noise([400_000] * 8)
    stored, chunks = seal(tar, offsets, "zstd")
    assert len(chunks) > 2
    with zstandard.ZstdDecompressor().stream_reader(
        io.BytesIO(stored.tobytes()), read_across_frames=True
    ) as stream:
        assert stream.read() == tar.tobytes()
    with (
        zstandard.ZstdDecompressor().stream_reader(
            io.BytesIO(stored.tobytes()), read_across_frames=True
        ) as stream,
        tarfile.open(fileobj=stream, mode="r|") as t,
    ):
        assert [i.name for i in t] == [f"{0:06d}-{i:010d}.cell.mp" for i in range(8)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_sealing_is_deterministic(compression: Compression) -> None:
    tar, offsets = noise([300_000] * 5)
    a, b = seal(tar, offsets, compression), seal(tar.copy(), offsets, compression)
    assert a[0].tobytes() == b[0].tobytes() and a[1].sums.tolist() == b[1].sums.tolist()


# --- damaged chunks --------------------------------------------------------------------------


def one_chunk(compression: Compression) -> tuple[np.ndarray, Chunks]:
    tar, offsets = noise([3000] * 3)
    stored, chunks = seal(tar, offsets, compression)
    assert len(chunks) == 1
    return stored, chunks


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_any_changed_byte_is_found(compression: Compression) -> None:
    stored, chunks = one_chunk(compression)
    for at in range(0, len(stored), 97):
        changed = stored.copy()
        changed[at] ^= 1
        with pytest.raises(ChecksumError) as caught:
            open_chunk(
                changed, int(chunks.raw[0]), int(chunks.sums[0]), compression, "shard 5", "a set"
            )
        assert caught.value.where == "shard 5"
        assert "scshards verify 'a set' ends with the command" in str(caught.value.advice)
    with pytest.raises(ChecksumError):
        open_chunk(
            stored[:-1], int(chunks.raw[0]), int(chunks.sums[0]), compression, "shard 5", "a set"
        )


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"no frame at all",
        zstandard.ZstdCompressor().compress(b"x" * 100),
        zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 99),
        zstandard.ZstdCompressor().compress(b"x" * 99)[:-3],
        zstandard.ZstdCompressor().compress(b"x" * 99) + b"y",
        zstandard.ZstdCompressor().compress(b"x" * 99) * 2,
        # A frame that claims a tebibyte must not be given one.
        b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00",
    ],
)
def test_a_right_checksum_over_a_wrong_frame(frame: bytes) -> None:
    data = np.frombuffer(frame, np.uint8)
    with pytest.raises(FormatError, match="chunk") as caught:
        open_chunk(data, 99, xxhash.xxh64_intdigest(data), "zstd", "shard 5", "a set")
    assert not isinstance(caught.value, ChecksumError)


def test_a_manifest_and_a_frame_that_both_claim_a_tebibyte() -> None:
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    data = np.frombuffer(frame, np.uint8)
    with pytest.raises(FormatError, match="chunk"):
        open_chunk(data, 1 << 40, xxhash.xxh64_intdigest(data), "zstd", "shard 5", "a set")

"""What is fuzzed: readers of bytes from outside, each with its seeds and what has to hold.

    target = TARGETS["member"](folder)      a folder of its own for files
    target.seeds()                          bytes that are right
    target.check(data)                      whether they are taken; AssertionError or any other error: a finding

Either the right value comes out, by a second way to find it, or an error of base/errors.py. `held` adds
to that: in so much memory and so many seconds. Used by test_faults_fuzz.py, and by tools/fuzz.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import random
import resource
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import xxhash
import zstandard
from arrays_support import packed
from fuzz_changes import change_bytes, change_json, change_msgpack, change_parquet
from fuzz_plain import plain_kernels, read_arrays, read_member
from shardsets import encode_cell, make_set
from train_support import read_tensors

from scshards.base.errors import CheckpointError, FormatError, ScshardsError, VocabError
from scshards.cells.vocab import Vocab
from scshards.kernels import members as compiled
from scshards.packing.verify.repair import repair
from scshards.packing.verify.whole import verify
from scshards.ranks.ranks import Ranks
from scshards.shards.arrays import SparseRows, decode_arrays, encode_arrays
from scshards.shards.index import OWN_COLUMNS, check_bounds, read_index
from scshards.shards.manifest import ArrayInfo, LabelInfo, Manifest
from scshards.shards.members import decode_cell, decode_labels, decode_rows, encode_rows
from scshards.shards.shardset import ShardSet
from scshards.shards.tar import open_chunk
from scshards.streaming.dataset import CellDataset
from scshards.training.save.checkpoint import (
    Checkpoints,
    TrainState,
    read_state,
)
from scshards.training.save.store import DTYPES

SECONDS, MEMORY = 20, 500_000_000
"""What one input may take."""

KERNELS = plain_kernels()


class Target:
    """One reader.

    Parameters
    ----------
    folder
        Where it may keep files.
    """

    change: Callable[[bytes, random.Random], bytes] = staticmethod(change_bytes)
    runs = 400
    """Changed seeds in the normal suite: about a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        raise NotImplementedError

    def check(self, data: bytes) -> bool:
        raise NotImplementedError


class Member(Target):
    """decode_cell, decode_rows, and the loops below them: those of the document, and those as written."""

    change = staticmethod(change_msgpack)

    def seeds(self) -> list[bytes]:
        rng, found = random.Random(0), []
        for n in (0, 1, 7, 15, 16, 17, 40, 64, 65, 130, 300):
            genes = sorted(rng.sample(range(rng.choice([n, 2 * n + 1, 40_000])), n))
            few = [rng.choice([1, 2, 127]) for _ in genes]
            many = [rng.choice([1, 127, 128, 70_000, 2**63, 2**64 - 1]) for _ in genes]
            found += [encode_cell(genes, few), encode_cell(genes, many, {"a": 3, "b": 0.5})]
            found.append(encode_cell(genes, [rng.uniform(0.1, 9) for _ in genes], kind="float"))
        return found

    def check(self, data: bytes) -> bool:
        is_one = False
        for kind in ("counts", "float"):
            want = read_member(data, kind)
            try:
                cell = decode_cell(data, kind=kind)  # type: ignore[arg-type]
            except FormatError:
                assert want is None or want[2] is not None, f"a {kind} member is refused"
                continue
            assert want is not None, f"what is no {kind} member is taken"
            assert [cell.genes.tolist(), cell.values.tolist()] == [*want[:2]]
            src = np.frombuffer(b"\x83\xa1" + data + b"\x80", np.uint8)
            at, size = np.array([2]), np.array([len(data)])
            rows, fields, status = decode_rows(src, at, size, 1 << 31, kind)  # type: ignore[arg-type]
            assert status.tolist() == [0]
            assert [rows.genes.tolist(), rows.values.tolist()] == [*want[:2]]
            if fields[0, 5] < 0:
                assert encode_rows(rows)[0].tobytes() == data, "it is written in another way"
            is_one = True
        self.compare(data)
        return is_one

    def compare(self, data: bytes) -> None:
        """The compiled loops do what they do as they are written."""
        if not data:
            return
        src = np.frombuffer(data, np.uint8)
        found = [np.zeros(compiled.MEMBER_FIELDS, np.int64) for _ in range(2)]
        with warnings.catch_warnings(), np.errstate(over="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)
            both = [
                int(module.parse_member(src, 0, len(src), fields))
                for module, fields in zip((compiled, KERNELS), found, strict=True)
            ]
            assert both[0] == both[1] and found[0].tolist() == found[1].tolist(), "parse_member"
            if both[0]:
                return
            n, g0, g1, v0, v1 = found[0][:5].tolist()
            genes = [np.zeros(n + 16, np.int32) for _ in range(2)]
            counts = [np.zeros(n, np.uint64) for _ in range(2)]
            for call, out in (
                (lambda m, i: m.decode_genes(src, g0, g1, n, 1 << 31, genes[i]), genes),
                (lambda m, i: m.decode_counts(src, v0, v1, n, counts[i]), counts),
            ):
                ends = [int(call(module, i)) for i, module in enumerate((compiled, KERNELS))]
                assert ends[0] == ends[1], "another status"
                assert ends[0] or out[0][:n].tolist() == out[1][:n].tolist(), "another result"


class LabelBytes(Target):
    """decode_labels: the one place where msgpack is read by its library."""

    change = staticmethod(change_msgpack)

    def seeds(self) -> list[bytes]:
        several: list[Any] = [{}, {"donor": 3}, {"donor": -1, "age": 40.5}, {"é" * 40: 2**31 - 1}]
        several.append({f"c{i}": i for i in range(40)})
        return [msgpack.packb(labels) for labels in several]

    def check(self, data: bytes) -> bool:
        head = encode_cell([1], [1])
        member = b"\x84" + head[1:] + b"\xa6labels" + data
        try:
            found = decode_labels(member)
        except FormatError:
            return False
        plain = msgpack.unpackb(data, strict_map_key=False)
        assert repr(found) == repr(plain)  # NaN is not itself
        for name, value in plain.items():
            is_code = type(value) is int and -1 <= value < 2**31
            assert type(name) is str and (is_code or type(value) is float)
        return True


INFOS = {
    "pca": ArrayInfo(kind="dense", dtype="float32", width=2, source="obsm"),
    "adt": ArrayInfo(kind="sparse", dtype="int32", width=300, source="feature_type"),
    "atac": ArrayInfo(kind="sparse", dtype="float32", width=40, source="obsm"),
}


class Arrays(Target):
    """decode_arrays: the second member of a cell."""

    change = staticmethod(change_msgpack)

    def seeds(self) -> list[bytes]:
        rng, found = np.random.default_rng(0), []
        for n in (0, 1, 17, 40):
            rows: dict[str, Any] = {"pca": rng.normal(size=(1, 2)).astype(np.float32)}
            for name, dtype in (("adt", np.int32), ("atac", np.float32)):
                columns = np.sort(rng.choice(INFOS[name].width, n, replace=False)).astype(np.int32)
                values = rng.integers(1, 1 << 20, n).astype(dtype)
                rows[name] = SparseRows(np.array([0, n]), columns, values)
            found.append(encode_arrays(INFOS, rows, 1)[0].tobytes())
        return found

    def check(self, data: bytes) -> bool:
        want = read_arrays(data, INFOS)
        try:
            found = decode_arrays(data, INFOS)
        except FormatError:
            assert want is None, "arrays are refused"
            return False
        assert want is not None, "what are no arrays is taken"
        assert found["pca"].tobytes() == want["pca"][0]
        for name in ("adt", "atac"):
            columns, values = want[name]
            dense = np.zeros(INFOS[name].width, INFOS[name].dtype)
            dense[columns] = values
            assert found[name].tobytes() == dense.tobytes()
        return True


class Index(Target):
    """read_index and check_bounds."""

    change = staticmethod(change_parquet)
    LABELS = {"donor": LabelInfo(kind="category", categories=("a", "b", "c")), "age": LabelInfo(kind="number")}  # noqa: RUF012  # fmt: skip

    def seeds(self) -> list[bytes]:
        make_set(self.folder / "set", [5, 40])
        return [p.read_bytes() for p in sorted((self.folder / "set").glob("train/*.parquet"))]

    def check(self, data: bytes) -> bool:
        rows = 40
        try:
            found = read_index(data, rows=rows, where="here")
            check_bounds(found, self.LABELS, 1, "here")
        except FormatError:
            return False
        for name, values in found.items():
            assert values.shape == (rows,), name
            kind = np.dtype(OWN_COLUMNS[name]).kind if name in OWN_COLUMNS else "if"
            assert values.dtype.kind in kind
        return True


class ManifestText(Target):
    """Manifest.from_json: what is taken is written again as it is."""

    change = staticmethod(change_json)
    runs = 200

    def seeds(self) -> list[bytes]:
        folder = self.folder
        sets = [
            make_set(folder / "plain", [3, 4]).root,
            make_set(folder / "zstd", [9], kind="float", compression="zstd").root,
            packed(folder, 20)[0],
        ]
        return [(root / "manifest.json").read_bytes() for root in sets]

    def check(self, data: bytes) -> bool:
        try:
            manifest = Manifest.from_json(data, root="here")
        except FormatError as e:
            assert e.where == "here/manifest.json" and len(str(e)) < 2000
            return False
        text = manifest.to_json()
        assert Manifest.from_json(text).to_json() == text
        return True


class VocabText(Target):
    """Vocab.from_json."""

    change = staticmethod(change_json)

    def seeds(self) -> list[bytes]:
        return [Vocab([f"g{i}" for i in range(n)]).with_specials().to_json() for n in (1, 30)]

    def check(self, data: bytes) -> bool:
        try:
            vocab = Vocab.from_json(data, where="here")
        except VocabError as e:
            assert e.where == "here" and len(str(e)) < 2000
            return False
        assert Vocab.from_json(vocab.to_json()) == vocab
        assert json.loads(data) == vocab.to_dict()
        return True


class Chunk(Target):
    """open_chunk: a zstd frame under a right checksum."""

    def seeds(self) -> list[bytes]:
        rng = random.Random(0)
        datas = [b"", b"x" * 5000, rng.randbytes(3000), bytes(1 << 20)]
        found = [zstandard.ZstdCompressor().compress(data) for data in datas]
        return found + [
            zstandard.ZstdCompressor(write_checksum=True).compress(datas[2]),
            zstandard.ZstdCompressor(write_content_size=False).compress(datas[1]),
        ]

    def check(self, data: bytes) -> bool:
        stored, size = np.frombuffer(data, np.uint8), len(data)
        with contextlib.suppress(zstandard.ZstdError):
            size = zstandard.frame_content_size(data)
        try:
            raw = open_chunk(stored, size, xxhash.xxh64_intdigest(data), "zstd", "here", "root")
        except FormatError:
            return False
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
            assert stream.read() == raw.tobytes() and len(raw) == size
        return True


class Shard(Target):
    """A tar that is another, under right checksums: verify, repair, cells, and the stream."""

    runs = 20

    def seeds(self) -> list[bytes]:
        self.root, _ = packed(self.folder, 9, name="set")
        self.manifest = Manifest.from_json((self.root / "manifest.json").read_bytes())
        (self.info,) = self.manifest.splits["train"]
        self.good = (self.root / self.info.path).read_bytes()
        self.cells = {c.key: c for c in ShardSet(self.root).cells("train", 99)}
        return [self.good]

    def check(self, data: bytes) -> bool:
        stored = np.frombuffer(data, np.uint8)
        chunks = dataclasses.replace(
            self.info.chunks,
            stored=np.array([len(data)]),
            raw=np.array([len(data)]),
            sums=np.array([xxhash.xxh64_intdigest(stored)], np.uint64),
        )
        info = dataclasses.replace(
            self.info, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), chunks=chunks
        )
        told = dataclasses.replace(self.manifest, splits={"train": (info,)})
        (self.root / self.info.path).write_bytes(data)
        (self.root / "manifest.json").write_bytes(told.to_json())
        report = verify(self.root, progress=False, workers=1)
        assert report.ok or report.faults
        (self.root / self.info.index_path).rename(self.folder / "index")
        try:
            with contextlib.suppress(ScshardsError):
                repair(self.root, progress=False, workers=1)
        finally:
            (self.folder / "index").rename(self.root / self.info.index_path)
        is_read = False
        with contextlib.suppress(ScshardsError):
            for cell in ShardSet(self.root).cells("train", 99):
                good = self.cells[cell.key]
                assert len(cell.genes) == len(good.genes) and len(set(cell.genes)) == len(
                    cell.genes
                )
            is_read = True
        with contextlib.suppress(ScshardsError):
            found = [key for b in CellDataset(self.root, batch_size=4) for key in b.key.tolist()]
            assert len(set(found)) == len(found)
        return is_read


class Set(Target):
    """A manifest that is another, sealed, over good files: the stream has the right cells or none."""

    change = staticmethod(change_json)
    runs = 60

    def seeds(self) -> list[bytes]:
        self.known = make_set(self.folder / "set", [5, 4], compression="zstd")
        return [(self.known.root / "manifest.json").read_bytes()]

    def check(self, data: bytes) -> bool:
        try:
            sealed = Manifest.from_json(data).to_json()
        except FormatError:
            return False
        path = self.known.root / "manifest.json"
        path.write_bytes(sealed)
        try:
            shards = ShardSet(self.known.root)
            for split in shards.manifest.splits:
                for cell in shards.cells(split, 99):
                    row = int(cell.key[7:])
                    genes = [self.known.vocab.tokens[g] for g in self.known.genes[row]]
                    assert genes == [*cell.genes]
                    assert cell.values.tolist() == self.known.values[row].tolist()
                for batch in CellDataset(self.known.root, batch_size=2, split=split, as_cells=True):
                    assert batch is not None
            verify(self.known.root, progress=False, workers=1)
        except ScshardsError:
            return False
        return True


class CheckpointIndex(Target):
    """index.json of a checkpoint: the tensors that it says, read by numpy, or an error."""

    change = staticmethod(change_json)
    NAME = "index.json"
    runs = 200

    def seeds(self) -> list[bytes]:
        save(self.folder)
        self.at = self.folder / "step-00000001"
        return [(self.at / self.NAME).read_bytes()]

    def check(self, data: bytes) -> bool:
        (self.at / self.NAME).write_bytes(data)
        try:
            found = read_tensors(self.at)
        except (CheckpointError, ScshardsError):
            return False
        for name, about in json.loads(data)["tensors"].items():
            if name.startswith("model/"):
                want = plainly(self.at, about)
                tensor = found[name.removeprefix("model/")]
                assert tensor.dtype == DTYPES[about["dtype"]]
                assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == want
        return True


def save(folder: Path) -> None:
    """A checkpoint of a few small tensors."""
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "model/a": torch.randn(4, 3, generator=rng),
        "model/b": torch.randn(7, generator=rng).to(torch.bfloat16),
        "model/n": torch.tensor(5),
        "optimizer/a/exp_avg": torch.randn(4, 3, generator=rng),
    }
    ranks = Ranks(0, 1, torch.device("cpu"))
    with Checkpoints(folder, ranks, keep_last=1) as checkpoints:
        checkpoints.save(TrainState(step=1, loader={"a": 1}), tensors)


def plainly(folder: Path, about: dict[str, Any]) -> bytes:
    """The bytes of a tensor, put together by hand: each number is of one piece."""
    size = DTYPES[about["dtype"]].itemsize
    out = np.zeros((*about["shape"], size), np.uint8)
    times = np.zeros(about["shape"], np.int64)
    for piece in about["pieces"]:
        end = piece["start"] + piece["nbytes"]
        raw = (
            (folder / piece["file"]).read_bytes()[piece["start"] : end] if piece["nbytes"] else b""
        )
        assert zlib.crc32(raw) == piece["crc32"] or not piece["nbytes"]
        box = tuple(slice(o, o + s) for o, s in zip(piece["offsets"], piece["sizes"], strict=True))
        out[box] = np.frombuffer(raw, np.uint8).reshape(*piece["sizes"], size)
        times[box] += 1
    assert (times == 1).all(), "a number is of no piece, or of several"
    return out.tobytes()


class State(CheckpointIndex):
    """state.json of a checkpoint."""

    NAME = "state.json"
    runs = 150

    def check(self, data: bytes) -> bool:
        (self.at / self.NAME).write_bytes(data)
        try:
            state = read_state(str(self.at))
        except CheckpointError as e:
            assert str(self.at) in str(e.where) and len(str(e)) < 2000
            return False
        assert json.loads(data)["step"] == state.step
        return True


TARGETS: dict[str, type[Target]] = {
    "member": Member,
    "labels": LabelBytes,
    "arrays": Arrays,
    "chunk": Chunk,
    "shard": Shard,
    "index": Index,
    "manifest": ManifestText,
    "set": Set,
    "vocab": VocabText,
    "checkpoint": CheckpointIndex,
    "state": State,
}


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Bounds of memory, from here on, as of `bounded` of time: beyond them is a finding."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """One input, which has so many seconds."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"it takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def named(data: bytes) -> str:
    """An input as a line that a corpus can hold."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unnamed(line: str) -> bytes:
    return zlib.decompress(base64.b64decode(line))

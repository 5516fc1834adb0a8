"""How bytes are made hostile: a change of bytes, of JSON, of msgpack, of a parquet file.

    change(data, rng)      other bytes, most of which still get past the first check

Bytes alone hardly ever do: a flipped bit of JSON is no JSON. Used by fuzz_targets.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import msgpack
import pyarrow as pa
import pyarrow.parquet as pq

TOP = 2**63 - 1
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, TOP, TOP + 1, 2**64, 10**400, -TOP - 1,
           0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")]  # fmt: skip
TEXTS = [
    "",
    "x",
    "/",
    "..",
    "../x",
    "a\nb",
    "a\0b",
    "\ud800",
    "\x1b[31m",
    "é" * 50,
    "train/000000.tar",
    "0" * 20,
    "none",
    "zstd",
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [1], {"a": 1}]


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes are others, gone, new, moved, or doubled."""
    out = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(8)
        if how == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif how == 1 and out:
            out[at % len(out)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif how == 2:
            del out[at : at + rng.choice([1, 1, 2, 4, 16, 512])]
        elif how == 3:
            out[at:at] = rng.randbytes(rng.choice([1, 1, 2, 4, 8]))
        elif how == 4:
            del out[at:]
        elif how == 5:
            other = rng.randrange(len(out) + 1)
            n = rng.choice([1, 2, 4, 8, 32])
            out[at : at + n] = out[other : other + n]
        elif how == 6:
            n = rng.choice([2, 4, 8])
            number = rng.choice([0, 1, 2**31, TOP, 2**64 - 1, len(out), rng.randrange(2**16)])
            whole = number % (1 << 8 * n)
            out[at : at + n] = whole.to_bytes(n, rng.choice(["big", "little"]))  # type: ignore[arg-type]
        else:
            out[at:at] = out[at : at + rng.choice([1, 8, 64, 512])]
    return bytes(out)


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a tree of tables and lists."""
    if isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*at, name))
    if at:
        yield at


def change_tree(tree: Any, rng: random.Random) -> Any:
    """One value of a tree is another, or gone, or there twice, or under another name."""
    every = [*places(tree)]
    if not every:
        return rng.choice(OTHERS)
    *above, name = rng.choice(every)
    node = tree
    for part in above:
        node = node[part]
    old, how = node[name], rng.randrange(8)
    if how == 0:
        del node[name]
    elif how == 1 and type(old) is int:
        node[name] = old + rng.choice([1, -1, 2**31, 2**62, -old, old])
    elif how == 2:
        node[name] = rng.choice(NUMBERS)
    elif how == 3:
        node[name] = rng.choice(TEXTS)
    elif how == 4:
        node[name] = rng.choice(OTHERS)
    elif how == 5 and isinstance(old, list):
        node[name] = old + old if rng.random() < 0.5 else old[::-1]
    elif how == 6 and isinstance(node, dict):
        node[rng.choice(TEXTS)] = old
    elif how == 7:
        other: Any = 1
        for _ in range(rng.choice([1, 3, 40])):
            other = {"a": [other]}
        node[name] = other
    else:
        *above, there = rng.choice(every)
        value = tree
        for part in (*above, there):
            # It may be within what has just been changed.
            value = value[part] if isinstance(value, dict | list) else value
        node[name] = json.loads(json.dumps(value))
    return tree


def change_json(data: bytes, rng: random.Random) -> bytes:
    """JSON in which some values are others; sometimes bytes."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, IndexError):
        tree = json.loads(data)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            tree = change_tree(tree, rng)
        if rng.random() < 0.9:
            return json.dumps(tree).encode()
    return change_bytes(data, rng)


def change_msgpack(data: bytes, rng: random.Random) -> bytes:
    """msgpack in which some values are others, or the bytes of one; sometimes bytes."""
    if rng.random() < 0.6:
        with contextlib.suppress(Exception):  # what it is by now, is any bytes
            tree = msgpack.unpackb(data, strict_map_key=False)
            name = rng.choice([*tree])
            old = tree[name]
            if isinstance(old, bytes):
                tree[name] = (
                    change_msgpack(old, rng) if rng.random() < 0.3 else change_bytes(old, rng)
                )
                if rng.random() < 0.3 and "n" in tree:
                    tree["n"] = len(tree[name])
            else:
                tree = change_tree(tree, rng)
            return bytes(msgpack.packb(tree))
    return change_bytes(data, rng)


def change_parquet(data: bytes, rng: random.Random) -> bytes:
    """A table with a column that is another; a file written in another way; sometimes bytes."""
    if rng.random() < 0.6:
        with contextlib.suppress(
            pa.ArrowException, ValueError, OSError, TypeError, OverflowError, KeyError
        ):
            # Without threads: at the end of a process that libFuzzer ends they wait for one another.
            whole = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
            table = _changed(whole, rng)
            out = io.BytesIO()
            pq.write_table(
                table,
                out,
                compression=rng.choice(["zstd", "none", "snappy", "gzip"]),
                use_dictionary=rng.random() < 0.5,
                row_group_size=rng.choice([1, 7, None]),
                store_schema=rng.random() < 0.3,
                data_page_version=rng.choice(["1.0", "2.0"]),
            )
            return out.getvalue()
    if rng.random() < 0.6 and len(data) > 20:
        # What says how all is laid out stands at the end.
        size = int.from_bytes(data[-8:-4], "little") % len(data)
        head, tail = data[: -8 - size], data[-8 - size : -8]
        changed = change_bytes(tail, rng)
        return head + changed + len(changed).to_bytes(4, "little") + b"PAR1"
    return change_bytes(data, rng)


def _changed(table: pa.Table, rng: random.Random) -> pa.Table:
    names, n = table.column_names, len(table)
    if not names or rng.random() < 0.1:
        return table.slice(rng.randrange(n + 1)) if n else table
    at = rng.randrange(len(names))
    how = rng.randrange(5)
    if how == 0:
        return table.drop_columns([names[at]])
    if how == 1:
        return table.append_column(rng.choice([*names, "x", "obs.x"]), table.column(at))
    if how == 2:
        return table.rename_columns([*names[:at], rng.choice([*TEXTS, *names]), *names[at + 1 :]])
    if how == 3:
        kinds = [pa.int8(), pa.int64(), pa.float16(), pa.float64(), pa.string(), pa.bool_(), pa.uint64(),
                 pa.large_string(), pa.date32(), pa.decimal128(20), pa.dictionary(pa.int32(), pa.string())]  # fmt: skip
        return table.set_column(at, names[at], table.column(at).cast(rng.choice(kinds)))
    values = [
        rng.choice([None, 0, 1, -1, TOP, -TOP - 1, 2**31, n, rng.randrange(2**40)])
        if rng.random() < 0.2
        else v
        for v in table.column(at).to_pylist()
    ]
    others: list[Any] = [
        values,
        [[v] for v in values],
        [{"a": v} for v in values],
        [0.5] * n,
        [b"x"] * n,
    ]
    return table.set_column(at, names[at], pa.array(rng.choice(others)))

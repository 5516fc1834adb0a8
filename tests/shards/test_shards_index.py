"""The index as pandas and pyarrow read it, and as scshards does."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scshards.base.errors import FormatError
from scshards.shards.index import OWN_COLUMNS, read_index, write_index


def columns(n: int = 3) -> dict[str, Any]:
    return {
        "offset": np.arange(n) * 1024 + 512,
        "size": np.arange(n) + 100,
        "n_genes": np.arange(n) + 1,
        "total": np.arange(n) + 0.5,
        "source": np.arange(n) % 2,
        "row": np.arange(n) + 10**9,
        "labels": {"donor": np.arange(n) - 1, "age": np.where(np.arange(n) == 1, np.nan, 40.5)},
    }


def test_pandas_reads_it() -> None:
    frame = pd.read_parquet(io.BytesIO(write_index(**columns())))
    assert list(frame.columns) == [*OWN_COLUMNS, "obs.donor", "obs.age"]
    assert frame["key"].tolist() == ["000000-1000000000", "000001-1000000001", "000000-1000000002"]
    assert frame["offset"].tolist() == [512, 1536, 2560]
    assert frame["total"].tolist() == [0.5, 1.5, 2.5]
    assert frame["obs.donor"].tolist() == [-1, 0, 1]
    assert frame["obs.age"].tolist()[0] == 40.5 and math.isnan(frame["obs.age"].tolist()[1])


def test_types_and_no_nulls() -> None:
    table = pq.read_table(io.BytesIO(write_index(**columns())))
    assert {f.name: f.type for f in table.schema} == {
        "key": pa.string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "n_genes": pa.int32(),
        "total": pa.float64(),
        "source": pa.int32(),
        "row": pa.int64(),
        "obs.donor": pa.int32(),
        "obs.age": pa.float64(),
    }
    assert all(table.column(name).null_count == 0 for name in table.column_names)


def test_round_trip() -> None:
    given = columns(1000)
    table = read_index(write_index(**given))
    for name in ("offset", "size", "n_genes", "total", "source", "row"):
        assert table[name].tolist() == given[name].tolist()
    assert table["obs.donor"].tolist() == given["labels"]["donor"].tolist()
    assert np.array_equal(table["obs.age"], given["labels"]["age"], equal_nan=True)


def test_the_same_rows_give_the_same_bytes() -> None:
    assert write_index(**columns(500)) == write_index(**columns(500))
    other = columns(500)
    other["total"] = other["total"] + 1
    assert write_index(**other) != write_index(**columns(500))


def test_some_columns() -> None:
    table = read_index(write_index(**columns()), ["row", "size"])
    assert set(table) == {"row", "size"} and table["size"].dtype == np.int64


def test_no_cells() -> None:
    table = read_index(write_index(**columns(0)))
    assert all(len(v) == 0 for v in table.values()) and set(OWN_COLUMNS) <= set(table)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet" * 100])
def test_bytes_that_are_no_index(data: bytes) -> None:
    with pytest.raises(FormatError, match="can't be read") as caught:
        read_index(data, where="train/000000.parquet")
    assert caught.value.where == "train/000000.parquet"


def test_truncated_and_mutated_bytes_never_crash() -> None:
    good = write_index(**columns(50))
    for end in range(0, len(good), 37):
        with pytest.raises(FormatError):
            read_index(good[:end])
    for at in range(0, len(good), 13):
        changed = good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :]
        try:
            read_index(changed)
        except FormatError:
            continue


def test_a_missing_column_is_named() -> None:
    other = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"]}), other)
    with pytest.raises(FormatError, match="offset"):
        read_index(other.getvalue())
    with pytest.raises(FormatError, match=r"obs\.sex"):
        read_index(write_index(**columns()), ["key", "obs.sex"])

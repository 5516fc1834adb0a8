"""Compile all kernels for the types that they are called with, before anybody waits for them.

Called by `scshards warm`. TYPES is the one place that lists them; tests compare it with what loaders
and commands call. Types are written as numpy writes dtypes: `i8` is a number, `i8[]` an array that lies
in one piece, `i8[,]` one of two dimensions, `i8[:]` one with gaps, `u1[r]` one that nobody writes to.
`VALUES` is each dtype that a matrix may have.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from typing import Any

import numba as nb
import numpy as np

from scshards.kernels.cells import CellRules, DrawKeys, new_scratch
from scshards.kernels.counts import new_scratch as new_count_scratch
from scshards.kernels.finish import MaskRules, SplitRules
from scshards.kernels.ranks import new_scratch as new_rank_scratch
from scshards.kernels.ranks import rank_rules

TYPES = """
members.parse_member      u1[r] i8 i8 i8[]
members.measure_members   u1[r] i8[] i8[] i8[,] i8[]
members.decode_genes      u1[r] i8 i8 i8 i8 i4[]
members.decode_counts     u1[r] i8 i8 i8 u2[]
members.decode_counts     u1[r] i8 i8 i8 u8[]
members.decode_members    u1[r] i8[,] i8[] i8 i4[] u8[] i8[]
members.gather_slices     u1[r] i8[:] i8[] i8[] u1[]
members.gather_slices     u1[] i8[] i8[:] i8[] u1[]
members.find_arrays       u1[r] i8[] i8[] u1[r] i8[] i8[] i8[,,] i8[]
members.gather_rows       u1[r] i8[:] u1[,]
cells.read_cells          u1[r] i8[,] i8[] i8[] CellRules DrawKeys Scratch
                          i4[] f4[] u8[] b1[]
cells.read_others         u1[r] i8[,] i8[] i8[] CellRules DrawKeys Scratch
                          Scale i4[] f4[] b1[]
cells.scale_rows          i8[,] i8 i8[] u8[] f8 b1 f4[] b1[]
cells.add_zeros           u1[r] i8[,] i8[] i8[] i8[] CellRules i4[] u8 i4[]
                          u8[,] i4[] f4[]
finish.mask_rows          i8[] i8[] i4[,] i8[] i8 u8 MaskRules u8[] i4[] f4[]
                          f4[] b1[] b1[]
finish.split_rows         i8[] i8[] i4[,] i8[] i8 u8 SplitRules u8[] i4[] f4[]
                          i4[,] f4[,] b1[,] i4[,] f4[,] b1[,]
finish.mark_genes         i8[] i8[] i8[] i8 u8 f8 i8 u8[] b1[]
counts.read_counts        u1[r] i8[,] CountRules i4[] CountScratch u2[] u2[] i8[] i8[]
counts.read_counts        u1[r] i8[,] CountRules i4[] CountScratch i4[] u2[] i8[] i8[]
ranks.rank_cells          u1[r] i8[,] i8[] RankRules RankScratch i4[] i8[] i8[]
ranks.fill_ranks          i8[] i8[] i8[] i4[] i8[] Specials i8 Keys i4[] u8[] i4[] i4[] b1[]
ranks.tally_values        i4[] u2[] u2[] i8[] b1[] u4[,,]
counts.tally              i4[] u2[] u2[] b1[] u4[,] i8[] i8[]
store.put                 u1[] i8[] i8[] i8[] i8[,] i8 u1[] i8[] i8[] i8[]
                          i8[] i8[,] i8[] i8[] i8[] i8[]
store.free                i8[] i8[] i8[] i8[] i8[]
order.deal                i8[] i8[] i8[] i8[] i8[] i8[] u8[] i8[] i8[] i8[]
                          i8[,] i8[,] i8[,] i8[] i8[] i8 i8 i8 i8 i8 i8[] i8[]
                          i8[]
order._emit               i8[] i8[] i8 u8 i8 i8[]
order.take_turns          i8[] i8[] i8[] i8[,] i8 i8[]
rows.member_bound         i8 i8
rows.pack_rows            i8[] i4[] VALUES[] f8 i8[] i8 u4[] b1 Limits u1[]
                          i8[] u8[] u8[] u4[] u8[] u1[] i8 i8[] i8[] f8[] i1[]
rows.pack_rows            i8[] i4[] VALUES[] f8 i8[] i8 u4[] b1 Limits u1[]
                          i8[] f4[] u8[] u4[] f4[] u1[] i8 i8[] i8[] f8[] i1[]
rows.count_cells          i8[] i4[] VALUES[] i4[] i8 i8[] i8[]
rows.row_totals           i8[] u8[] f8[]
rows.row_totals           i8[] f4[] f8[]
rows.slices_differ        u1[r] i8[] u1[] i8[] i8[] b1[]
members.encode_labels     u1[r] i8[] i8[,] u8[,] b1[] u1[] i8[]
members.encode_members    i8[] i4[] u8[] u1[] i8[] u1[] i8[]
members.encode_members    i8[] i4[] f4[] u1[] i8[] u1[] i8[]
members.write_members     u1[r] i8[] i8[] u1[] i8[] i8[] u1[] i8[]
members.interleave        u1[] i8[] u1[] i8[] u1[] i8
members.write_keys        i8[] i8[] u1[,]
"""


def compile_all() -> Iterator[tuple[str, float]]:
    """The name of each kernel, and the seconds that compiling it took: 0 where it was kept already."""
    for line in TYPES.replace("\n ", " ").strip().splitlines():
        name, *kinds = line.split()
        module, function = name.split(".")
        kernel = getattr(importlib.import_module(f"scshards.kernels.{module}"), function)
        for dtype in _VALUES if "VALUES[]" in kinds else ("",):
            start, compiled = time.perf_counter(), sum(kernel.stats.cache_misses.values())
            kernel.compile(tuple(_type(kind.replace("VALUES", dtype)) for kind in kinds))
            is_new = sum(kernel.stats.cache_misses.values()) > compiled
            yield name, time.perf_counter() - start if is_new else 0.0


_VALUES = ("f4", "f8", "i4", "i8")


def _type(kind: str) -> Any:
    """Numba's type of arguments that TYPES spells so."""
    if kind in _TUPLES:
        return nb.typeof(_TUPLES[kind]())
    dtype, _, shape = kind.partition("[")
    number = nb.from_dtype(np.dtype(dtype))
    if not shape:
        return number
    layout = "A" if ":" in shape else "C"
    array: Any = nb.types.Array
    return array(number, 1 + shape.count(","), layout, readonly="r" in shape)


def _rules() -> CellRules:
    return CellRules(n_tokens=1, as_counts=True, room=1, kept=0, quantiles=np.zeros(1), ties=False)


_TUPLES: dict[str, Any] = {
    "CellRules": _rules,
    "DrawKeys": lambda: DrawKeys(*[np.uint64(0)] * 4),
    "Scratch": lambda: new_scratch(_rules(), 1),
    "CountRules": lambda: (0, 0, True),
    "CountScratch": lambda: new_count_scratch(1, 1),
    "RankRules": lambda: rank_rules(np.ones(1), 1),
    "RankScratch": lambda: new_rank_scratch(1),
    "Specials": lambda: (0, 0, 0, 0),
    "Keys": lambda: (np.uint64(0), np.uint64(0)),
    "Scale": lambda: (0.0, False),
    "MaskRules": lambda: MaskRules(0, 0.0, False, 0, 0.0, 0.0, 0.0),
    "SplitRules": lambda: SplitRules(0.0, 0, 0, 0.0, 0.0),
    "Limits": lambda: (0, 0, 0.0),
}

"""Sets of cells of one group, each beside as many controls. Read first: options.py, then plan.py.

    options.py   SetOptions
    groups.py    labels of cells -> sums of each (shard, group); what is left out, and why
    plan.py      (sums, seed, epoch) -> which cells and controls a set has: integers only
    reader.py    positions of an epoch -> blocks of cells and controls, each chunk read about once

The order in which sets come is that of streaming.order, over sets in place of cells.
"""

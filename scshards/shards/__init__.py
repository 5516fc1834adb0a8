"""Floor 2: the bytes on disk (docs/reference/format.md). Packing and stream meet only here.

    members   a cell <-> the payload of a tar member       index      one row per cell, beside each tar
    tar       members one after another, in chunks         manifest   what a set holds, written last
    shardset  a set that is opened                         chunks     cells of a shard, read in order
    arrays    what a cell has beside its genes <-> the payload of its second member
    spill     members in temporary files, grouped by shard
    mending   what is to be done about damaged files, for the errors about them

Read first: manifest.py, then members.py.
"""

from typing import Literal

Compression = Literal["none", "zstd"]
"""How the bytes of a shard are stored: .tar or .tar.zst."""

"""Floor 3: AnnData files -> shard sets. Meets stream only in `scshards.shards`.

The folder and the function `scshards.pack` share a name, and importing any module of the folder puts the
folder in the function's place. So the folder can be called too: `scshards.pack(...)` is
`scshards.pack.run.pack(...)`, whatever was imported before.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Pack(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See scshards.pack.run.pack."""
        from scshards.pack.run import pack

        return pack(*args, **options)


sys.modules[__name__].__class__ = _Pack

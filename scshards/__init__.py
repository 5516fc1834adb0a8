"""scshards: tokenized single cells in WebDataset shards, streamed into training.

Names are loaded on first use, so that `import scshards` loads neither torch nor anndata.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scshards._version import __version__ as __version__

if TYPE_CHECKING:
    from scshards.base.errors import ScshardsError as ScshardsError
    from scshards.cells.batch import Batch as Batch
    from scshards.cells.batch import GenerateBatch as GenerateBatch
    from scshards.cells.batch import PackedBatch as PackedBatch
    from scshards.cells.batch import RankBatch as RankBatch
    from scshards.cells.batch import SetBatch as SetBatch
    from scshards.cells.vocab import Vocab as Vocab
    from scshards.exporting.export import export as export
    from scshards.exporting.options import ExportOptions as ExportOptions
    from scshards.packing.dry_run import PackPlan as PackPlan
    from scshards.packing.dry_run import plan_pack as plan_pack
    from scshards.packing.options import PackOptions as PackOptions
    from scshards.packing.options import ReshardOptions as ReshardOptions
    from scshards.packing.pack import append as append
    from scshards.packing.pack import pack as pack
    from scshards.packing.reshard import merge as merge
    from scshards.packing.reshard import reshard as reshard
    from scshards.packing.verify.whole import verify as verify
    from scshards.shards.members import Cell as Cell
    from scshards.shards.members import decode_cell as decode_cell
    from scshards.shards.shardset import NamedCell as NamedCell
    from scshards.shards.shardset import ShardSet as ShardSet
    from scshards.sources.vocabulary import build_vocab as build_vocab
    from scshards.streaming.collate.counts import CountsBatch as CountsBatch
    from scshards.streaming.collate.options import CollateOptions as CollateOptions
    from scshards.streaming.collate.own import TokenBatch as TokenBatch
    from scshards.streaming.dataset import CellDataset as CellDataset
    from scshards.streaming.loader import CellLoader as CellLoader
    from scshards.streaming.medians import gene_medians as gene_medians
    from scshards.streaming.order.options import ChoiceOptions as ChoiceOptions
    from scshards.streaming.read.options import ReadOptions as ReadOptions
    from scshards.streaming.sets.options import SetOptions as SetOptions
    from scshards.streaming.variable import VariableGenes as VariableGenes
    from scshards.streaming.variable import variable_genes as variable_genes

_HOME = {
    "Batch": "cells.batch",
    "Cell": "shards.members",
    "CellDataset": "streaming.dataset",
    "CellLoader": "streaming.loader",
    "ChoiceOptions": "streaming.order.options",
    "CollateOptions": "streaming.collate.options",
    "CountsBatch": "streaming.collate.counts",
    "ExportOptions": "exporting.options",
    "GenerateBatch": "cells.batch",
    "NamedCell": "shards.shardset",
    "PackOptions": "packing.options",
    "PackPlan": "packing.dry_run",
    "PackedBatch": "cells.batch",
    "RankBatch": "cells.batch",
    "ReadOptions": "streaming.read.options",
    "ReshardOptions": "packing.options",
    "ScshardsError": "base.errors",
    "SetBatch": "cells.batch",
    "SetOptions": "streaming.sets.options",
    "ShardSet": "shards.shardset",
    "TokenBatch": "streaming.collate.own",
    "VariableGenes": "streaming.variable",
    "Vocab": "cells.vocab",
    "append": "packing.pack",
    "build_vocab": "sources.vocabulary",
    "decode_cell": "shards.members",
    "export": "exporting.export",
    "gene_medians": "streaming.medians",
    "merge": "packing.reshard",
    "pack": "packing.pack",
    "plan_pack": "packing.dry_run",
    "reshard": "packing.reshard",
    "variable_genes": "streaming.variable",
    "verify": "packing.verify.whole",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'scshards' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"scshards.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

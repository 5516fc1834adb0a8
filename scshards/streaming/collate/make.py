"""Which collator makes the batches of an objective. Called by streaming.loader and streaming.wds."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.shards.manifest import ArrayInfo, LabelInfo
from scshards.streaming.collate.base import CollatorBase
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.counts import CountsCollator
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.own import OwnCollator
from scshards.streaming.collate.ranks import RankCollator


def collator_of(
    options: CollateOptions,
    vocab: Vocab,
    kind: ValueKind,
    seed: int,
    labels: Mapping[str, LabelInfo] | None = None,
    *,
    pin_memory: bool | None = False,
    arrays: Mapping[str, ArrayInfo] = MappingProxyType({}),
) -> CollatorBase[Any]:
    """The collator of an objective; parameters and errors as of CollatorBase.

    `arrays` are what members have beside the genes, where the options ask for some of it.
    """
    own: dict[str, type[CountsCollator | OwnCollator | RankCollator]] = {
        "counts": CountsCollator,
        "own": OwnCollator,
        "ranks": RankCollator,
    }
    make = own.get(options.objective, Collator)
    return make(options, vocab, kind, seed, labels, pin_memory=pin_memory, arrays=arrays)

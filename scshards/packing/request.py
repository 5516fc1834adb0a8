"""What was asked for, read and checked: the same for pack, append, reshard and merge."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scshards.cells.vocab import Vocab
from scshards.packing.options import PackOptions
from scshards.packing.survey import AnyInput, Kept, identity_of
from scshards.shards.manifest import Manifest
from scshards.sources.inputs import Input, expand, kept_columns
from scshards.sources.shardset import OldSet
from scshards.sources.vocabulary import read_vocab


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, read and checked.

    Attributes
    ----------
    root
        Of the output.
    inputs, vocab, options, splits
        What is packed, how, and the splits in the order of their codes.
    asked
        What decides over the output; see Job.
    recorded
        The options as the manifest tells them.
    base
        The manifest of the set that is added to, or None.
    sets, kept
        The shard sets that the inputs are runs of, and what is kept of them.
    """

    root: str
    inputs: Sequence[AnyInput]
    vocab: Vocab
    options: PackOptions
    splits: tuple[str, ...]
    asked: Mapping[str, Any]
    recorded: Mapping[str, Any]
    base: Manifest | None = None
    sets: Sequence[OldSet] = ()
    kept: Kept | None = None

    @property
    def first_input(self) -> int:
        """The ordinal of the first input: those of a set that is added to come before."""
        return len(self.base.sources) if self.base else 0

    def identities(self) -> list[dict[str, Any]]:
        """What tells each input from another state of it."""
        return [identity_of(file, self.options) for file in self.inputs]


def requested(
    inputs: Input | Sequence[Input],
    root: Input,
    vocab: Vocab | Input,
    options: PackOptions | None,
) -> Request:
    """What a new shard set is asked for; see pack."""
    options = options or PackOptions()
    files = expand(inputs, options.storage_options)
    options = dataclasses.replace(options, obs=kept_columns(options.obs, files))
    if not isinstance(vocab, Vocab):
        vocab = read_vocab(vocab, options.storage_options)
    vocab = vocab.with_specials()
    asked = {
        "inputs": [f.asked for f in files],
        "vocabulary": vocab.fingerprint,
        "options": options.recorded(),
    }
    return Request(
        root=os.fspath(root),
        inputs=files,
        vocab=vocab,
        options=options,
        splits=options.splits,
        asked=asked,
        recorded=options.recorded(),
    )

"""The tokens in front of a cell's genes: `<cls>`, and one for each label column that is a condition.

A category's token is spelled `<column:category>`, a missing value's `<column:>`. Tokens that the
vocabulary lacks are appended to it, column by column, categories in the manifest's order and the
missing value last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.text import did_you_mean
from scshards.cells.vocab import Vocab
from scshards.shards.manifest import LabelInfo


class LeadTokens:
    """Finds the leading tokens of cells.

    Parameters
    ----------
    vocab
        Of the shard set.
    conditions
        Names of label columns, in the order of their tokens.
    labels
        All label columns, in the order in which they come with each cell.

    Attributes
    ----------
    vocab
        The vocabulary with the conditions' tokens: the model's embedding has as many rows.

    Raises
    ------
    ConfigError
        For a column that the shard set lacks, a column of numbers, or tokens spelled the same.
    """

    def __init__(
        self, vocab: Vocab, conditions: Sequence[str], labels: Mapping[str, LabelInfo]
    ) -> None:
        self._cls_id = vocab.cls_id
        self._columns = [_place(name, labels) for name in conditions]
        tokens = [condition_tokens(name, labels[name].categories) for name in conditions]
        each = [t for column in tokens for t in dict.fromkeys(column)]
        if len(set(each)) != len(each):
            twice = next(t for i, t in enumerate(each) if t in each[:i])
            raise ConfigError(
                f"two conditions have the token {twice}", advice="rename one of the columns"
            )
        self.vocab = Vocab((*vocab.tokens, *(t for t in each if t not in vocab)))
        # The missing value comes last, where the code -1 finds it.
        self._ids = [np.array([self.vocab[t] for t in column], np.int32) for column in tokens]

    def ids(self, labels: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32 [B, 1 + conditions] from the codes int64 [B, columns]; -1 is missing."""
        out = np.empty((len(labels), 1 + len(self._columns)), np.int32)
        out[:, 0] = self._cls_id
        for i, (column, ids) in enumerate(zip(self._columns, self._ids, strict=True)):
            out[:, 1 + i] = ids[labels[:, column]]
        return out


def condition_tokens(column: str, categories: Sequence[str]) -> list[str]:
    """The tokens of a column's categories in order, and last that of a missing value."""
    return [f"<{column}:{category}>" for category in (*categories, "")]


def gene_ids(vocab: Vocab) -> NDArray[np.int32]:
    """The ids of all tokens that are genes: those not in angle brackets."""
    is_gene = [not (t.startswith("<") and t.endswith(">")) for t in vocab.tokens]
    return np.flatnonzero(is_gene).astype(np.int32)


def _place(name: str, labels: Mapping[str, LabelInfo]) -> int:
    if name not in labels:
        advice = did_you_mean(name, labels) if labels else "pack with --obs-columns to keep some"
        raise ConfigError(
            f"conditions names {name!r}, and the shard set has no such column", advice=advice
        )
    if labels[name].kind != "category":
        raise ConfigError(
            f"conditions names {name!r}, a column of numbers, which has no categories",
            advice="bin it into categories before packing",
        )
    return list(labels).index(name)

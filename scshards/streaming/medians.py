"""Each gene's median among the cells that have it, from one stream: what objective="ranks" divides by.

    CellLoader(objective="counts") --> how many cells have a gene with a value in each bin --> medians

A value is count / sum of the cell's counts, times 10,000, and a gene's median is that of its values
above 0, as Geneformer's (Theodoris et al. 2023, doi 10.1038/s41586-023-06139-9). Values are counted in
bins, 64 to a factor of two, and a bin's values are taken for the one that is nearest to both its ends:
a median is at most 0.78 % off, whatever came in which order. Called by `scshards genes --medians`.
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.kernels.ranks import OCTAVES, tally_values, value_bins
from scshards.streaming.collate.counts import CountsBatch
from scshards.streaming.collate.options import GeneMedians, read_medians
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.read.options import ReadOptions
from scshards.streaming.variable import all_counts, counts_loader

_GENES = 512
"""Genes whose medians are worked out at a time."""

_MARK = object()
_PLAIN = (
    "BININT",
    "LONG",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINBYTES",
    "SHORT_BINBYTES",
)
_DTYPES = ("f4", "f8", "i4", "i8")
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""How opcodes begin that say a value; numpy's numbers, as its versions name them."""


@dataclass(frozen=True, kw_only=True)
class Medians:
    """What `gene_medians` returns.

    Attributes
    ----------
    by_gene
        {gene: median}, in the order of the vocabulary.
    without
        Genes of the vocabulary that no cell has: they have no median.
    cells
        How many were looked at.
    """

    by_gene: dict[str, float]
    without: tuple[str, ...]
    cells: int


def gene_medians(
    root: str | os.PathLike[str],
    *,
    split: str = "train",
    choose: ChoiceOptions = ChoiceOptions(),  # noqa: B008  # it is frozen
    read: ReadOptions = ReadOptions(),  # noqa: B008
    progress: bool = False,
) -> Medians:
    """The median of each gene's values above 0 in a split's cells, at most 0.78 % off.

    It takes memory for genes, none for cells: up to 8 kB for each gene of the vocabulary.

    Parameters
    ----------
    root, split, choose, read
        As of CellLoader; each cell counts once.

    Raises
    ------
    ConfigError
        For fractions in place of counts, a split without cells, a cell of more than a billion counts.
    """
    loader = counts_loader(root, split, choose, read)
    # Zeroed by the system where it is first written to.
    table = np.zeros((OCTAVES, len(loader.genes), 64), np.uint32)
    cells = 0
    for batch in all_counts(loader, progress=progress):
        cells += _tally(batch, table)
    medians = np.concatenate(list(_medians(table)) or [np.zeros(0)])
    found = zip(loader.genes, medians.tolist(), strict=True)
    by_gene = {gene: median for gene, median in found if median > 0}
    without = tuple(gene for gene in loader.genes if gene not in by_gene)
    return Medians(by_gene=by_gene, without=without, cells=cells)


def published_medians(path: str | os.PathLike[str]) -> GeneMedians:
    """The medians of a pickled {gene: median}, as Geneformer publishes them.

    A pickle can run any code while it is loaded. So this one is not: its names and numbers, Python's and
    numpy's, are read, and whatever else is in it is an error.

    Raises
    ------
    ConfigError
        For a file that can't be read, or that holds something else.
    """
    try:
        held = _literals(Path(path).read_bytes())
    except OSError as e:
        _refuse(path, f"it can't be read: {e.strerror}")
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as e:
        _refuse(path, f"it is no pickle of names and numbers: {e}")
    if not isinstance(held, dict):
        _refuse(path, f"it holds no medians by gene, but a {type(held).__name__}")
    medians = read_medians(held)
    assert medians is not None
    return medians


def _tally(batch: CountsBatch, table: NDArray[np.uint32]) -> int:
    """Count the values of a batch; how many cells it has."""
    is_mine = batch.weight.numpy() > 0
    is_beyond = tally_values(
        batch.indptr.numpy(),
        batch.genes.numpy(),
        batch.counts.numpy(),
        batch.library.numpy(),
        is_mine,
        table,
    )
    if is_beyond:
        raise ConfigError(
            "a cell's counts add up to more than a billion, and one of them is a 1: no table of medians "
            "has a place for its value",
            advice="leave such cells out with where",
        )
    return int(is_mine.sum())


def _medians(table: NDArray[np.uint32]) -> Iterator[NDArray[np.float64]]:
    """The median of each gene, 0 where nothing was counted, some genes at a time."""
    lower, upper = value_bins()
    middle = (2 * lower * upper / (lower + upper)).reshape(-1)
    for begin in range(0, table.shape[1], _GENES):
        some = table[:, begin : begin + _GENES].transpose(1, 0, 2).reshape(-1, middle.size)
        upto = np.cumsum(some, axis=1, dtype=np.int64)
        n = upto[:, -1:]
        # Of an even number, the mean of both that are in the middle.
        both = [middle[(upto <= at).sum(axis=1) % middle.size] for at in ((n - 1) // 2, n // 2)]
        yield np.where(n[:, 0] > 0, (both[0] + both[1]) / 2, 0)


def _literals(data: bytes) -> Any:
    """What a pickle of dictionaries, names and numbers holds; ValueError for anything else.

    Numpy writes a number as `scalar(dtype("f8", ...), bytes)`, and sets the order of bytes of the dtype
    after it was made.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        at = len(stack) - 1 - stack[::-1].index(_MARK)
        taken = stack[at + 1 :]
        del stack[at:]
        return taken

    value: Any
    for op, value, _ in pickletools.genops(data):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack[-1]
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(None)  # of a dtype, where they say nothing of floats
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "SETITEM":
                stack[-3][stack[-2]] = stack[-1]
                del stack[-2:]
            case "SETITEMS":
                pairs = above_mark()
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(op.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "STACK_GLOBAL":
                stack[-2:] = [_Global(f"{stack[-2]}.{stack[-1]}")]
            case "GLOBAL":
                stack.append(_Global(value.replace(" ", ".")))
            case "REDUCE":
                stack[-2:] = [_numpys(stack[-2], stack[-1])]
            case "BUILD":
                if not isinstance(stack[-2], np.dtype) or stack[-1][1] not in ("<", "|"):
                    raise ValueError("it has an object of another kind")
                stack.pop()
            case name if name.startswith(_PLAIN):
                stack.append(value)
            case name:
                raise ValueError(f"it has the opcode {name}")
    raise ValueError("it ends early")


class _Global(str):
    """What a pickle names, and nobody looks up."""

    __slots__ = ()


def _numpys(what: Any, arguments: tuple[Any, ...]) -> Any:
    """A dtype of numpy, a number of it as one of Python, or its bytes."""
    if isinstance(what, _Global) and what == "numpy.dtype":
        if arguments[0] not in _DTYPES:
            raise ValueError(f"it has values of the dtype {arguments[0]}")
        return np.dtype(f"<{arguments[0]}")
    if isinstance(what, _Global) and what == "_codecs.encode" and arguments[1] == "latin1":
        return arguments[0].encode("latin1")  # bytes, before there was an opcode for them
    if isinstance(what, _Global) and what in _SCALARS:
        return np.frombuffer(arguments[1], arguments[0])[0].item()
    raise ValueError(f"it calls {what}")


def _refuse(path: str | os.PathLike[str], what: str) -> NoReturn:
    raise ConfigError(
        what,
        where=os.fspath(path),
        advice="name Geneformer's dictionary of medians, such as gene_median_dictionary_gc104M.pkl",
    )

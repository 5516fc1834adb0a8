"""What became of the cells of each source, as the manifest tells it.

sources_before(...)   what the surveys say of them; nothing is packed yet
dropped(...)          cells that are left out, each with its reason
account(...)          both, with what the tasks of pass 1 have counted
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from scshards.packing.compare import described
from scshards.packing.decide import Decision
from scshards.packing.options import PackOptions
from scshards.packing.request import Request
from scshards.packing.survey import ANOTHER_SPLIT, WHERE, AnyInput, Survey, limit_reasons
from scshards.packing.unique import dropped_reason
from scshards.shards.manifest import SourceInfo
from scshards.sources.genes import Shared
from scshards.sources.inputs import InputFile

Dropped = tuple[int, str, int]
"""Source, reason, cells."""


def dropped(
    surveys: Sequence[Survey],
    decision: Decision,
    marks: Iterable[Mapping[str, Any]],
    options: PackOptions,
) -> Iterator[Dropped]:
    """All that is left out, in the order in which it was; `marks` are those of pass 1."""
    order = (ANOTHER_SPLIT, WHERE, *limit_reasons(options))
    yield from sorted((d for s in surveys for d in s.dropped), key=lambda d: order.index(d[1]))
    for ordinal, n in decision.repeated.items():
        yield ordinal, dropped_reason(options), n
    for mark in marks:
        yield from mark["dropped"]


def account(
    request: Request,
    surveys: Sequence[Survey],
    decision: Decision,
    marks: Sequence[Mapping[str, Any]],
    left_out: Iterable[Dropped],
) -> tuple[SourceInfo, ...]:
    """What became of the sources of all inputs, by ordinal.

    Parameters
    ----------
    request, surveys, decision
        Of the job.
    marks
        Those of all tasks of pass 1.
    left_out
        What `dropped` gave.
    """
    first, are_sets = request.first_input, bool(request.sets)
    if are_sets:
        found = [source for old in request.sets for source in old.manifest.sources]
    else:
        packed = zip(request.inputs, surveys, decision.shared, strict=True)
        found = [_source_info(*one) for one in packed]
    sums = np.zeros((len(found), 3), np.int64)
    unmatched, rounded = np.zeros((2, len(found)), np.int64)
    for mark in marks:
        if not are_sets:
            unmatched[mark["input"] - first] += mark["unmatched_values"]
            rounded[mark["input"] - first] += mark["rounded"]
        for source, *counts in mark["sources"]:
            sums[source - first] += counts
    reasons = [dict(info.dropped) for info in found]
    for source, reason, n in left_out:
        of_source = reasons[source - first]
        of_source[reason] = of_source.get(reason, 0) + n
    out = []
    for i, info in enumerate(found):
        kept, values, n_bytes = sums[i].tolist()
        out.append(
            dataclasses.replace(
                info,
                kept=kept,
                dropped=reasons[i],
                values=values,
                unmatched_values=info.unmatched_values + int(unmatched[i]),
                rounded=info.rounded + int(rounded[i]),
                bytes=n_bytes,
            )
        )
    return tuple(out)


def _source_info(file: AnyInput, s: Survey, shared: Shared) -> SourceInfo:
    """What the survey of an input says of it; nothing is packed yet."""
    assert isinstance(file, InputFile)
    return SourceInfo(
        name=s.name,
        rows=s.n_rows,
        kept=0,
        dropped={},
        columns=s.columns,
        matched=s.matched,
        unmatched=s.unmatched,
        merged=s.merged,
        left_out=s.left_out,
        **described(file, s, shared),
        values=0,
        unmatched_values=0,
        bytes=0,
        skipped=s.skipped,
    )

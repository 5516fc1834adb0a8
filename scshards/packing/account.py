"""What became of the cells of each source, as the manifest tells it.

dropped(...)   cells that are left out, each with its reason
account(...)   what the surveys say of the sources, with what the tasks of pass 1 have counted
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from scshards.packing.decide import Decision
from scshards.packing.options import PackOptions
from scshards.packing.request import Request
from scshards.packing.scatter import Scattered
from scshards.packing.survey import ANOTHER_SPLIT, WHERE, Survey, limit_reasons
from scshards.packing.unique import dropped_reason
from scshards.shards.manifest import SourceInfo

Dropped = tuple[int, str, int]
"""Source, reason, cells."""


def dropped(
    surveys: Sequence[Survey],
    decision: Decision,
    scattered: Iterable[Scattered],
    options: PackOptions,
) -> Iterator[Dropped]:
    """All that is left out, in the order in which it was."""
    order = (ANOTHER_SPLIT, WHERE, *limit_reasons(options), dropped_reason(options))
    yield from sorted((d for s in surveys for d in s.dropped), key=lambda d: order.index(d[1]))
    for ordinal, n in decision.repeated.items():
        yield ordinal, dropped_reason(options), n
    for done in scattered:
        yield from done.dropped


def account(
    request: Request,
    surveys: Sequence[Survey],
    decision: Decision,
    scattered: Sequence[Scattered],
    left_out: Iterable[Dropped],
) -> tuple[SourceInfo, ...]:
    """What became of the sources of all inputs, by ordinal.

    Parameters
    ----------
    request, surveys, decision
        Of the job.
    scattered
        Of all tasks of pass 1.
    left_out
        What `dropped` gave.
    """
    first = request.first_input
    if request.sets:
        found = [source for old in request.sets for source in old.manifest.sources]
    else:
        found = [
            dataclasses.replace(
                s.info,
                ids=round(shared.ids, 4),
                shared=None if shared.least is None else round(shared.least, 4),
            )
            for s, shared in zip(surveys, decision.shared, strict=True)
        ]
    sums = np.zeros((len(found), 5), np.int64)
    for done in scattered:
        for source, *counts in done.sources:
            sums[source - first] += counts
    reasons = [dict(info.dropped) for info in found]
    for source, reason, n in left_out:
        of_source = reasons[source - first]
        of_source[reason] = of_source.get(reason, 0) + n
    out = []
    for i, info in enumerate(found):
        kept, values, n_bytes, unmatched, rounded = sums[i].tolist()
        out.append(
            dataclasses.replace(
                info,
                kept=kept,
                dropped=reasons[i],
                values=values,
                unmatched_values=info.unmatched_values + unmatched,
                rounded=info.rounded + rounded,
                bytes=n_bytes,
            )
        )
    return tuple(out)

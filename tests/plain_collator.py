"""The batches of docs/reference/batches.md in plain numpy, cell by cell: what the compiled collator is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from plain_bins import bin_values

from scshards.base import seeds
from scshards.cells.vocab import Vocab
from scshards.streaming.collate.options import CollateOptions


@dataclass
class PlainCell:
    """A cell, or None for `genes` in a row that only fills up a batch."""

    key: int
    genes: np.ndarray | None
    values: np.ndarray | None
    conditions: list[int]


class PlainCollator:
    """One row after the other; `vocab` is that of the shard set."""

    def __init__(self, options: CollateOptions, vocab: Vocab, seed: int, epoch: int) -> None:
        self.options, self.vocab, self.seed, self.epoch = options, vocab, seed, epoch
        self.genes = [i for i, t in enumerate(vocab.tokens) if t not in ("<pad>", "<cls>", "<eoc>")]
        self.cls_value = options.pad_value if options.cls_value is None else options.cls_value
        self.front = 1 + len(options.conditions)

    def key(self, purpose: str, cell: int) -> int:
        return int(seeds.draws(seeds.key(self.seed, purpose, self.epoch), np.array([cell]))[0])

    def ratio(self, position: int) -> float:
        ratios = self.options.mask_ratio
        if ratios is None:
            ratios = (0.25, 0.5, 0.75) if self.options.objective == "generate" else (0.4,)
        if not isinstance(ratios, tuple):
            ratios = (ratios,)
        if len(ratios) == 1:
            return ratios[0]
        draw = int(seeds.draws(seeds.key(self.seed, "ratio", self.epoch), np.array([position]))[0])
        return ratios[(draw >> 32) * len(ratios) >> 32]

    def tokens(self, cell: PlainCell) -> tuple[list[int], list[float]]:
        """All tokens of a row without padding, nothing hidden."""
        ids, values = [self.vocab.cls_id, *cell.conditions], [self.cls_value] * self.front
        if cell.genes is None:
            return ids, values
        options, n = self.options, len(cell.genes)
        shown = self.shown(cell)
        room = options.max_length - self.front - options.include_zero_genes
        places = np.arange(n)
        if n > room:
            kept = (options.keep_first or self.front) - self.front
            chosen = choose(n - kept, room - kept, self.key("sample", cell.key))
            places = np.concatenate((np.arange(kept), kept + np.flatnonzero(chosen)))
        ids += cell.genes[places].tolist()
        values += shown[places].tolist()
        zeros = self.zeros(cell)
        return ids + zeros, values + [0.0] * len(zeros)

    def shown(self, cell: PlainCell) -> np.ndarray:
        """The values of the whole cell as the model sees them, float32."""
        options, raw = self.options, cell.values
        if options.values == "bins" and options.n_bins and len(raw):
            u = None
            if options.tie_break == "random":
                draws = seeds.draws(self.key("tie", cell.key), cell.genes)
                u = ((draws >> np.uint64(11)).astype(np.float64) + 1) / 2**53
            return bin_values(raw, options.n_bins, u).astype(np.float32)
        out = raw.astype(np.float64)
        if options.target_sum is not None:
            out = out * (options.target_sum / float(sum(raw.tolist())))
        return (np.log1p(out) if options.values == "log1p" else out).astype(np.float32)

    def zeros(self, cell: PlainCell) -> list[int]:
        key = self.key("zeros", cell.key)
        own, found, i = set(cell.genes.tolist()), set(), 0
        while len(found) < min(self.options.include_zero_genes, len(self.genes) - len(own)):
            draw = int(seeds.draws(key, np.array([i]))[0]) >> 32
            gene = self.genes[draw * len(self.genes) >> 32]
            found |= {gene} - own
            i += 1
        return sorted(found)

    def length(self, cells: list[PlainCell]) -> int:
        longest, top = max(len(self.tokens(c)[0]) for c in cells), self.options.max_length
        to = self.options.pad_to
        if to in ("longest", "max"):
            return longest if to == "longest" else top
        return min(top, -(-longest // to) * to)

    def hidden(self, cell: PlainCell, n: int, ratio: float, *, least: int = 0) -> np.ndarray:
        """Which of a row's n tokens are masked or unknown."""
        options, out = self.options, np.zeros(n, bool)
        if cell.genes is None:
            return out
        first = min(options.keep_first or self.front, n)
        if options.objective == "generate" or options.exact_mask:
            purpose = "generate" if options.objective == "generate" else "mask"
            count = max(int((n - first) * ratio), min(n - first, least))
            out[first:] = choose(n - first, count, self.key(purpose, cell.key))
        elif options.objective == "mask":
            share = round(ratio * 65536)
            out[:] = chances(self.key("mask", cell.key), share, n)
            out[:first] = False
        return out

    def masked(self, cells: list[PlainCell], position: int) -> dict[str, np.ndarray]:
        """The fields of a Batch."""
        length, ratio = self.length(cells), self.ratio(position)
        rows = []
        for cell in cells:
            ids, values = self.tokens(cell)
            hidden = self.hidden(cell, len(ids), ratio)
            seen = np.where(hidden, self.options.mask_value, values)
            rows.append((ids, seen, values, hidden, np.zeros(len(ids), bool)))
        fills = (self.vocab.pad_id, self.options.pad_value, self.options.pad_value, False, True)
        names = ("genes", "values", "targets", "is_masked", "is_pad")
        return {
            name: padded([r[i] for r in rows], length, fills[i]) for i, name in enumerate(names)
        }

    def generated(self, cells: list[PlainCell], position: int) -> dict[str, np.ndarray]:
        """The fields of a GenerateBatch."""
        length, ratio = self.length(cells), self.ratio(position)
        open_genes = length - (self.options.keep_first or self.front)
        unknown = int(max(open_genes, 0) * ratio)
        least = 1 if unknown == 0 and open_genes > 0 else 0
        unknown = max(unknown, least)
        parts: list[list[list]] = [[], [], [], []]
        for cell in cells:
            ids, values = map(np.array, self.tokens(cell))
            hidden = self.hidden(cell, len(ids), ratio, least=least)
            for part, rows in zip((ids[~hidden], values[~hidden], ids[hidden], values[hidden]), parts, strict=True):  # fmt: skip
                rows.append(part)
        pad_id, pad_value = self.vocab.pad_id, self.options.pad_value
        known = length - unknown
        return {
            "known_genes": padded(parts[0], known, pad_id),
            "known_values": padded(parts[1], known, pad_value),
            "known_is_pad": padded([np.zeros(len(r), bool) for r in parts[0]], known, True),
            "unknown_genes": padded(parts[2], unknown, pad_id),
            "unknown_targets": padded(parts[3], unknown, pad_value),
            "unknown_is_pad": padded([np.zeros(len(r), bool) for r in parts[2]], unknown, True),
        }


def chances(key: int, share: int, n: int) -> np.ndarray:
    """n draws that come out true with the chance share / 2^16, bool [n].

    Position j is bit j % 64 of word j // 64. A word is made of one draw for each binary digit i of
    `share`, with the counter `word << 4 | i`, from the lowest set digit on: or-ed to the word where
    the digit is 1, and-ed where it is 0.
    """
    words = np.zeros(-(-n // 64), np.uint64)
    counters = np.arange(len(words)) << 4
    for i in range(16):
        drawn = seeds.draws(key, counters | i)
        words = words | drawn if share >> i & 1 else words & drawn
    return np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:n].astype(bool)


def choose(n: int, k: int, key: int) -> np.ndarray:
    """k of n places, bool [n]."""
    if k == n:
        return np.ones(n, bool)
    taken = chances(key, (k * 256 // n) * 256, n)
    i = -(-n // 64) * 16
    while taken.sum() != k:
        place = (int(seeds.draws(key, np.array([i]))[0]) >> 32) * n >> 32
        i += 1
        if taken[place] == (taken.sum() > k):
            taken[place] = not taken[place]
    return taken


def padded(rows: list, length: int, fill: float) -> np.ndarray:
    """Rows side by side."""
    assert max(map(len, rows)) <= length
    return np.array([[*r, *[fill] * (length - len(r))] for r in rows]).reshape(len(rows), length)

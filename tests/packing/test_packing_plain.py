"""Plain rows against plain numpy; on any processor the same."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from plain_tokens import tokenized
from test_packing_scatter import LIMITLESS, run

from scshards.cells.tokenizer import GeneMatch
from scshards.shards.members import encode_rows

N_TOKENS = 40_000


def rows_of(seed: int) -> tuple[GeneMatch, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows of 0 to 20,000 values: gaps of one to three bytes, counts of one to four."""
    rng = np.random.default_rng(seed)
    tokens = rng.permutation(N_TOKENS).astype(np.int32)
    tokens[rng.random(N_TOKENS) < 0.01] = -1
    sizes = [0, 1, 2, 3, 60, 400, 3000, 20_000]
    indices = [np.sort(rng.choice(N_TOKENS, n, replace=False)) for n in sizes]
    top = 2 ** rng.integers(1, 25, sum(sizes)) * (rng.random(sum(sizes)) < 0.05)
    counts = np.maximum(rng.integers(1, 9, sum(sizes)), top - 1)
    match = GeneMatch(tokens=tokens, n_tokens=N_TOKENS)
    return match, (
        np.cumsum([0, *sizes]),
        np.concatenate(indices).astype(np.int32),
        counts.astype(np.float32),
    )


def members(seed: int) -> tuple[bytes, list[float], int]:
    match, csr = rows_of(seed)
    n = len(csr[0]) - 1
    found, _, _, totals, _, unmatched = run(match, csr, list(range(n)), "counts", {}, 1 << 20)
    return found, totals.tolist(), unmatched


@pytest.mark.parametrize("seed", range(4))
def test_gaps_and_counts_of_any_size(seed: int) -> None:
    assert run.limits == LIMITLESS  # type: ignore[attr-defined]
    match, csr = rows_of(seed)
    tokens, lost = tokenized(*csr, match, "counts")
    assert tokens.values.max() >= 2**21 and tokens.indptr[-1] > 20_000
    found, totals, unmatched = members(seed)
    assert found == encode_rows(tokens)[0].tobytes()
    assert totals == [float(tokens.values[a:b].sum()) for a, b in _rows(tokens.indptr)]
    assert unmatched == lost > 0


def test_a_processor_without_wide_instructions_writes_the_same() -> None:
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    said = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert said.stdout.split() == [hashlib.sha256(members(0)[0]).hexdigest()], said.stderr


def _rows(indptr: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True))


if __name__ == "__main__":
    print(hashlib.sha256(members(0)[0]).hexdigest())

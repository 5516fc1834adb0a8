"""objective="own": a user's function on each cell, in the loader's threads."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from loaders import dataset_of, loader_of
from s3_start import S3
from shardsets import Known, make_set

from scshards.base import seeds
from scshards.base.errors import ConfigError, StateError
from scshards.kernels.bits import draw
from scshards.streaming.collate.own import TokenBatch

ROOM = 20


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), [40, 7, 23, 31], n_genes=60, longest=50)


@numba.njit
def halves(genes, counts, key, tokens, values):
    """Every second gene from one that is drawn on, with the logarithm of its count."""
    first = np.int64(draw(key, 0) & np.uint64(1))
    n = 0
    for i in range(first, len(genes), 2):
        if n == len(tokens):
            break
        tokens[n], values[n] = genes[i], np.log1p(counts[i])
        n += 1
    return n


def plain(genes, counts, key, tokens, values):
    tokens[0], values[0] = len(genes), counts.sum()
    return 1


def expected(known: Known, cell: int, epoch: int, seed: int) -> tuple[list[int], np.ndarray]:
    base = seeds.draws(seeds.key(seed, "tokenize", epoch), np.array([cell]))
    first = int(seeds.draws(int(base[0]), np.zeros(1, np.int64))[0]) & 1
    genes, counts = known.genes[cell][first::2][:ROOM], known.values[cell][first::2][:ROOM]
    return genes.tolist(), np.log1p(counts.astype(np.float32))


def check(known: Known, batch: TokenBatch, epoch: int, seed: int) -> None:
    for row, cell in enumerate(batch.key.tolist()):
        genes, values = expected(known, cell, epoch, seed) if cell >= 0 else ([], np.zeros(0))
        n = len(genes)
        assert batch.tokens[row, :n].tolist() == genes
        np.testing.assert_allclose(batch.values[row, :n].numpy(), values, rtol=1e-6)
        assert batch.is_pad[row].tolist() == [False] * n + [True] * (batch.tokens.shape[1] - n)
        assert set(batch.tokens[row, n:].tolist()) <= {known.vocab.pad_id}
        assert set(batch.values[row, n:].tolist()) <= {-2.0}


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_hold_what_the_function_wrote(known: Known, threads: int) -> None:
    options: dict[str, Any] = {
        "objective": "own", "tokenize": halves, "max_length": ROOM, "batch_size": 8, "seed": 5,
        "threads": threads, "drop_last": False,
    }  # fmt: skip
    with loader_of(known.root, **options) as loader:
        for epoch in range(2):
            batches = list(loader)
            assert sorted(k for b in batches for k in b.key.tolist() if k >= 0) == sorted(
                known.genes
            )
            for batch in batches:
                check(known, batch, epoch, 5)
    whole = next(iter(loader_of(known.root, pad_to="max", **options)))
    assert whole.tokens.shape == (8, ROOM)
    assert next(iter(loader_of(known.root, **options))).tokens.shape[1] <= ROOM


def test_it_resumes_on_two_ranks(known: Known) -> None:
    options: dict[str, Any] = {
        "objective": "own",
        "tokenize": halves,
        "max_length": ROOM,
        "lanes": 8,
    }
    loader = loader_of(known.root, batch_size=6, **options)
    batches = iter(loader)
    seen = [k for _ in range(5) for k in next(batches).key.tolist()]
    state = json.loads(json.dumps(loader.state_dict()))
    for rank in range(2):
        of_rank = loader_of(
            known.root, batch_size=3, rank=rank, world_size=2, drop_last=False, **options
        )
        of_rank.load_state_dict(state)
        for batch in of_rank:
            check(known, batch, 0, 0)
            seen += [k for k in batch.key.tolist() if k >= 0]
    assert sorted(seen) == sorted(known.genes)
    other = loader_of(known.root, batch_size=6, **{**options, "tokenize": plain})
    with pytest.raises(StateError, match=r"collate\.tokenize"):
        other.load_state_dict(state)


def test_a_plain_function_is_compiled(known: Known) -> None:
    (batch,) = loader_of(
        known.root, objective="own", tokenize=plain, batch_size=101, max_length=2, shuffle=False
    )
    for cell, token, value in zip(
        batch.key.tolist(), batch.tokens[:, 0].tolist(), batch.values[:, 0].tolist(), strict=True
    ):
        assert (token, value) == (len(known.genes[cell]), known.values[cell].sum())


def test_of_fractions_it_gets_these(tmp_path: Path) -> None:
    known = make_set(tmp_path, [30], kind="float")
    (batch,) = loader_of(known.root, objective="own", tokenize=plain, batch_size=30, max_length=2)
    for cell, value in zip(batch.key.tolist(), batch.values[:, 0].tolist(), strict=True):
        assert value == pytest.approx(known.values[cell].sum(), rel=1e-5)


def writes_too_much(genes, counts, key, tokens, values):
    for i in range(len(tokens) + 1):
        tokens[i] = 1
    return 0


def says_too_much(genes, counts, key, tokens, values):
    return len(tokens) + 1


def takes_too_little(genes, counts):
    return 0


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (writes_too_much, r"raised IndexError.*\n.*tokenize, 000000-00000000\d\d\n.*20 places"),
        (says_too_much, r"did not return how many tokens it wrote, 0 to 20"),
        (takes_too_little, r"numba can't compile the function"),
    ],
)
def test_a_function_that_is_wrong_is_told(known: Known, function: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        list(loader_of(known.root, objective="own", tokenize=function, max_length=ROOM))


def test_options_that_do_not_go_together_are_refused(known: Known) -> None:
    for options, what in (
        ({"objective": "own"}, "needs the function"),
        ({"objective": "own", "tokenize": plain, "n_bins": 5}, "n_bins is no option"),
        ({"tokenize": plain}, "give objective='own'"),
        ({"objective": "own", "tokenize": "plain"}, "a function is needed"),
        ({"objective": "own", "tokenize": functools.partial(plain)}, "a function is needed"),
    ):
        with pytest.raises(ConfigError, match=what):
            loader_of(known.root, **options)


def test_workers_and_s3_give_the_same(known: Known, s3: S3, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "objective": "own", "tokenize": halves, "max_length": ROOM, "batch_size": 8,
    }  # fmt: skip
    batches = list(
        torch.utils.data.DataLoader(
            dataset_of(known.root, **options), batch_size=None, num_workers=2
        )
    )
    assert len(batches) == 101 // 8
    remote = make_set(tmp_path, [30, 20], url=f"{s3.url}/set", n_genes=60, longest=50)
    for batch in batches:
        check(known, batch, 0, 0)
    for batch in loader_of(f"{s3.url}/set", **options):
        check(remote, batch, 0, 0)

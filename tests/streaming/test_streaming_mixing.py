"""report.mixing: the batches it tells of are those that the loader makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loaders import in_parts, loader_of
from shardsets import make_set
from test_streaming_entropy import plainly

from scshards.base.errors import ConfigError
from scshards.kernels.order import shuffled, some_of
from scshards.report.mix_options import MixOptions
from scshards.report.mixing import mix
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.read.options import ReadOptions


def loaded(root, o: MixOptions, flat: dict[str, Any]) -> list[list[list[int]]]:
    """The donors of each rank's batches, by step."""
    loaders = [
        loader_of(
            root,
            batch_size=o.batch_size,
            rank=rank,
            world_size=o.world_size,
            shuffle=o.shuffle,
            seed=o.seed,
            epoch=o.epoch,
            **flat,
        )
        for rank in range(o.world_size)
    ]
    return [[b.labels["donor"].tolist() for b in step] for step in zip(*loaders, strict=True)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    donors = np.repeat([2, 0, -1, 1, 0], [130, 80, 40, 110, 43])
    folder = tmp_path_factory.mktemp("mixing")
    return make_set(folder, [100, 3, 150, 90, 60], donors=donors).root


@pytest.mark.parametrize(
    ("o", "flat"),
    [
        (MixOptions(batch_size=16), {}),
        (MixOptions(batch_size=16, seed=5, epoch=3), {"shuffle_buffer": 64, "lanes": 8}),
        (MixOptions(batch_size=7, world_size=3), {"lanes": 6, "shuffle_buffer": 30}),
        (MixOptions(batch_size=5, world_size=4), {"lanes": 6}),
        (MixOptions(batch_size=9, world_size=2, shuffle=False), {"lanes": 2}),
        (MixOptions(batch_size=2, shuffle=False), {"lanes": 1}),
        (MixOptions(batch_size=10), {"where": "donor != 'a'", "take": 200}),
        (MixOptions(batch_size=10), {"epoch_cells": 900}),
        (MixOptions(batch_size=10, world_size=2), {"weights": {"donor": "balanced"}, "lanes": 4}),
    ],
    ids=repr,
)
def test_every_batch_is_one_that_the_loader_makes(root, o, flat):
    report = mix(root, ["donor"], o, **in_parts(flat), progress=False)
    steps = loaded(root, o, flat)
    assert (report.steps, report.sampled) == (len(steps), len(steps))
    of_ranks = report.columns[0]
    assert of_ranks.cells == o.batch_size
    expected = [plainly(batch) for step in steps for batch in step]
    np.testing.assert_allclose(of_ranks.entropies, expected, atol=1e-12)
    assert of_ranks.mean == pytest.approx(np.mean(expected))
    in_windows = report.columns[o.world_size > 1 :]
    assert [m.window for m in in_windows] == [w for w in (1, 10, 100) if w <= len(steps)]
    for mixed in in_windows:
        assert mixed.cells == mixed.window * o.batch_size * o.world_size
        assert len(mixed.steps) == len(steps) // mixed.window
        together = [
            plainly([d for step in steps[s : s + mixed.window] for batch in step for d in batch])
            for s in mixed.steps.tolist()
        ]
        np.testing.assert_allclose(mixed.entropies, together, atol=1e-12)


def test_of_long_windows_so_many_cells_are_looked_at(tmp_path, monkeypatch):
    root = make_set(tmp_path, [500] * 6, donors=np.repeat([0, 1, 2], 1000), longest=2).root
    o = MixOptions(batch_size=10)
    monkeypatch.setattr("scshards.report.mixing.WINDOW_CELLS", 50)
    of = {m.window: m for m in mix(root, ["donor"], o, progress=False).columns}
    assert {w: m.cells for w, m in of.items()} == {1: 10, 10: 50, 100: 50}
    assert of[100].mean == pytest.approx(of[100].ideal, abs=0.1)


def test_batches_may_mix_where_stretches_do_not(tmp_path):
    """Ten batches in a row held 62 donors of 184, and each batch as many as one drawn at random."""
    donors = np.repeat(np.arange(184), 60)
    categories = tuple(f"d{i}" for i in range(184))
    root = make_set(tmp_path, [1104] * 10, donors=donors, categories=categories, longest=2).root
    o = MixOptions(batch_size=32)
    report = mix(root, ["donor"], o, read=ReadOptions(lanes=32, shuffle_buffer=512), progress=False)
    score = {m.window: m.score for m in report.columns}
    assert score[1] > 0.95 and score[10] < 0.9
    assert report.worst == min(score.values())
    stratified = mix(root, ["donor"], o, choose=ChoiceOptions(stratify="donor"), progress=False)
    assert min(m.score for m in stratified.columns) > 0.99


def test_shares_drift_as_the_loader_makes_them(tmp_path):
    roots = {
        str(make_set(tmp_path / f"{i}", [700, 300], longest=2, seed=i).root): share
        for i, share in enumerate((0.7, 0.3))
    }
    choose, o = ChoiceOptions(epoch_cells=3000), MixOptions(batch_size=10)
    report = mix(roots, ["donor"], o, choose=choose, progress=False)
    assert [d.stratum for d in report.drift] == list(roots)
    keys = np.concatenate([b.key.numpy() for b in loader_of(roots, batch_size=10, choose=choose)])
    for i, drift in enumerate(report.drift):
        of_set = (keys >> 40 == i).reshape(100, 30).mean(axis=1)
        np.testing.assert_allclose(drift.shares, of_set)
        assert drift.share == pytest.approx((0.7, 0.3)[i], abs=1e-3)
        assert drift.low == of_set.min() and drift.high == of_set.max()
        assert drift.high - drift.low < 0.2
    (alone,) = [mix(root, ["donor"], o, progress=False).drift for root in [next(iter(roots))]]
    assert alone == ()


@given(cells=st.integers(1, 300), buffer=st.integers(1, 40), data=st.data())
def test_some_of_a_lane_is_a_part_of_all_of_it(cells, buffer, data):
    wanted = sorted(data.draw(st.sets(st.integers(0, cells - 1))))
    found = some_of(shuffled(cells, buffer, 9), np.array(wanted, np.int64))
    assert found.tolist() == some_of(shuffled(cells, buffer, 9), np.arange(cells))[wanted].tolist()


def test_a_long_lane_is_replayed_in_parts(monkeypatch):
    whole = some_of(shuffled(50, 8, 3), np.arange(50))
    monkeypatch.setattr("scshards.kernels.order.AT_ONCE", 7)
    wanted = np.array([0, 6, 7, 20, 48, 49])
    assert some_of(shuffled(50, 8, 3), wanted).tolist() == whole[wanted].tolist()


def test_a_sample_is_spread_over_the_epoch(root):
    every = mix(root, ["donor"], MixOptions(batch_size=4), progress=False).columns[0]
    some = mix(root, ["donor"], MixOptions(batch_size=4, batches=10), progress=False)
    assert (some.sampled, some.steps) == (10, 100)
    mixed = some.columns[0]
    assert np.all(np.arange(10) * 10 <= mixed.steps) and np.all(mixed.steps < np.arange(1, 11) * 10)
    np.testing.assert_array_equal(mixed.entropies, every.entropies[mixed.steps])


def test_the_whole_is_that_of_the_set(root):
    # 130 cells of c, 123 of a, 110 of b, 40 without a donor: a category of their own.
    (mixed,) = mix(root, ["donor"], progress=False).columns
    labels = ["c"] * 130 + ["a"] * 123 + ["b"] * 110 + [None] * 40
    shares = [labels.count(x) / len(labels) for x in ("a", "b", "c", None)]
    assert mixed.whole == pytest.approx(-sum(p * np.log2(p) for p in shares))
    assert mixed.categories == 4


def test_a_set_in_order_mixes_badly_and_its_shuffled_twin_well(tmp_path):
    in_order = np.repeat([0, 1, 2], 1000)
    mixed_up = np.random.default_rng(0).permutation(in_order)
    scores = {}
    for name, donors in (("order", in_order), ("shuffled", mixed_up)):
        root = make_set(tmp_path / name, [500] * 6, donors=donors, longest=2).root
        for buffer in (64, 3000):
            o, read = MixOptions(batch_size=32), ReadOptions(lanes=2, shuffle_buffer=buffer)
            scores[name, buffer] = mix(root, ["donor"], o, read=read, progress=False).worst
    assert scores["order", 64] < 0.6 < scores["order", 3000] < 1.01
    assert scores["shuffled", 64] > 0.97 and scores["shuffled", 3000] > 0.97


def test_all_labels_of_categories_are_taken_unless_some_are_named(root):
    assert [m.column for m in mix(root, progress=False).columns] == ["donor"]
    found = mix(root, ["source", "donor", "source"], progress=False).columns
    assert [m.column for m in found] == ["source", "donor"]
    # There is one source: nothing can vary, and nothing is wrong with that.
    assert (found[0].whole, found[0].ideal, found[0].score) == (0, 0, None)


@pytest.mark.parametrize(
    ("by", "message"),
    [(["age"], "'age' holds numbers"), (["tissue"], "no label 'tissue'")],
)
def test_what_has_no_categories_is_refused(root, by, message):
    with pytest.raises(ConfigError, match=message) as e:
        mix(root, by, progress=False)
    assert "did you mean" in str(e.value) or "known names" in str(e.value)


def test_too_few_cells_and_wrong_options_are_refused(root):
    with pytest.raises(ConfigError, match="fewer than one global batch of 1200"):
        mix(root, options=MixOptions(batch_size=300, world_size=4), progress=False)
    for wrong in ({"batch_size": 0}, {"world_size": -1}, {"batches": 0}, {"epoch": -1}):
        with pytest.raises(ConfigError, match="whole number from"):
            MixOptions(**wrong)
    with pytest.raises(ConfigError, match="nothing to mix"):
        mix(root, choose=ChoiceOptions(domain_by="donor"), progress=False)

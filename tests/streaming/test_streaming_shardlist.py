"""ShardList: several sets read as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shardsets import make_set

from scshards.base.errors import ConfigError, VocabError
from scshards.shards.shardlist import ShardList


def test_one_set_is_itself(tmp_path: Path) -> None:
    made = make_set(tmp_path, [5, 3])
    one = ShardList([made.root], "train")
    assert one.cells.tolist() == [5, 3]
    assert one.fingerprint() == one.shardsets[0].manifest.fingerprint("train")
    index = one.index(1, ["source", "row", "obs.donor"])
    assert index["obs.donor"].tolist() == [made.donor[k] for k in (5, 6, 7)]


def test_categories_are_united_and_sources_shifted(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", [4, 6], categories=("a", "b", "c"), seed=1)
    b = make_set(tmp_path / "b", [30], categories=("d", "b", "a"), columns=("donor",), seed=2)
    both = ShardList([a.root, b.root], "train")
    assert both.labels["donor"].categories == ("a", "b", "c", "d")
    assert [s.name for s in both.sources] == ["made", "made"]
    assert both.set_of.tolist() == [0, 0, 1]
    mine = both.index(1, ["source", "obs.donor", "obs.age"])
    assert mine["source"].tolist() == [0] * 6
    assert mine["obs.donor"].tolist() == [a.donor[k] for k in range(4, 10)]
    assert mine["obs.age"].tolist() == [a.age[k] for k in range(4, 10)]
    other = both.index(2, ["source", "obs.donor", "obs.age"])
    assert other["source"].tolist() == [1] * 30
    want = [{-1: -1, 0: 3, 1: 1, 2: 0}[b.donor[k]] for k in range(30)]
    assert other["obs.donor"].tolist() == want and -1 in want
    assert np.isnan(other["obs.age"]).all() and len(other["obs.age"]) == 30
    assert both.fingerprint() != ShardList([b.root, a.root], "train").fingerprint()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"n_genes": 41}, VocabError, "another vocabulary"),
        ({"kind": "float"}, ConfigError, "holds float"),
        ({"split": "valid"}, ConfigError, "no split 'train'"),
    ],
)
def test_sets_that_do_not_fit(
    tmp_path: Path, options: dict[str, object], error: type[Exception], says: str
) -> None:
    a = make_set(tmp_path / "a", [4])
    b = make_set(tmp_path / "b", [4], **options)  # type: ignore[arg-type]
    with pytest.raises(error, match=says) as e:
        ShardList([a.root, b.root], "train")
    assert str(b.root) in str(e.value)

"""Counts with rounding noise: refused with the digits that are off, or rounded when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from pack_support import assert_holds, counts, expected, key, quiet_pack, vocab_of, write

from scshards import PackOptions, ShardSet
from scshards.base.errors import ConfigError, ValueKindError
from scshards.cli import main

GENES = [f"G{i:03d}" for i in range(6)]


def noisy(off: float = 2e-10, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and the same with noise: every other value that is not zero is off."""
    x = counts(40, 6, dtype=np.float64)
    signs = np.where(np.arange(x.size).reshape(x.shape) % 4 == 0, off, 0)
    signs -= np.where(np.arange(x.size).reshape(x.shape) % 4 == 2, off, 0)
    return x, np.where(x > 0, x + signs, 0).astype(dtype)


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_the_digits_and_the_cure_are_shown(tmp_path: Path, form: str) -> None:
    _, y = noisy()
    path = write(tmp_path / "a.h5ad", y, form=form)
    with pytest.raises(ValueKindError) as refused:
        quiet_pack(path, tmp_path / "out", vocab_of(6))
    worst = y.ravel()[np.abs(y - np.rint(y)).argmax()]
    assert f"such as {worst!r}".replace("np.float64(", "").replace(")", "") in str(refused.value)
    assert "off by more than 2e-10" in str(refused.value)
    assert "--round-within 1e-09" in str(refused.value)


def test_digits_are_those_of_the_dtype(tmp_path: Path) -> None:
    y = counts(40, 6)
    y[3, 2] = np.float32(4.2)
    with pytest.raises(ValueKindError, match=r"such as 4\.2\n") as refused:
        quiet_pack(write(tmp_path / "a.h5ad", y), tmp_path / "out", vocab_of(6))
    assert "--round-within" not in str(refused.value)


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_near_is_rounded_and_counted(
    tmp_path: Path, form: str, dtype: Any, workers: int
) -> None:
    x, y = noisy(1e-4, dtype)
    path = write(tmp_path / "a.h5ad", y, form=form, obs={"n": range(40)})
    options = {"round_within": 1e-3, "where": "n != 7", "min_genes": 0, "workers": workers}
    manifest = quiet_pack(path, tmp_path / "out", vocab_of(6), **options)
    kept = [i for i in range(40) if i != 7]
    cells = expected(x, GENES, vocab_of(6))
    assert_holds(tmp_path / "out", {key(0, i): cells[i] for i in kept})
    n = int((y != np.rint(y))[kept].sum())
    assert n > 50 and manifest.sources[0].rounded == n and manifest.value_kind == "counts"
    again = ShardSet(tmp_path / "out").manifest
    assert again.sources[0].rounded == n and again.options["round_within"] == 1e-3


def test_what_is_further_off_is_refused(tmp_path: Path) -> None:
    _, y = noisy(1e-4)
    y[31, 4] = 7.01
    path = write(tmp_path / "a.h5ad", y)
    with pytest.raises(ValueKindError, match=r"such as 7\.01"):
        quiet_pack(path, tmp_path / "out", vocab_of(6), round_within=1e-3)


def test_noise_about_zero_is_no_value(tmp_path: Path) -> None:
    x, y = noisy()
    y[:, 3], x[:, 3] = np.where(np.arange(40) % 2, -3e-12, 3e-12), 0
    path = write(tmp_path / "a.h5ad", y)
    with pytest.raises(ValueKindError, match="-3e-12 is negative"):
        quiet_pack(path, tmp_path / "refused", vocab_of(6))
    quiet_pack(path, tmp_path / "out", vocab_of(6), round_within=1e-6, min_genes=0)
    cells = expected(x, GENES, vocab_of(6))
    assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(cells)})


def test_the_command_line(tmp_path: Path) -> None:
    _, y = noisy()
    path = str(write(tmp_path / "a.h5ad", y))
    (tmp_path / "v.json").write_bytes(vocab_of(6).to_json())
    args = ["pack", path, "-o", str(tmp_path / "out"), "--vocab", str(tmp_path / "v.json")]
    done = CliRunner().invoke(main, [*args, "--round-within", "1e-6"])
    assert done.exit_code == 0, done.output
    assert f"rounded to them: {int((y != np.rint(y)).sum())}" in done.output


@pytest.mark.parametrize("wrong", [0, -1, 0.5, float("nan"), "x", True])
def test_what_is_no_tolerance(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        PackOptions(round_within=wrong)
    with pytest.raises(ConfigError, match="kept as they are"):
        PackOptions(round_within=1e-6, values="float")

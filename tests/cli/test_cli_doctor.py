"""`scshards doctor`: what it finds, what it calls amiss, and what it never shows."""

from __future__ import annotations

import json
import platform
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from s3_start import S3
from shardsets import make_set

import scshards
from scshards.cli import main
from scshards.report import doctor


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments], catch_exceptions=False)


def tree(*arguments: str) -> dict[str, Any]:
    done = run("--json", *arguments)
    said: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == bool(said["problems"])
    return said


def test_it_says_what_is_there() -> None:
    facts = tree()["facts"]
    versions = facts["versions"]
    assert versions["scshards"] == scshards.__version__
    assert versions["numpy"] == np.__version__
    # What torch was built for stands in one of the two, or in both.
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert platform.python_version() in versions["Python"]
    assert facts["machine"]["system"] == platform.platform()
    assert list(facts) == ["versions", "machine", "devices", "kernels", "folders", "environment"]
    plain = run()
    for name in ("numpy", "memory", "open files", "folder", "temporary"):
        assert f" {name} " in plain.stdout


def test_it_shows_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hidden@127.0.0.1:9")
    monkeypatch.setenv("SCSHARDS_CACHE", "/somewhere")
    monkeypatch.setenv("GITHUB_TOKEN", "alsosecret")
    for arguments in ([], ["--json"]):
        said = run(*arguments).stdout
        assert not any(secret in said for secret in ("verysecret", "hidden", "alsosecret"))
        assert "AWS_SECRET_ACCESS_KEY" in said and "127.0.0.1:9" in said and "/somewhere" in said


def test_a_store_is_read_and_one_that_is_not_there_is_a_problem(s3: S3, tmp_path: Path) -> None:
    url = f"{s3.url}/set"
    make_set(tmp_path, [5], url=url)
    store = tree(url)["facts"]["store"]
    assert store["address"] == url and store["first answer"].endswith(" ms")
    assert "no shard set" in tree(f"{s3.url}/other")["facts"]["store"]["manifest"]
    nowhere = json.dumps(s3.options | {"endpoint_url": "http://127.0.0.1:9"})
    missing = tree(url, "--retries", "0", "--storage-options", nowhere)
    (problem,) = (p for p in missing["problems"] if "can't be read" in p["what"])
    assert url in problem["what"] and problem["advice"]
    assert s3.options["secret"] not in json.dumps(missing)


def test_few_files_and_little_disk_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 4096))
    monkeypatch.setattr(doctor, "_LEAST_DISK", 1 << 60)
    done = run()
    assert done.exit_code == 1
    assert "64 files open" in done.stdout and "ulimit -n 4096" in done.stdout
    assert " free\n  to do: " in done.stdout


def test_kernels_that_can_not_be_kept_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.cache, "folder", lambda: tmp_path / "kernels" / "x")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert any("can't be kept" in p["what"] for p in tree()["problems"])

"""Starts s3_server.py and says how to reach it. Used by the `s3_server` fixture and tools/bench_stream."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCESS, SECRET = "scshards:tests", "s3cret/of+the=tests"
START_S = 60


@dataclass(frozen=True, kw_only=True)
class S3:
    """A running S3 server and an empty bucket on it.

    `url` is the bucket's address, `env` what a process needs in its environment to reach it, and
    `options` the same as storage options, for tests that change one of them.
    """

    url: str
    env: dict[str, str]
    options: dict[str, Any]


@contextlib.contextmanager
def s3_process(folder: Path) -> Iterator[dict[str, str]]:
    """The environment variables that lead to a server whose objects lie in `folder`; it ends with the block.

    Raises RuntimeError, with what the server said, when it does not start.
    """
    script = Path(__file__).with_name("s3_server.py")
    with (folder / "stderr.txt").open("wb") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(folder), ACCESS, SECRET],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    assert server.stdin is not None and server.stdout is not None
    try:
        readable, _, _ = select.select([server.stdout], [], [], START_S)
        line = server.stdout.readline().decode().split() if readable else []
        if line[:1] != ["READY"]:
            said = (folder / "stderr.txt").read_text()
            raise RuntimeError(f"the S3 server did not start in {START_S} s: {said}")
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line[1]}",
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Nobody's own profile may change what is reached.
            "AWS_CONFIG_FILE": str(folder / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.stdin.close()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

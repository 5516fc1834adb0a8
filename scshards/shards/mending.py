"""What is to be done about damaged files of a shard set: the advice that every error about them gives.

Each names the set as it was opened. `packing.verify.repair` does what is said here.
"""

from __future__ import annotations

import shlex


def shard_again(root: str) -> str:
    """What mends a shard: made again from its inputs, or copied."""
    return (
        f"scshards verify {shlex.quote(root)} ends with the command that repairs it from the inputs of "
        "its cells; or copy the shard from another copy of the set"
    )


def index_again(root: str) -> str:
    """What mends the index of a shard."""
    return f"scshards verify {shlex.quote(root)} --repair makes an index from its tar"


def manifest_again(root: str) -> str:
    """What mends the manifest of a set."""
    return (
        "the same pack into another folder makes the same manifest.json: copy it here; or take that of "
        f"another copy of the set: scshards verify {shlex.quote(root)} --repair-from ROOT2"
    )


def vocab_again(root: str) -> str:
    """What mends the vocabulary of a set."""
    return (
        "the same pack into another folder makes the same vocab.json: copy it here; the file that was "
        "given to --vocab is the same, special tokens aside; or take that of another copy of the set: "
        f"scshards verify {shlex.quote(root)} --repair-from ROOT2"
    )

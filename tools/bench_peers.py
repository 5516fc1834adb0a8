"""Measures scshards beside installs of other loaders, on the same cells; see tools/bench_peers.

Every figure but conversions is a median of runs that were taken in turn: in each round everything is
measured once, each in a process of its own, in an environment of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_peers_data
from bench_peers_page import write_page
from bench_peers_run import Failed, Runner, bytes_of, drop_from_cache, newer_python
from bench_process import machine
from peers import NAMES
from peers.contract import BATCH, COUNTS, KINDS, Peer, Work, job

PLACES = ("warm", "cold", "s3")
OWN = "scshards"
COLD_SHARE = 0.05
"""Files of which more than this stays in memory were not dropped."""


@dataclass
class Found:
    """What came out of a run of the tool, as `--json` writes it.

    Attributes
    ----------
    about
        What it ran on, and how.
    peers
        {name: what it is: title, versions, ways, what it does better}.
    failed
        {name: {job: reason}}.
    stores
        {name: {store: seconds, bytes, memory}}.
    runs
        {name: {kind: {place: a list of figures, one a round}}}.
    resumes
        {name: whether it goes on exactly after a stop, with as many threads and with one more}: "yes",
        "no", "failed", or "none" without a state.
    """

    about: dict[str, Any]
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    stores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    runs: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = field(default_factory=dict)
    resumes: dict[str, list[str]] = field(default_factory=dict)

    def fail(self, name: str, what: str, error: Failed) -> None:
        print(f"{name}, {what}: {error}", file=sys.stderr, flush=True)
        self.failed.setdefault(name, {})[what] = str(error)

    def lines(self) -> Iterable[str]:
        """JSON lines: what it ran on, then a line for each thing that was measured."""
        yield json.dumps({"about": self.about, "peers": self.peers})
        for what in ("failed", "stores", "resumes"):
            yield json.dumps({what: getattr(self, what)})
        for name, kinds in self.runs.items():
            for kind, places in kinds.items():
                for place, rounds in places.items():
                    for number, figures in enumerate(rounds):
                        where = {"peer": name, "kind": kind, "place": place, "round": number}
                        yield json.dumps({**where, **figures})


class Bench:
    """The peers that run, where their stores are, and what is found."""

    def __init__(self, args: argparse.Namespace, found: Found) -> None:
        self.args, self.found = args, found
        self.runner = Runner(
            folder=args.cache,
            python=sys.executable,
            newer_python=newer_python(args.newer_python),
            limit=args.limit,
        )
        self.files = bench_peers_data.files(args.cache, args.cells)
        self.folder = self.files[0].parent.with_name(f"{self.files[0].parent.name}-stores")
        self.peers: dict[str, Peer] = {}
        self.pythons: dict[str, str] = {}

    def install(self) -> None:
        """Make every environment; a peer that does not install is left out, and said so."""
        for name in self.args.peers:
            peer: Peer = importlib.import_module(f"peers.{name}").PEER
            kinds = [kind for kind in peer.stores if kind in self.args.kinds]
            if not kinds:
                print(
                    f"{name} does no {' and no '.join(self.args.kinds)}",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            self.found.peers[name] = {
                "title": peer.title,
                "ways": {kind: peer.ways[kind] for kind in kinds},
                "better": peer.better,
                "stores": peer.stores,
                "converts": peer.convert is not None,
            }
            try:
                self.pythons[name] = self.runner.install(name, peer)
            except Failed as error:
                self.found.fail(name, "install", error)
                continue
            self.peers[name] = peer

    def convert(self) -> None:
        """Write every store that is needed, or take the ones that were written before."""
        for name, peer in list(self.peers.items()):
            for store in dict.fromkeys(s for kind in self._kinds(name) for s in peer.stores[kind]):
                place = self.folder / name
                told = place / f"{store}.json"
                if not told.exists() or self.args.anew:
                    print(f"converting: {peer.title}, {store}", file=sys.stderr, flush=True)
                    try:
                        said = self._convert(name, place, store)
                    except Failed as error:
                        self.found.fail(name, f"convert to {store}", error)
                        del self.peers[name]
                        break
                    said["bytes"] = bytes_of(place / store)
                    told.write_text(json.dumps(said))
                self.found.stores.setdefault(name, {})[store] = json.loads(told.read_text())

    def _convert(self, name: str, place: Path, store: str) -> dict[str, Any]:
        place.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place / store, ignore_errors=True)
        said: dict[str, Any] = self.runner.run(
            name,
            self.pythons[name],
            job(
                "convert",
                files=[str(file) for file in self.files],
                folder=str(place),
                store=store,
                threads=self.args.threads,
            ),
        )
        return said

    def resumes(self) -> None:
        """Stop each loader after a few batches; look whether a new process goes on with the next."""
        for name, peer in self.peers.items():
            kind = next(iter(self._kinds(name)))
            if peer.save is None:
                self.found.resumes[name] = ["none", "none"]
                continue
            print(f"resuming: {peer.title}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="scshards-peers-") as own:
                state = str(Path(own) / "state")
                before = self._digests("save", name, kind, Path(own) / "save", state)
                answers = []
                for i, threads in enumerate((self.args.threads, self.args.threads + 1)):
                    place = Path(own) / f"resume{i}"
                    after = self._digests("resume", name, kind, place, state, threads)
                    same = "yes" if after == before else "no"
                    answers.append(same if before and after else "failed")
                self.found.resumes[name] = answers

    def _digests(
        self, task: str, name: str, kind: str, own: Path, state: str, threads: int = 0
    ) -> list[str]:
        """What a loader gives next, before or after a stop; nothing where that failed."""
        work = self._work(name, kind, own)
        if threads:
            work = dataclasses.replace(work, threads=threads)
        try:
            said = self.runner.run(name, self.pythons[name], job(task, work, state=state))
        except Failed as error:
            self.found.fail(name, f"{task} with {work.threads} threads", error)
            return []
        digests: list[str] = said["digests"]
        return digests

    def rounds(self, place: str, runs: int, kinds: Iterable[str]) -> None:
        """Measure everything once in each round; what fails is not tried again."""
        plan = [(name, kind) for kind in kinds for name in self.peers if kind in self._kinds(name)]
        if place == "s3":
            plan = [(n, k) for n, k in plan if k in self.peers[n].remote]
        for number in range(runs):
            for name, kind in list(plan):
                peer = self.peers[name]
                what = f"{place}, {kind}"
                print(
                    f"run {number + 1} of {runs}, {what}: {peer.title}", file=sys.stderr, flush=True
                )
                try:
                    figures = self._stream(name, kind, place)
                except Failed as error:
                    self.found.fail(name, what, error)
                    plan.remove((name, kind))
                    continue
                versions = {key: figures.pop(key) for key in ("versions", "python")}
                self.found.peers[name].update(versions)
                places = self.found.runs.setdefault(name, {}).setdefault(kind, {})
                places.setdefault(place, []).append(figures)

    def _stream(self, name: str, kind: str, place: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="scshards-peers-") as own:
            if place == "cold":
                for folder in self._read_by(name, kind):
                    stays = drop_from_cache(folder)
                    if stays > COLD_SHARE:
                        raise Failed(f"{stays:.0%} of the files stayed in memory")
            work = self._work(name, kind, Path(own) / "work", place)
            said: dict[str, Any] = self.runner.run(name, self.pythons[name], job("stream", work))
        return said

    def _read_by(self, name: str, kind: str) -> list[Path]:
        """The folders that a peer reads for a kind of work."""
        stores = self.peers[name].stores[kind]
        return [self.folder / name / store for store in stores] or [self.files[0].parent]

    def _work(self, name: str, kind: str, own: Path, place: str = "warm") -> Work:
        own.mkdir()
        args, root = self.args, str(self.folder / name)
        if place == "s3":
            root = f"{S3_ROOT}/{name}"
        return Work(
            kind=kind,
            stores={store: f"{root}/{store}" for store in self.peers[name].stores[kind]},
            files=[str(file) for file in self.files],
            scratch=str(own),
            # A power of two, which divides blocks of rows; sixteen batches at least.
            batch=min(BATCH[kind], 1 << max(0, (args.cells // 16).bit_length() - 1)),
            threads=args.threads,
            seconds=args.seconds,
            cells=args.cells,
            is_once=place != "warm",
        )

    def _kinds(self, name: str) -> list[str]:
        return [kind for kind in self.peers[name].stores if kind in self.args.kinds]

    def warm_up(self) -> None:
        """A short run of everything: it fills caches of pages and kernels, and finds what fails."""
        seconds, self.args.seconds = self.args.seconds, 1.0
        self.rounds("warm", 1, self.args.kinds)
        self.found.runs.clear()
        self.args.seconds = seconds
        for name, failures in self.found.failed.items():
            if name in self.peers and any(what.startswith("warm") for what in failures):
                bad = {what.partition(", ")[2] for what in failures if what.startswith("warm")}
                left = {k: s for k, s in self.peers[name].stores.items() if k not in bad}
                if left:
                    self.peers[name] = dataclasses.replace(self.peers[name], stores=left)
                else:
                    del self.peers[name]

    def s3(self, runs: int) -> None:
        """The same from an S3 server on this machine, each with empty caches."""
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        import s3fs
        from s3_start import s3_process

        with (
            tempfile.TemporaryDirectory(prefix="scshards-peers-") as own,
            s3_process(Path(own)) as env,
        ):
            os.environ.update(env)
            store = s3fs.S3FileSystem()
            store.mkdir(S3_ROOT.partition("://")[2])
            for name, peer in self.peers.items():
                for place in {s for kind in peer.remote for s in peer.stores.get(kind, ())}:
                    local = self.folder / name / place
                    store.put(f"{local}/", f"{S3_ROOT}/{name}/{place}/", recursive=True)
            self.rounds("s3", runs, [COUNTS])


S3_ROOT = "s3://bench-peers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = ", ".join(NAMES)
    parser.add_argument("--peers", default=named, help=f"some of {named}")
    parser.add_argument("--kinds", default=", ".join(KINDS), help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--places", default=", ".join(PLACES), help=f"some of {', '.join(PLACES)}")
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3, help="rounds with files in memory")
    parser.add_argument(
        "--few-runs", type=int, default=2, help="rounds from a cold disk and from S3"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="of streaming in a run")
    parser.add_argument("--threads", type=int, default=2, help="threads or workers of each")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that a job may take")
    parser.add_argument("--cache", type=Path, default=_cache(), metavar="FOLDER")
    parser.add_argument(
        "--python3.12",
        dest="newer_python",
        metavar="PYTHON",
        help="for annbatch; by default python3.12, if there is one",
    )
    parser.add_argument(
        "--anew", action="store_true", help="convert again what was converted before"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, as JSON lines")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the whole page, with tables")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="plots for the page; by default images beside it",
    )
    args = parser.parse_args()
    args.peers = _some(parser, "--peers", args.peers, NAMES)
    args.kinds = _some(parser, "--kinds", args.kinds, tuple(KINDS))
    args.places = _some(parser, "--places", args.places, PLACES)
    if OWN in NAMES and OWN not in args.peers:
        args.peers = [OWN, *args.peers]
    args.cache = args.cache.resolve()
    about = {
        "machine": machine("numpy", "torch").splitlines(),
        "cells": args.cells,
        "runs": args.runs,
        "few runs": args.few_runs,
        "seconds": args.seconds,
        "threads": args.threads,
        "command": _command(parser, sys.argv[1:]),
    }
    begin = time.monotonic()
    found = Found(about)
    bench = Bench(args, found)
    about["h5ad, bytes"] = bytes_of(bench.files[0].parent)
    bench.install()
    bench.convert()
    bench.warm_up()
    bench.resumes()
    steps: dict[str, Callable[[], None]] = {
        "warm": lambda: bench.rounds("warm", args.runs, args.kinds),
        "cold": lambda: bench.rounds("cold", args.few_runs, args.kinds[:1]),
        "s3": lambda: bench.s3(args.few_runs),
    }
    for place in args.places:
        steps[place]()
    about["minutes"] = round((time.monotonic() - begin) / 60)
    if args.json:
        args.json.write_text("\n".join(found.lines()) + "\n")
    if args.markdown:
        write_page(found, args.markdown, args.images or args.markdown.parent / "images")
    for line in found.lines():
        print(line)


def _command(parser: argparse.ArgumentParser, said: list[str]) -> str:
    """The command line without what is this machine's own: places of files."""
    words = ["tools/bench_peers", *said]
    named = {option: a.metavar for a in parser._actions for option in a.option_strings if a.metavar}
    for i, word in enumerate(said, 1):
        option, equals, _ = word.partition("=")
        if option in named:
            words[i if equals else i + 1] = f"{option}={named[option]}" if equals else named[option]
    return " ".join(words)


def _some(
    parser: argparse.ArgumentParser, option: str, said: str, all_of: tuple[str, ...]
) -> list[str]:
    asked = [name.strip() for name in said.split(",") if name.strip()]
    unknown = set(asked) - set(all_of)
    if unknown or not asked:
        parser.error(f"{option}: no {', '.join(sorted(unknown)) or 'name'}: give some of {all_of}")
    return [name for name in all_of if name in asked]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scshards-peers"


if __name__ == "__main__":
    main()

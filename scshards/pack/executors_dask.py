"""Tasks of a pack on a dask cluster: `--dask tcp://host:8786`, or `--dask local` for one made here.

Needs the extra scshards[dask]. Called by pack.executors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scshards._version import __version__
from scshards.base.errors import ConfigError, StorageError
from scshards.pack.executors_base import LOCAL, Result, Task, all_cores

CONNECT_S = 30.0


class DaskExecutor:
    """Tasks on a dask cluster; a context manager.

    Parameters
    ----------
    address
        Of the scheduler, or "local" for a cluster of this process's own.
    workers
        Processes of a local cluster; None takes one for each core.

    Raises
    ------
    ConfigError
        When dask is not installed, or workers have another version of scshards.
    StorageError
        When the scheduler does not answer.
    """

    def __init__(self, address: str, workers: int | None) -> None:
        self._address, self._workers = address, workers
        self._stack = contextlib.ExitStack()
        self._client: Any = None

    def __enter__(self) -> DaskExecutor:
        try:
            import distributed
        except ImportError:
            raise ConfigError(
                "dask is not installed", where="--dask", advice="pip install 'scshards[dask]'"
            ) from None
        with contextlib.ExitStack() as stack:
            target: Any = self._address
            if target == LOCAL:
                target = stack.enter_context(
                    distributed.LocalCluster(
                        n_workers=self._workers or all_cores(),
                        threads_per_worker=1,
                        processes=True,
                        host="127.0.0.1",
                        dashboard_address=None,
                        silence_logs=40,
                    )
                )
            try:
                self._client = stack.enter_context(
                    distributed.Client(target, timeout=CONNECT_S, set_as_default=False)
                )
            except (OSError, TimeoutError, ValueError) as e:
                raise StorageError(
                    f"the dask scheduler does not answer: {type(e).__name__}",
                    where=self._address,
                    advice="check the address, such as tcp://host:8786, and that the scheduler runs",
                ) from None
            self._check_versions()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See executors.Executor; the scheduler gives the tasks of a worker that died to others."""
        import distributed

        futures = [self._client.submit(function, task, pure=False) for task in tasks]
        try:
            for future in distributed.as_completed(futures, loop=self._client.loop):
                yield future.result()
                future.release()
        except distributed.KilledWorker:
            raise ConfigError(
                "dask gave a task up: the workers that ran it died, one after another",
                where=self._address,
                advice="most often memory ran out: give the workers more, or make smaller shards",
            ) from None
        finally:
            self._client.cancel(futures)

    def _check_versions(self) -> None:
        try:
            # The scheduler reads tasks too, on their way to the workers.
            found = {"the scheduler": self._client.run_on_scheduler(_version)}
            found |= self._client.run(_version)
        except (ImportError, AttributeError, RuntimeError):
            found = {self._address: "none"}
        other = {w: v for w, v in found.items() if v != __version__}
        if other:
            where, version = next(iter(other.items()))
            raise ConfigError(
                f"the dask cluster has another version of scshards: {version}, not {__version__}",
                where=where,
                advice="install the same version for the scheduler and every worker",
            )


def _version() -> str:
    from scshards._version import __version__

    return __version__

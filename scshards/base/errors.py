"""Every error that scshards raises for a user, in one tree.

    ScshardsError
    |-- ConfigError        an option, a config file, an argument        (also a ValueError)
    |-- StorageError       a path or bucket that can't be read or written   (also an OSError)
    |   |-- OutputExistsError    an output that is there already
    |   `-- MissingDataError     a file that is not there, or ends early
    |-- VocabError         a vocabulary that is not one, or does not match  (also a ValueError)
    |-- SourceError        an input file that can't be used as it is        (also a ValueError)
    |   `-- ValueKindError       negative, NaN, infinite or non-integer values
    |-- FormatError        a shard set that is not what its manifest says   (also a ValueError)
    |   `-- ChecksumError        bytes that are not the bytes that were packed
    |-- StateError         a loader state that does not fit                 (also a ValueError)
    |-- CheckpointError    a checkpoint that can't be read or does not fit  (also a ValueError)
    `-- RankError          another process of the same run failed, and says why itself

Each says what went wrong, where (file, shard, cell, key) and what to do. The command line prints
them without a traceback and exits with 1; anything else that escapes is a bug in scshards.
"""

from __future__ import annotations


class ScshardsError(Exception):
    """What went wrong, where, and what to do about it.

    Parameters
    ----------
    what
        One sentence for a person.
    where
        The file, shard, cell, key or option it is about.
    advice
        What to do next.
    """

    def __init__(self, what: str, *, where: object = None, advice: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.advice = advice
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.advice is not None:
            lines.append(f"  to do: {self.advice}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries from pack's workers; keep all three parts.
        return (_rebuild, (type(self), self.what, self.where, self.advice))


class ConfigError(ScshardsError, ValueError):
    """An option, a config file or an argument that can't be used."""


class StorageError(ScshardsError, OSError):
    """A path or an object that can't be listed, read or written."""


class OutputExistsError(StorageError):
    """An output that exists already and is not overwritten."""


class MissingDataError(StorageError):
    """Bytes that should be there and are not: no such file, or one that ends early."""


class VocabError(ScshardsError, ValueError):
    """A vocabulary file that is not one, or a vocabulary that does not match."""


class SourceError(ScshardsError, ValueError):
    """An input (h5ad, ...) that can't be used as it is."""


class ValueKindError(SourceError):
    """Values of a matrix that are not what they are said to be."""


class FormatError(ScshardsError, ValueError):
    """A shard set, index or member that breaks format 1."""


class ChecksumError(FormatError):
    """Stored bytes that differ from those that were packed."""


class StateError(ScshardsError, ValueError):
    """A loader state that does not belong to this loader."""


class CheckpointError(ScshardsError, ValueError):
    """A checkpoint that can't be read or does not fit the model."""


class RankError(ScshardsError):
    """Another process of the same run failed; it says itself why."""


def _rebuild(
    cls: type[ScshardsError], what: str, where: str | None, advice: str | None
) -> ScshardsError:
    return cls(what, where=where, advice=advice)

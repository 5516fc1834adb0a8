"""JSON from outside: one reader for all records, with bounds, types, and the name of the field at fault.

    tree = read_json(data)                     whatever it holds; Damaged when it is no JSON
    record = Record(tree)                      its fields, taken out by name and kind:
    record.number("cells"), record.texts("categories"), record.record("index"), ...

Damaged says `splits.train.shards[3].cells: ...`; whoever knows the file makes an error of that. Own code
and not msgspec: that refuses the lone surrogates that stand for file names which are no UTF-8, and names
no key of a table in a path (`splits[...]`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LONGEST = 1 << 30
"""Bytes of a record at most; the manifest of a hundred million cells has 30 million."""

DEEPEST = 32
_MOST = (1 << 63) - 1
_MISSING = object()


class Damaged(ValueError):
    """What is wrong with a record, and which of its fields it is."""


def read_json(data: bytes | bytearray | memoryview | str) -> Any:
    """What a JSON text holds.

    Raises
    ------
    Damaged
        When it is no JSON, is nested without end, or has numbers of thousands of digits.
    """
    if isinstance(data, memoryview):
        data = bytes(data)
    if len(data) > LONGEST:
        raise Damaged(f"it has {len(data):,} bytes, more than any record")
    try:
        return json.loads(data)
    except json.JSONDecodeError as e:
        raise Damaged(f"not valid JSON: {e}") from None
    except UnicodeDecodeError as e:
        raise Damaged(f"not valid JSON: byte {e.start} is no text") from None
    except RecursionError:
        raise Damaged("not valid JSON: it is nested too deep") from None
    except ValueError:  # Python's own limit
        raise Damaged("not valid JSON: a number has thousands of digits") from None


class Record:
    """A table ({...}) of a JSON text; its fields are taken out by name, and checked.

    Parameters
    ----------
    tree
        What `read_json` gave, or a part of it.
    name, above, place
        What it is called in the record that it is a field of, and where in a list: for messages.
    """

    __slots__ = ("_above", "_name", "_place", "_tree")

    def __init__(
        self, tree: Any, name: str = "", above: Record | None = None, place: int | None = None
    ) -> None:
        self._tree, self._name, self._above, self._place = tree, name, above, place
        if type(tree) is not dict:
            raise Damaged(f"{self._path() or 'it'}: a table is needed, not {shown(tree)}")

    def __contains__(self, name: str) -> bool:
        return name in self._tree

    def wrong(self, name: str, what: str) -> Damaged:
        """The error for a field; for the record itself, where `name` is empty."""
        path = self._path()
        return Damaged(f"{path}{'.' if path and name else ''}{name}: {what}")

    def any(self, name: str) -> Any:
        """The value of a field that has to be there."""
        value = self._tree.get(name, _MISSING)
        if value is _MISSING:
            raise self.wrong(name, "it is missing")
        return value

    def number(self, name: str) -> int:
        """A whole number from 0 to 2^63 - 1."""
        value = self.any(name)
        if type(value) is not int or not 0 <= value <= _MOST:
            raise self.wrong(name, f"a whole number from 0 is needed, not {shown(value)}")
        return value

    def share(self, name: str) -> float:
        """A number from 0 to 1."""
        value = self.any(name)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise self.wrong(name, f"a number from 0 to 1 is needed, not {shown(value)}")
        return float(value)

    def text(self, name: str) -> str:
        """A text."""
        value = self.any(name)
        if type(value) is not str:
            raise self.wrong(name, f"a text is needed, not {shown(value)}")
        return value

    def one_of(self, name: str, allowed: Container[str]) -> str:
        """A text that is one of some."""
        value = self.text(name)
        if value not in allowed:
            raise self.wrong(name, f"{shown(value)} is none that it can be")
        return value

    def numbers(self, name: str) -> NDArray[np.int64]:
        """A list of whole numbers from 0, int64; a set of 100 million cells has 1.5 million of them."""
        import numpy as np  # the command line reads options before it needs it

        values = self.any(name)
        # Whole lists at once: a million calls would take a second.
        if type(values) is not list or set(map(type, values)) - {int}:
            raise self.wrong(name, f"a list of whole numbers is needed, not {shown(values)}")
        try:
            array = np.array(values, np.int64)
        except OverflowError:
            array = np.array([-1])
        if len(array) and array.min() < 0:
            bad = next(i for i, v in enumerate(values) if not 0 <= v <= _MOST)
            what = f"a whole number from 0 is needed, not {shown(values[bad])}"
            raise self.wrong(f"{name}[{bad}]", what)
        return array

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        for i, value in enumerate(values := self._list(name)):
            if type(value) is not str:
                raise self.wrong(f"{name}[{i}]", f"a text is needed, not {shown(value)}")
        return tuple(values)

    def record(self, name: str) -> Record:
        """A table."""
        return Record(self.any(name), name, self)

    def records(self, name: str) -> Iterator[Record]:
        """A list of tables."""
        for i, value in enumerate(self._list(name)):
            yield Record(value, name, self, i)

    def tables(self, name: str) -> Iterator[tuple[str, Record]]:
        """A table of tables, with their names."""
        above = self.record(name)
        for key, value in above._tree.items():
            yield key, Record(value, key, above)

    def counts(self, name: str) -> dict[str, int]:
        """A table of whole numbers from 0."""
        inner = self.record(name)
        return {key: inner.number(key) for key in inner._tree}

    def plain(self, name: str) -> dict[str, Any]:
        """A table of anything, not nested deep, whose numbers are finite and fit in 64 bits."""
        inner = self.record(name)
        for key, value in inner._tree.items():
            inner._check_plain(key, value, 1)
        return dict(inner._tree)

    def _check_plain(self, path: str, value: Any, depth: int) -> None:
        if depth > DEEPEST:
            raise self.wrong(path[:80], "it is nested too deep")
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                below = f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]"
                self._check_plain(below, inner, depth + 1)
        elif isinstance(value, int | float) and not abs(value) <= _MOST:
            raise self.wrong(path, f"{shown(value)} is no number that it can be")

    def _list(self, name: str) -> list[Any]:
        values = self.any(name)
        if type(values) is not list:
            raise self.wrong(name, f"a list is needed, not {shown(values)}")
        return values

    def _path(self) -> str:
        name = self._name if self._place is None else f"{self._name}[{self._place}]"
        above = self._above._path() if self._above is not None else ""
        return f"{above}.{name}" if above else name


def shown(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, dict | list):
        return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > _MOST:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    return json.dumps(value) if not isinstance(value, str) else f"{value!r:.60}"

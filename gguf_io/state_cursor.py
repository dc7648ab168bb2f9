"""A position in a file's bytes, checked reads from there on, and what is wrong where they fail."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from gguf_io.types import PLAIN_TYPES
from tbq.format import Format
from tbq.registry import meanings, undisputed

# Up to here every code base has upstream's ids, and numbers without a type are retired ones.
LAST_COMMON_ID = 40


class Mismatch(Exception):
    """The bytes cannot be what a reading takes them for.

    `progress` counts the memories and the lists of cells that made sense before.
    """

    def __init__(self, at: int, reason: str, progress: int = 0) -> None:
        self.at = at
        self.reason = reason
        self.progress = progress
        super().__init__(reason)

    @property
    def rank(self) -> tuple[int, int]:
        """Higher for the failure of a likelier reading."""
        return self.progress, self.at if self.progress else 0


@dataclass
class Shared:
    """What the readings of one file have in common, so that each is found out once.

    `found` has what was read at a place as something, or what was wrong, and where that ended;
    `ends` where a memory was complete, though bytes followed.
    """

    found: dict[tuple[Any, ...], tuple[object, int, int]] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    _types: dict[int, tuple[Format | None, bool]] = field(default_factory=dict)

    def type(self, type_id: int) -> tuple[Format | None, bool]:
        """Return what an id means if that is undisputed, and whether a cache row can have it."""
        if type_id not in self._types:
            known = undisputed(type_id)
            retired = known is None and type_id <= LAST_COMMON_ID and not meanings(type_id)
            unfit = known is not None and known.name in PLAIN_TYPES
            self._types[type_id] = known, not (retired or unfit)
        return self._types[type_id]


class Cursor:
    """A position in a buffer and bounds-checked reads from there on."""

    def __init__(self, buffer: Any, at: int = 0, shared: Shared | None = None) -> None:
        self.buffer = memoryview(buffer)
        self.end = len(self.buffer)
        self.at = at
        self.progress = 0
        self.shared = shared or Shared()

    @property
    def left(self) -> int:
        """Bytes from here to the end."""
        return self.end - self.at

    def moved(self, at: int) -> Cursor:
        """Return another cursor on the same bytes, which has seen nothing yet."""
        return Cursor(self.buffer, at, self.shared)

    def fail(self, at: int, reason: str) -> NoReturn:
        """Raise a Mismatch."""
        raise Mismatch(at, reason, self.progress)

    def once(self, key: tuple[Any, ...], read: Callable[[Cursor], Any]) -> Any:
        """Return what `read(self)` returns or raises, which is done once per place and key.

        What counts as progress is added to what this cursor has seen.
        """
        found = self.shared.found
        key = (self.at, *key)
        if key not in found:
            own = self.moved(self.at)
            try:
                value: object = read(own)
            except Mismatch as failure:
                value = failure.with_traceback(None)  # whose frames hold everything that was read
            found[key] = value, own.at, own.progress
        value, self.at, progress = found[key]
        if isinstance(value, Mismatch):
            raise Mismatch(value.at, value.reason, self.progress + value.progress)
        self.progress += progress
        return value

    def skip(self, n: int, what: str) -> int:
        """Move past n bytes and return where they start."""
        start = self.at
        if n > self.end - start:
            self.fail(start, f"{what} needs {n} bytes, the file has {self.end - start} left")
        self.at = start + n
        return start

    def number(self, code: str, what: str, least: int, most: int) -> int:
        """Read one number of a struct code and check its range."""
        start = self.skip(struct.calcsize("<" + code), what)
        (value,) = struct.unpack_from("<" + code, self.buffer, start)
        if not least <= value <= most:
            self.fail(start, f"{what} is {value}, not from {least} to {most}")
        return value

    def peek(self, code: str) -> int | None:
        """Return the number that comes next, without moving; None at the end."""
        if struct.calcsize("<" + code) > self.left:
            return None
        return struct.unpack_from("<" + code, self.buffer, self.at)[0]

    def array(self, count: int, what: str) -> np.ndarray:
        """View `count` int32 values."""
        start = self.skip(4 * count, what)
        return np.frombuffer(self.buffer, "<i4", count, start)

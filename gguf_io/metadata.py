"""GGUF metadata: fields that keep their exact bytes, and values decoded when asked for."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType

from tbq import InputError

# The scalar value types and their NumPy dtypes; BOOL is one byte.
SCALARS: dict[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
_BY_DTYPE = {dtype: kind for kind, dtype in SCALARS.items()}


class StringArray(Sequence[Any]):
    """The strings of an array field, decoded one by one when indexed.

    Bytes that are not UTF-8 come back as lone surrogates (surrogateescape), so no byte is lost.
    """

    def __init__(self, buffer: memoryview, starts: array[Any]) -> None:
        self._buffer = buffer
        self._starts = starts  # where each string's 64-bit length stands

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        (length,) = struct.unpack_from("<Q", self._buffer, start)
        return _text(self._buffer[start + 8 : start + 8 + length])

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)}>"


def _text(data: Any) -> str:
    return bytes(data).decode("utf-8", errors="surrogateescape")


@dataclass(frozen=True)
class Field:
    """One metadata value.

    Attributes:
        type: its GGUF type.
        item_type: the type of an array's items, None for scalars.
        raw: its bytes as they stand in the file, from the type word on.
        starts: for arrays of strings, where in `raw` each string begins.
    """

    type: GGUFValueType
    item_type: GGUFValueType | None
    raw: memoryview
    starts: array[Any] | None = None

    @property
    def value(self) -> Any:
        """The value: int, float, bool or str; a NumPy array; or a StringArray."""
        if self.type is GGUFValueType.STRING:
            return _text(self.raw[12:])
        if self.type is not GGUFValueType.ARRAY:
            return _numbers(self.raw[4:], self.type)[0].item()
        if self.item_type is GGUFValueType.STRING:
            return StringArray(self.raw, self.starts or array("Q"))
        assert self.item_type is not None, "an array has items of a type"
        return _numbers(self.raw[16:], self.item_type)

    @classmethod
    def of(cls, value: Any, type: GGUFValueType | None = None) -> Field:
        """Make a field from a Python or NumPy value.

        Without `type`, a NumPy scalar or array keeps its dtype and Python values become what
        gguf-py makes of them: STRING, BOOL, FLOAT32, and the first of INT32, INT64, UINT64 that
        holds the integer. `type` is the type of a scalar, or of an array's items.

        Raises:
            InputError: GGUF has no type for the value, or it does not fit.
        """
        if isinstance(value, (str, bytes)):
            raw = struct.pack("<I", GGUFValueType.STRING) + pack_string(value)
            return cls(GGUFValueType.STRING, None, memoryview(raw))
        is_array = isinstance(value, (Sequence, np.ndarray))
        if is_array and len(value) and all(isinstance(v, (str, bytes)) for v in value):
            type = GGUFValueType.STRING
        if is_array and type is GGUFValueType.STRING:
            return cls._of_strings(value)
        items = np.atleast_1d(_typed(value, type))
        kind = _BY_DTYPE[items.dtype]
        head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(items))
        if not is_array:
            return cls(kind, None, memoryview(struct.pack("<I", kind) + items.tobytes()))
        return cls(GGUFValueType.ARRAY, kind, memoryview(head + items.tobytes()))

    @classmethod
    def _of_strings(cls, values: Sequence[Any]) -> Field:
        raw = bytearray(struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(values)))
        starts = array("Q")
        for value in values:
            starts.append(len(raw))
            raw += pack_string(value)
        return cls(GGUFValueType.ARRAY, GGUFValueType.STRING, memoryview(bytes(raw)), starts)


def brief(value: Any) -> str:
    """Return a metadata value for a message: one line, not long, whatever it is."""
    if isinstance(value, (str, bytes)):
        return repr(value[:64]) + ("..." if len(value) > 64 else "")
    if isinstance(value, (np.ndarray, StringArray, list, tuple)):
        shown = ", ".join(brief(item) for item in value[:4])
        return f"[{shown}{', ...' if len(value) > 4 else ''}]"
    return repr(value.item() if isinstance(value, np.generic) else value)[:80]


def _numbers(data: memoryview, kind: GGUFValueType) -> np.ndarray:
    if kind is GGUFValueType.BOOL:
        return np.frombuffer(data, np.uint8) != 0
    return np.frombuffer(data, SCALARS[kind])


def pack_string(value: str | bytes) -> bytes:
    """Return a GGUF string: its length and its bytes."""
    data = value if isinstance(value, bytes) else value.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any, kind: GGUFValueType | None) -> np.ndarray:
    """Return value as an array of a dtype that GGUF has; integers are never wrapped or rounded."""
    items = value if isinstance(value, (Sequence, np.ndarray)) else [value]
    for dtype in _dtypes(value, items) if kind is None else [SCALARS[kind]]:
        if dtype in _BY_DTYPE and np.ndim(value) <= 1 and _fits(items, dtype):
            return np.array(value, dtype)
    need = "a str, bool, int or float, or a flat sequence of one of them; empty ones typed"
    if kind is not None:
        need = f"{kind.name}, or a flat sequence of that"
    raise InputError("metadata value", f"{type(value).__name__} {value!r:.60}", need)


def _dtypes(value: Any, items: Sequence[Any] | np.ndarray) -> list[np.dtype]:
    """Return the dtypes to try for a value: NumPy's own, or what gguf-py makes of Python's."""
    if isinstance(value, (np.generic, np.ndarray)):
        return [value.dtype.newbyteorder("<")]
    choices = {bool: ["?"], int: ["<i4", "<i8", "<u8"], float: ["<f4"]}
    types = {type(item) for item in items}
    return [np.dtype(name) for name in choices.get(types.pop(), [])] if len(types) == 1 else []


def _fits(items: Sequence[Any] | np.ndarray, dtype: np.dtype) -> bool:
    if not len(items) or getattr(items, "dtype", None) == dtype:
        return True
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        integers = all(isinstance(item, (int, np.integer)) for item in items)
        return integers and info.min <= min(items) and max(items) <= info.max
    allowed = (bool, np.bool_) if dtype.kind == "b" else (int, float, np.integer, np.floating)
    return all(isinstance(item, allowed) for item in items)


class Metadata(Mapping[str, Any]):
    """The metadata of a file: a mapping from key to decoded value, over `fields`.

    A file may hold anything under any key. What needs a certain type takes it from `text` or
    `number`.
    """

    def __init__(self, fields: dict[str, Field]) -> None:
        self.fields = fields

    def __getitem__(self, key: str) -> Any:
        return self.fields[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def text(self, key: str) -> str | None:
        """Return the value of a key that should hold text; None if it is missing or no text."""
        value = self.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> int | None:
        """Return the value of a key that should hold a count; None if it is missing or none."""
        value = self.get(key)
        counts = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return value if counts else None

    def __repr__(self) -> str:
        return f"<Metadata of {len(self)} keys>"

"""One GGUF file (or shard) to fields and tensor records, bounds-checked.

Nothing in the file is trusted. Every length is compared with the bytes that are left before
anything is read or allocated, and the limits are those of llama.cpp's own loader (ggml/src/gguf.cpp
at f112d6de7) and of its later versions, which read tensors without elements and scalars too. Names
may be as long as the largest GGML_MAX_NAME in use; those that stock builds do not read give a
warning.
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from gguf_io.mapped import MappedFile, map_file
from gguf_io.metadata import SCALARS, Field
from tbq import FileFormatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_STRING = 1 << 30
MAX_ARRAY = 1 << 30
MAX_NAME = 63  # GGML_MAX_NAME is 64
MAX_READ_NAME = 127  # and 128 where programs set it, as stable-diffusion.cpp does
MAX_DIMS = 4
MIN_FIELD = 8 + 4 + 1  # an empty key, a type and one byte
MIN_TENSOR = 8 + 4 + 4 + 8  # an empty name and no dimensions

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorRecord:
    """What the header says of a tensor. Offsets count from the start of the data section."""

    name: str
    ne: tuple[int, ...]  # ggml order, fastest axis first
    type_id: int
    offset: int
    where: int  # where the record stands in the file

    @property
    def row_values(self) -> int:
        """Values per row; a scalar is a row of one."""
        return self.ne[0] if self.ne else 1

    @property
    def rows(self) -> int:
        """How many rows there are; none if there are no values."""
        return math.prod(self.ne[1:]) if self.row_values else 0


@dataclass
class ParsedFile:
    """A mapped file and its parsed header."""

    path: Path
    map: MappedFile
    version: int = 0
    fields: dict[str, Field] = field(default_factory=dict)
    records: list[TensorRecord] = field(default_factory=list)
    alignment: int = GGUF_DEFAULT_ALIGNMENT
    data_start: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self.map)


def parse(path: str | os.PathLike[str]) -> ParsedFile:
    """Map and parse a GGUF file.

    Raises:
        FileFormatError: it is not a GGUF file of version 2 or 3, or the header is truncated,
            inconsistent or hostile.
        OSError: it cannot be opened.
    """
    return _Parser(ParsedFile(Path(path), map_file(path))).parse()


class _Parser:
    def __init__(self, file: ParsedFile) -> None:
        self.file = file
        self.buffer = memoryview(file.map)
        self.end = len(self.buffer)
        self.at = 0

    def parse(self) -> ParsedFile:
        file = self.file
        file.version = self._version()
        n_tensors = self._count("tensor count", MIN_TENSOR)
        n_fields = self._count("metadata count", MIN_FIELD)
        for _ in range(n_fields):
            where = self.at
            key = self._name("metadata key", MAX_STRING)
            if key in file.fields:
                self._fail(where, f"metadata key {key!r} appears twice")
            file.fields[key] = self._field(key)
        file.alignment = self._alignment()
        names = set()
        for _ in range(n_tensors):
            record = self._tensor()
            if record.name in names:
                self._fail(record.where, f"tensor {record.name!r} appears twice")
            names.add(record.name)
            file.records.append(record)
        file.data_start = -(-self.at // file.alignment) * file.alignment
        return file

    def _fail(self, where: int, reason: str) -> NoReturn:
        raise FileFormatError(self.file.path, where, reason)

    def _skip(self, n: int, what: str) -> int:
        """Move past n bytes and return where they start."""
        start = self.at
        if n > self.end - start:
            self._fail(start, f"{what} needs {n} bytes, the file has {self.end - start} left")
        self.at = start + n
        return start

    def _u32(self, what: str) -> int:
        return _U32.unpack_from(self.buffer, self._skip(4, what))[0]

    def _u64(self, what: str) -> int:
        return _U64.unpack_from(self.buffer, self._skip(8, what))[0]

    def _version(self) -> int:
        magic = bytes(self.buffer[self._skip(4, "magic") : self.at])
        if magic != MAGIC:
            from gguf_io.state_container import MAGICS  # which knows this module

            if int.from_bytes(magic, "little") in MAGICS:
                self._fail(0, "a state file, not a GGUF file; use open_state")
            self._fail(0, f"magic is {magic!r}, a GGUF file starts with {MAGIC!r}")
        version = self._u32("version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            note = ": a big-endian file, only little-endian ones are supported"
            note = note if swapped in VERSIONS else f", versions {VERSIONS} are supported"
            self._fail(4, f"GGUF version {version}{note}")
        return version

    def _count(self, what: str, least: int) -> int:
        where = self.at
        n = self._u64(what)
        if n > (self.end - self.at) // least:
            self._fail(where, f"{what} {n} cannot fit the {self.end - self.at} bytes left")
        return n

    def _string(self, what: str, limit: int = MAX_STRING) -> memoryview:
        where = self.at
        n = self._u64(f"length of {what}")
        if n > limit:
            self._fail(where, f"{what} is {n} bytes long, at most {limit} are allowed")
        start = self._skip(n, what)
        return self.buffer[start : start + n]

    def _name(self, what: str, limit: int) -> str:
        where = self.at
        data = bytes(self._string(what, limit))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(where, f"{what} {data[:64]!r} is not UTF-8")

    def _value_type(self, what: str) -> GGUFValueType:
        where = self.at
        number = self._u32(what)
        try:
            return GGUFValueType(number)
        except ValueError:
            self._fail(where, f"{what} is {number}, which no GGUF value type has")

    def _field(self, key: str) -> Field:
        start = self.at
        kind = self._value_type(f"type of {key!r}")
        item_type = starts = None
        if kind is GGUFValueType.STRING:
            self._string(f"value of {key!r}")
        elif kind is GGUFValueType.ARRAY:
            item_type, starts = self._array(key, start)
        else:
            self._skip(SCALARS[kind].itemsize, f"value of {key!r}")
        return Field(kind, item_type, self.buffer[start : self.at], starts)

    def _array(self, key: str, start: int) -> tuple[GGUFValueType, array[Any] | None]:
        where = self.at
        item_type = self._value_type(f"item type of {key!r}")
        n = self._u64(f"length of {key!r}")
        if item_type is GGUFValueType.ARRAY:
            self._fail(where, f"{key!r} is an array of arrays, which llama.cpp does not read")
        if n > MAX_ARRAY:
            self._fail(where, f"{key!r} has {n} items, at most {MAX_ARRAY} are allowed")
        if item_type is not GGUFValueType.STRING:
            self._skip(n * SCALARS[item_type].itemsize, f"array {key!r}")
            return item_type, None
        if n > (self.end - self.at) // 8:
            self._fail(where, f"{key!r} has {n} strings, more than fit {self.end - self.at} bytes")
        return item_type, self._string_starts(key, start, n)

    def _string_starts(self, key: str, start: int, n: int) -> array[Any]:
        """Walk n strings; return where each begins, counted from `start`."""
        starts = array("Q", bytes(8 * n))
        at, end, buffer, unpack = self.at, self.end, self.buffer, _U64.unpack_from
        for i in range(n):
            if end - at < 8:
                self._fail(at, f"string {i} of {key!r} is cut off")
            (length,) = unpack(buffer, at)
            if length > end - at - 8 or length > MAX_STRING:
                self._fail(at, f"string {i} of {key!r} claims {length} bytes")
            starts[i] = at - start
            at += 8 + length
        self.at = at
        return starts

    def _alignment(self) -> int:
        given = self.file.fields.get("general.alignment")
        if given is None:
            return GGUF_DEFAULT_ALIGNMENT
        if given.type is not GGUFValueType.UINT32:
            self._fail(self.at, f"general.alignment is a {given.type.name}, not a UINT32")
        value = given.value
        if value < 8 or value & (value - 1):
            need = "a power of two and a multiple of 8"
            self._fail(self.at, f"general.alignment is {value}, GGUF wants {need}")
        return value

    def _tensor(self) -> TensorRecord:
        where = self.at
        name = self._name("tensor name", MAX_READ_NAME)
        if (n_bytes := len(name.encode())) > MAX_NAME:
            text = (
                f"tensor {name!r} has a name of {n_bytes} bytes; stock llama.cpp reads {MAX_NAME}"
            )
            self.file.warnings.append(text)
        if "\0" in name or ".." in name.split("/"):
            self._fail(where, f"tensor name {name!r} holds a NUL or a parent-directory step")
        n_dims = self._u32(f"dimension count of {name!r}")
        if n_dims > MAX_DIMS:
            self._fail(where, f"tensor {name!r} has {n_dims} dimensions, ggml has up to {MAX_DIMS}")
        ne = tuple(self._u64(f"dimension of {name!r}") for _ in range(n_dims))
        elements = 1
        for n in ne:
            elements *= n or 1
            if elements >= 1 << 63:
                self._fail(where, f"tensor {name!r} has shape {list(ne)}: beyond 2^63")
        type_id = self._u32(f"type of {name!r}")
        offset = self._u64(f"offset of {name!r}")
        if offset % self.file.alignment:
            need = f"a multiple of the alignment {self.file.alignment}"
            self._fail(where, f"tensor {name!r} is at offset {offset}, not {need}")
        return TensorRecord(name, ne, type_id, offset, where)

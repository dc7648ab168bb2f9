"""Reading GGUF files: lazy, memory-mapped, bounds-checked, and at ease with foreign types."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gguf_io.identify import (
    DIALECT_KEY,
    RELEASE_KEY,
    DialectChoice,
    gguf_rows,
    identify,
    undecodable,
)
from gguf_io.mapped import Mark
from gguf_io.metadata import Metadata, brief
from gguf_io.parser import ParsedFile, TensorRecord, parse
from gguf_io.tensors import Tensors, as_array
from gguf_io.types import TensorType, Unknown, dequantize_rows, row_bytes
from tbq import ClosedFileError, FileFormatError, InputError

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
# CRC-32 of all shards of a set that was written here, with 0 in its place: the same in each.
SET_KEY = "tbq.split.crc32"
PIECE_BYTES = 1 << 24
_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


def split_path(prefix: str | os.PathLike[str], no: int, count: int) -> Path:
    """Return the path of shard `no` (from 0) of `count`, as llama.cpp names it."""
    return Path(f"{prefix}-{no + 1:05d}-of-{count:05d}.gguf")


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a file. Nothing is read before `raw` or `dequantize` touches it.

    Attributes:
        name: its name.
        ggml_shape: ggml's `ne`, fastest axis first.
        format: its type: a tbq.Format, or Unknown.
        type_id: the number the file has for it.
        n_bytes: bytes of data; for Unknown all there is up to the next tensor.
        data_offset: where they start in the file.
        shard: index of the shard it lies in.
    """

    name: str
    ggml_shape: tuple[int, ...]
    format: TensorType
    type_id: int
    n_bytes: int
    data_offset: int
    shard: int
    _file: ParsedFile = field(repr=False)
    _choice: DialectChoice = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in NumPy's order, slowest axis first."""
        return self.ggml_shape[::-1]

    @property
    def n_values(self) -> int:
        """The number of values; 1 for a scalar."""
        return math.prod(self.ggml_shape)

    @property
    def row_values(self) -> int:
        """Values per row; a scalar is a row of one."""
        return self.ggml_shape[0] if self.ggml_shape else 1

    @property
    def n_rows(self) -> int:
        """The number of rows, all leading axes together; none if there are no values."""
        return self.n_values // self.row_values if self.row_values else 0

    @property
    def raw(self) -> np.ndarray:
        """The stored bytes as a read-only view: (..., row_bytes), or flat for Unknown types.

        It views a map of the file, and dies with the process if that is truncated; `rows` and
        `pieces` do not.
        """
        if isinstance(self.format, Unknown):
            return self._bytes()
        if not self.n_rows:
            return self._nothing((*self.shape[:-1], 0), np.uint8)
        return self._bytes().reshape(*self.shape[:-1], self.n_bytes // self.n_rows)

    def _nothing(self, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """Return an array without elements; InputError if NumPy has none of such a shape."""
        try:
            return np.empty(shape, dtype)
        except ValueError:
            need = "axes that an array can have"
            raise InputError(f"tensor {self.name!r}", f"shape {shape}", need) from None

    def _bytes(self) -> np.ndarray:
        if not self.n_bytes:  # where they would be can lie beyond the end of the file
            return np.empty(0, np.uint8)
        self._file.map.require_open()
        return np.frombuffer(self._file.map, np.uint8, self.n_bytes, self.data_offset)

    def read(self, start: int, n_bytes: int) -> np.ndarray:
        """Return stored bytes [start, start + n_bytes), uint8."""
        return self._file.map.read_at(self.data_offset + start, n_bytes)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the stored bytes of rows [start, stop), uint8 (rows, row_bytes).

        Raises:
            InputError: the type is unknown, so that its bytes do not fall into rows.
        """
        if isinstance(self.format, Unknown):
            raise undecodable(self.format, self.name, self._choice)
        if not self.n_rows:
            return np.empty((0, 0), np.uint8)
        start, stop, _ = slice(start, stop).indices(self.n_rows)
        width = self.n_bytes // self.n_rows
        return self.read(start * width, (stop - start) * width).reshape(stop - start, width)

    def mark(self) -> Mark:
        """Return what its file is known by."""
        return self._file.map.mark()

    def release(self, start: int, stop: int) -> None:
        """Do nothing: rows are copies, no pages of theirs stay mapped. For callers that were."""

    def rows_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the stored bytes of some rows, int (n,), as uint8 (n, row_bytes)."""
        return self._file.map.read_rows(self.data_offset, self.n_bytes // self.n_rows, rows)

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield all stored bytes, uint8 (n,), a piece at a time."""
        for start in range(0, self.n_bytes, PIECE_BYTES):
            yield self.read(start, min(PIECE_BYTES, self.n_bytes - start))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the values, so that `np.asarray` does; what is decoded is new each time."""
        return as_array(self.dequantize(), dtype, copy)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"<GgufTensor {self.name}: {self.format.label}, {shape}>"

    def require_decodable(self) -> None:
        """Raise the error that `dequantize` would, having decoded no more than one group."""
        if isinstance(self.format, Unknown):
            raise undecodable(self.format, self.name, self._choice)
        if self.n_values:
            width = self.format.row_bytes(self.format.group_values)
            dequantize_rows(self.read(0, width)[None], self.format)

    def dequantize_rows(self, start: int, stop: int, *, threads: int | None = None) -> np.ndarray:
        """Dequantise rows [start, stop) to float32 (rows, n); see `dequantize`."""
        if isinstance(self.format, Unknown):
            raise undecodable(self.format, self.name, self._choice)
        if not self.n_values:
            return self._nothing((0, self.row_values))
        return dequantize_rows(self.rows(start, stop), self.format, threads=threads)

    def dequantize(self, *, threads: int | None = None) -> np.ndarray:
        """Dequantise to float32 of `shape`.

        Raises:
            AmbiguousTypeError: several dialects fit the type id; open the file with `dialect=`.
            InputError: nothing is known of the type.
            BackendError: gguf-py cannot decode it.
        """
        if not self.n_values:
            self.require_decodable()
            return self._nothing(self.shape)
        return self.dequantize_rows(0, self.n_rows, threads=threads).reshape(self.shape)


class GgufFile:
    """An open GGUF file, all its shards as one. Use as a context manager, or let it be collected.

    Attributes:
        path: the path that was opened.
        shard_paths: the files it consists of.
        version: GGUF version of the first shard.
        alignment: data alignment of the first shard.
        metadata: mapping from key to value; `metadata.fields` keeps the exact bytes.
        tensors: mapping from name to GgufTensor, in file order.
        dialect, release, dialect_reason, dialect_guessed: how type ids were read, and why.
        warnings: what is unusual about it, one sentence each.
    """

    def __init__(self, files: list[ParsedFile], choice: DialectChoice) -> None:
        self._files = files
        self.path = files[0].path
        self.shard_paths = tuple(file.path for file in files)
        self.version = files[0].version
        self.alignment = files[0].alignment
        self.metadata = Metadata(files[0].fields)
        self.dialect = choice.dialect
        self.release = choice.release
        self.dialect_reason = choice.reason
        self.dialect_guessed = choice.guessed
        self.warnings = tuple(text for file in files for text in file.warnings)
        self.tensors: Tensors[GgufTensor] = Tensors()
        for shard, file in enumerate(files):
            for tensor in _tensors(file, shard, choice):
                if tensor.name in self.tensors:
                    reason = f"tensor {tensor.name!r} is in an earlier shard too"
                    raise FileFormatError(file.path, None, reason)
                self.tensors[tensor.name] = tensor

    @property
    def architecture(self) -> str | None:
        """The model's architecture, such as "llama"; None if the file has no text for it."""
        return self.metadata.text("general.architecture")

    def check_unchanged(self) -> None:
        """Raise FileFormatError if a file is not what it was when it was opened."""
        for file in self._files:
            file.map.check_unchanged()

    def close(self) -> None:
        """Unmap the files, unless arrays that view them are still alive."""
        if self.closed:
            return
        del self.tensors, self.metadata
        for file in self._files:
            file.fields = {}
            try:
                file.map.close()
            except BufferError:
                pass  # a view is alive; the map goes with it
        self._files = []

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the file was closed."""
        return not self._files

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Explain why a closed file lacks what an open one has."""
            if name in ("tensors", "metadata"):
                raise ClosedFileError(self.path)
            raise AttributeError(name)

    def __repr__(self) -> str:
        what = "closed" if self.closed else f"{len(self.tensors)} tensors"
        return f"<GgufFile {self.path}: {what}>"


def open_gguf(
    path: str | os.PathLike[str], dialect: str | None = None, *, follow_splits: bool = True
) -> GgufFile:
    """Open a GGUF file, or all shards of a split one by its first.

    Args:
        path: the file.
        dialect: whose type ids are meant, `dialect` or `dialect@release`; if omitted, what the
            file's own `tbq.dialect` says, else the one registered dialect that fits, see
            `gguf_io.identify`. Tensors of ids that stay unexplained get the type Unknown and keep
            their raw bytes.
        follow_splits: whether to open the other shards of a split model too.

    Raises:
        FileFormatError: not a GGUF file of version 2 or 3; truncated, inconsistent or hostile; a
            shard is missing or belongs to another model; `dialect` does not fit.
        UnknownFormatError: `dialect` is not registered.
        OSError: the file cannot be opened.
    """
    first = parse(path)
    files = [first, *_other_shards(first)] if follow_splits else [first]
    stored = [rows for f in files for rows in gguf_rows(f, zip(f.records, extents(f), strict=True))]
    return GgufFile(files, identify(stored, first.path, dialect, _stated(first)))


def _stated(first: ParsedFile) -> tuple[object, object] | None:
    """Return the dialect and release that a file says its ids are of; None if it says nothing."""
    if DIALECT_KEY not in first.fields:
        return None
    release = first.fields.get(RELEASE_KEY)
    return first.fields[DIALECT_KEY].value, None if release is None else release.value


def extents(file: ParsedFile) -> list[int]:
    """Return where the space of each tensor ends: at the next tensor, or at the end of the file."""
    data_bytes = max(0, file.size - file.data_start)
    following = [record.offset for record in file.records[1:]]
    return [min(stop, data_bytes) for stop in [*following, data_bytes]][: len(file.records)]


def _split_number(file: ParsedFile, key: str, default: int) -> int:
    if key not in file.fields:
        return default
    value = Metadata(file.fields).number(key)
    if value is None:
        got = brief(file.fields[key].value)
        raise FileFormatError(file.path, None, f"{key} is {got}, not an integer from 0 up")
    return value


def _other_shards(first: ParsedFile) -> Iterator[ParsedFile]:
    count = _split_number(first, "split.count", 1)
    if count <= 1:
        return
    name = _SPLIT_NAME.fullmatch(first.path.name)
    if name is None or int(name["count"]) != count:
        reason = f"one of {count} shards, but not named like one: NAME-00001-of-{count:05d}.gguf"
        raise FileFormatError(first.path, None, reason)
    prefix = first.path.with_name(name["prefix"])
    if _split_number(first, "split.no", 0) != 0 or int(name["no"]) != 1:
        reason = f"not the first shard, open {split_path(prefix, 0, count)}"
        raise FileFormatError(first.path, None, reason)
    n_tensors = len(first.records)
    for no in range(1, count):
        path = split_path(prefix, no, count)
        if not path.exists():
            raise FileFormatError(path, None, f"shard {no + 1} of {count} is missing")
        shard = parse(path)
        found = _split_number(shard, "split.no", -1), _split_number(shard, "split.count", -1)
        if found != (no, count):
            reason = f"split.no and split.count are {found}, shard {(no, count)} was expected"
            raise FileFormatError(path, None, reason)
        mine, theirs = (_split_number(f, SET_KEY, -1) for f in (shard, first))
        if mine != theirs:
            reason = f"shard {no + 1} is not of the set that {first.path.name} is of: {SET_KEY}"
            raise FileFormatError(path, None, f"{reason} is {mine}, not {theirs}")
        n_tensors += len(shard.records)
        yield shard
    expected = _split_number(first, "split.tensors.count", n_tensors)
    if n_tensors != expected:
        reason = f"split.tensors.count is {expected}, the shards hold {n_tensors} tensors"
        raise FileFormatError(first.path, None, reason)


def _tensors(file: ParsedFile, shard: int, choice: DialectChoice) -> Iterator[GgufTensor]:
    """Check that the tensors lie one after the other, as llama.cpp demands, and yield them."""
    expected = 0
    for record, stop in zip(file.records, extents(file), strict=True):
        kind = choice.type_of(record.type_id)
        if record.offset != expected:
            reason = f"tensor {record.name!r} is at offset {record.offset}, not at {expected}"
            raise FileFormatError(file.path, record.where, reason)
        n_bytes = _n_bytes(file, record, kind, stop)
        yield GgufTensor(
            record.name,
            record.ne,
            kind,
            record.type_id,
            n_bytes,
            file.data_start + record.offset,
            shard,
            file,
            choice,
        )
        expected = record.offset + -(-n_bytes // file.alignment) * file.alignment


def _n_bytes(file: ParsedFile, record: TensorRecord, kind: TensorType, stop: int) -> int:
    left = max(0, file.size - file.data_start - record.offset)
    if isinstance(kind, Unknown):
        n_bytes = stop - record.offset if record.rows else 0
    else:
        try:
            n_bytes = row_bytes(kind, record.row_values) * record.rows if record.row_values else 0
        except InputError as error:
            reason = f"tensor {record.name!r}: {error}"
            raise FileFormatError(file.path, record.where, reason) from None
    if n_bytes > left or (n_bytes <= 0 and record.rows):
        reason = f"tensor {record.name!r} takes {n_bytes} bytes, the file has {left} left"
        raise FileFormatError(file.path, record.where, reason)
    return n_bytes

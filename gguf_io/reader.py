"""Reading GGUF files: lazy, memory-mapped, bounds-checked, and at ease with foreign types."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_io.dialects import (
    DialectChoice,
    choose_dialect,
    extents,
    tensor_type,
    undecodable,
)
from gguf_io.metadata import Metadata
from gguf_io.parser import ParsedFile, TensorRecord, parse
from gguf_io.types import TensorType, Unknown, dequantize_rows, row_bytes
from tbq import FileFormatError, InputError

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


def split_path(prefix: str | os.PathLike, no: int, count: int) -> Path:
    """Return the path of shard `no` (from 0) of `count`, as llama.cpp names it."""
    return Path(f"{prefix}-{no + 1:05d}-of-{count:05d}.gguf")


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a file. Nothing is read before `raw` or `dequantize` touches it.

    Attributes:
        name: its name.
        ggml_shape: ggml's `ne`, fastest axis first.
        format: its type: a tbq.Format, a GgmlType, or Unknown.
        n_bytes: bytes of data; for Unknown all there is up to the next tensor.
        data_offset: where they start in the file.
        shard: index of the shard it lies in.
    """

    name: str
    ggml_shape: tuple[int, ...]
    format: TensorType
    n_bytes: int
    data_offset: int
    shard: int
    _file: ParsedFile
    _choice: DialectChoice

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in NumPy's order, slowest axis first."""
        return self.ggml_shape[::-1]

    @property
    def type_id(self) -> int:
        """The ggml type id."""
        return self.format.type_id

    @property
    def n_values(self) -> int:
        """The number of values."""
        return math.prod(self.ggml_shape)

    @property
    def n_rows(self) -> int:
        """The number of rows, all leading axes together."""
        return self.n_values // self.ggml_shape[0]

    @property
    def raw(self) -> np.ndarray:
        """The stored bytes as a read-only view: (..., row_bytes), or flat for Unknown types."""
        data = np.frombuffer(self._file.map, np.uint8, self.n_bytes, self.data_offset)
        return data if isinstance(self.format, Unknown) else data.reshape(*self.shape[:-1], -1)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the stored bytes of rows [start, stop), a view (rows, row_bytes)."""
        return self.raw.reshape(self.n_rows, -1)[start:stop]

    def dequantize_rows(self, start: int, stop: int, *, threads: int | None = None) -> np.ndarray:
        """Dequantise rows [start, stop) to float32 (rows, n); see `dequantize`."""
        if isinstance(self.format, Unknown):
            raise undecodable(self.format, self.name, self._choice)
        return dequantize_rows(self.rows(start, stop), self.format, threads=threads)

    def dequantize(self, *, threads: int | None = None) -> np.ndarray:
        """Dequantise to float32 of `shape`; f32 tensors come back as a read-only view.

        Raises:
            AmbiguousTypeError: several dialects fit the type id; open the file with `dialect=`.
            InputError: nothing is known of the type.
            BackendError: gguf-py cannot decode it.
        """
        return self.dequantize_rows(0, self.n_rows, threads=threads).reshape(self.shape)

    def release(self, start: int, stop: int) -> None:
        """Let the kernel drop the cached pages of rows [start, stop); they stay readable."""
        width = self.n_bytes // self.n_rows
        self._file.release(self.data_offset + start * width, self.data_offset + stop * width)


class GgufFile:
    """An open GGUF file, all its shards as one. Use as a context manager, or let it be collected.

    Attributes:
        path: the path that was opened.
        shard_paths: the files it consists of.
        version: GGUF version of the first shard.
        alignment: data alignment of the first shard.
        metadata: mapping from key to value; `metadata.fields` keeps the exact bytes.
        tensors: mapping from name to GgufTensor, in file order.
        dialect, dialect_reason, dialect_guessed: how fork type ids were read, and why.
    """

    def __init__(self, files: list[ParsedFile], choice: DialectChoice) -> None:
        self._files = files
        self.path = files[0].path
        self.shard_paths = tuple(file.path for file in files)
        self.version = files[0].version
        self.alignment = files[0].alignment
        self.metadata = Metadata(files[0].fields)
        self.dialect = choice.dialect
        self.dialect_reason = choice.reason
        self.dialect_guessed = choice.guessed
        self.tensors: dict[str, GgufTensor] = {}
        for shard, file in enumerate(files):
            for tensor in _tensors(file, shard, choice):
                if tensor.name in self.tensors:
                    reason = f"tensor {tensor.name!r} is in an earlier shard too"
                    raise FileFormatError(file.path, None, reason)
                self.tensors[tensor.name] = tensor

    def close(self) -> None:
        """Unmap the files, unless arrays that view them are still alive."""
        self.tensors = {}
        self.metadata = Metadata({})
        for file in self._files:
            file.fields = {}
            try:
                file.map.close()
            except BufferError:
                pass  # a view is alive; the map goes with it
        self._files = []

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GgufFile {self.path} with {len(self.tensors)} tensors>"


def open_gguf(
    path: str | os.PathLike, dialect: str | None = None, *, follow_splits: bool = True
) -> GgufFile:
    """Open a GGUF file, or all shards of a split one by its first.

    Args:
        path: the file.
        dialect: whose type ids from 42 up are meant; if omitted, the file's own `tbq.dialect`,
            else the one registered dialect whose sizes and scales fit. Tensors of ids that stay
            unexplained get the type Unknown and keep their raw bytes.
        follow_splits: whether to open the other shards of a split model too.

    Raises:
        FileFormatError: not a GGUF file of version 2 or 3; truncated, inconsistent or hostile; a
            shard is missing or belongs to another model; `dialect` does not fit.
        UnknownFormatError: `dialect` is not registered.
        OSError: the file cannot be opened.
    """
    first = parse(path)
    files = [first, *_other_shards(first)] if follow_splits else [first]
    return GgufFile(files, choose_dialect(files, dialect))


def _split_number(file: ParsedFile, key: str, default: int) -> int:
    if key not in file.fields:
        return default
    value = file.fields[key].value
    if not isinstance(value, int):
        raise FileFormatError(file.path, None, f"{key} is {value!r}, not an integer")
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
        kind = tensor_type(record.type_id, choice.dialect)
        if record.offset != expected:
            reason = f"tensor {record.name!r} is at offset {record.offset}, not at {expected}"
            raise FileFormatError(file.path, record.where, reason)
        n_bytes = _n_bytes(file, record, kind, stop)
        yield GgufTensor(
            record.name,
            record.ne,
            kind,
            n_bytes,
            file.data_start + record.offset,
            shard,
            file,
            choice,
        )
        expected = record.offset + -(-n_bytes // file.alignment) * file.alignment


def _n_bytes(file: ParsedFile, record: TensorRecord, kind: TensorType, stop: int) -> int:
    left = file.size - file.data_start - record.offset
    if isinstance(kind, Unknown):
        n_bytes = stop - record.offset
    else:
        try:
            n_bytes = row_bytes(kind, record.ne[0]) * (math.prod(record.ne) // record.ne[0])
        except InputError as error:
            reason = f"tensor {record.name!r}: {error}"
            raise FileFormatError(file.path, record.where, reason) from None
    if n_bytes > left or n_bytes <= 0:
        reason = f"tensor {record.name!r} takes {n_bytes} bytes, the file has {max(0, left)} left"
        raise FileFormatError(file.path, record.where, reason)
    return n_bytes

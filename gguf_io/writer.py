"""Writing GGUF files: streamed, atomic, metadata kept byte for byte.

The header is written here and not through gguf.GGUFWriter, because that drops empty strings and
arrays, cannot name a type id it does not know, leaves the alignment out of all shards but the
first, and writes in place. Tests read what is written here with gguf.GGUFReader.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from gguf_io.atomic import AtomicFiles
from gguf_io.dialects import DIALECT_KEY
from gguf_io.metadata import Field, Metadata, pack_string
from gguf_io.parser import MAGIC, MAX_DIMS, MAX_NAME
from gguf_io.reader import SPLIT_KEYS, GgufTensor, split_path
from gguf_io.types import FIRST_FORK_ID, TensorType, Unknown, resolve_type, row_bytes
from tbq import Format, InputError

GGUF_VERSION = 3
OWN_KEYS = (DIALECT_KEY, "tbq.source", "tbq.version")
_FLOATS = {np.dtype("<f4"): "f32", np.dtype("<f2"): "f16"}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written.

    Attributes:
        name: at most 63 bytes of UTF-8.
        shape: in NumPy's order, 1 to 4 positive axes.
        format: its type.
        n_bytes: bytes that the chunks add up to.
        chunks: called once, yields the data piece by piece.
    """

    name: str
    shape: tuple[int, ...]
    format: TensorType
    n_bytes: int
    chunks: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def from_array(cls, name: str, x: np.ndarray) -> OutputTensor:
        """Store float32 or float16 values as they are."""
        x = np.asarray(x)
        kind = _FLOATS.get(x.dtype.newbyteorder("<"))
        if kind is None:
            need = "float32 or float16; quantise other dtypes first"
            raise InputError(f"tensor {name!r}", f"dtype {x.dtype}", need)
        little = x.astype(x.dtype.newbyteorder("<"), order="C", copy=False)
        return cls(name, x.shape, resolve_type(kind), x.nbytes, lambda: [little])

    @classmethod
    def from_packed(cls, name: str, packed: np.ndarray, fmt: Format) -> OutputTensor:
        """Store what `tbq.quantize` returned."""
        shape = (*packed.shape[:-1], fmt.row_values(packed.shape[-1]))
        return cls(name, shape, fmt, packed.nbytes, lambda: [packed])

    @classmethod
    def from_tensor(cls, tensor: GgufTensor) -> OutputTensor:
        """Copy a tensor of an open file, whatever its type."""
        return cls(tensor.name, tensor.shape, tensor.format, tensor.n_bytes, lambda: [tensor.raw])


def write_gguf(
    path: str | os.PathLike,
    metadata: Mapping[str, Any],
    tensors: Iterable[OutputTensor],
    dialect: str | None = None,
) -> None:
    """Write a GGUF v3 file, atomically: the path gets the whole file or stays as it was.

    Args:
        path: the file; an existing one is replaced.
        metadata: values (see `Field.of`), Fields, or the Metadata of an open file, which is kept
            byte for byte. `general.alignment` sets the alignment. Keys of a split model are
            dropped; if registered formats are written, the keys `tbq.dialect`, `tbq.source` and
            `tbq.version` are set, otherwise dropped.
        tensors: written in this order, their chunks one at a time.
        dialect: whose type ids are written; if omitted, that of the tensors' formats.

    Raises:
        InputError: formats of several dialects, a bad name, shape, value or chunk, two tensors of
            one name, an Unknown fork type beside registered formats.
        OSError: the file cannot be written.
    """
    fields = _without_split(_fields(metadata))
    with AtomicFiles() as output:
        tensors = list(tensors)
        _write(output.create(path), _labelled(fields, tensors, dialect), tensors)


def write_gguf_shards(
    prefix: str | os.PathLike,
    metadata: Mapping[str, Any],
    shards: Sequence[Sequence[OutputTensor]],
    dialect: str | None = None,
) -> None:
    """Write a split model, PREFIX-00001-of-0000N.gguf and so on: all shards or none.

    As llama.cpp does it, the first shard holds all metadata; the others hold the split keys, and
    here also what is needed to read them, the alignment and the dialect. See `write_gguf`.
    """
    fields = _without_split(_fields(metadata))
    everything = [tensor for shard in shards for tensor in shard]
    labelled = _labelled(fields, everything, dialect)
    needed = {key: labelled[key] for key in ("general.alignment", *OWN_KEYS) if key in labelled}
    with AtomicFiles() as output:
        for no, shard in enumerate(shards):
            numbers = (no, len(shards), len(everything))
            types = (GGUFValueType.UINT16, GGUFValueType.UINT16, GGUFValueType.INT32)
            split = {
                key: Field.of(number, kind)
                for key, number, kind in zip(SPLIT_KEYS, numbers, types, strict=True)
            }
            file = output.create(split_path(prefix, no, len(shards)))
            _write(file, (labelled if no == 0 else needed) | split, list(shard))


def file_dialect(types: Iterable[TensorType]) -> str | None:
    """Return the one dialect of the registered formats among `types`, None if there are none.

    Raises:
        InputError: there are several, or an Unknown fork type beside one; their ids would collide.
    """
    types = list(types)
    found = sorted({kind.dialect for kind in types if isinstance(kind, Format)})
    if len(found) > 1:
        got = f"formats of the dialects {', '.join(found)}"
        raise InputError("tensors", got, "one dialect per file, because type ids collide")
    foreign = [k for k in types if isinstance(k, Unknown) and k.type_id >= FIRST_FORK_ID]
    if found and foreign:
        got = f"{foreign[0].name} beside formats of {found[0]}"
        raise InputError("tensors", got, "type ids that all belong to one dialect")
    return found[0] if found else None


def _fields(metadata: Mapping[str, Any]) -> dict[str, Field]:
    items = metadata.fields if isinstance(metadata, Metadata) else metadata
    return {k: v if isinstance(v, Field) else Field.of(v) for k, v in items.items()}


def _without_split(fields: dict[str, Field]) -> dict[str, Field]:
    return {key: value for key, value in fields.items() if key not in SPLIT_KEYS}


def _labelled(
    fields: dict[str, Field], tensors: list[OutputTensor], dialect: str | None
) -> dict[str, Field]:
    """Make the file say which dialect its type ids belong to."""
    found = file_dialect(tensor.format for tensor in tensors)
    if dialect is not None and found not in (None, dialect):
        raise InputError("dialect", dialect, f"{found}, the dialect of the tensors' formats")
    fields = dict(fields)
    if found is not None:
        sources = dict.fromkeys(t.format.source for t in tensors if isinstance(t.format, Format))
        values = (found, "; ".join(sources), _package_version())
        return fields | {k: Field.of(v) for k, v in zip(OWN_KEYS, values, strict=True)}
    if not any(tensor.format.type_id >= FIRST_FORK_ID for tensor in tensors):
        for key in OWN_KEYS:
            fields.pop(key, None)
    return fields


def _package_version() -> str:
    try:
        return version("tbq-reference")
    except PackageNotFoundError:
        return "uninstalled"


def _write(file: BinaryIO, fields: dict[str, Field], tensors: list[OutputTensor]) -> None:
    alignment = _alignment(fields)
    file.write(_header(fields, tensors, alignment))
    file.write(bytes(-file.tell() % alignment))
    for tensor in tensors:
        written = 0
        for chunk in tensor.chunks():
            data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
            file.write(data.data)
            written += data.size
        if written != tensor.n_bytes:
            need = f"the {tensor.n_bytes} bytes of its type and shape"
            raise InputError(f"tensor {tensor.name!r}", f"{written} bytes", need)
        file.write(bytes(-written % alignment))


def _alignment(fields: dict[str, Field]) -> int:
    given = fields.get("general.alignment")
    value = GGUF_DEFAULT_ALIGNMENT if given is None else given.value
    if not isinstance(value, int) or value < 8 or value & (value - 1):
        raise InputError("general.alignment", repr(value), "a power of two, at least 8")
    if given is not None and given.type is not GGUFValueType.UINT32:
        fields["general.alignment"] = Field.of(value, GGUFValueType.UINT32)
    return value


def _header(fields: dict[str, Field], tensors: list[OutputTensor], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(fields))]
    for key, value in fields.items():
        parts += [pack_string(key), bytes(value.raw)]
    offset = 0
    names = set()
    for tensor in tensors:
        _check(tensor, names)
        names.add(tensor.name)
        ne = tensor.shape[::-1]
        parts += [
            pack_string(tensor.name),
            struct.pack(f"<I{len(ne)}Q", len(ne), *ne),
            struct.pack("<IQ", tensor.format.type_id, offset),
        ]
        offset += -(-tensor.n_bytes // alignment) * alignment
    return b"".join(parts)


def _check(tensor: OutputTensor, names: set[str]) -> None:
    where = f"tensor {tensor.name!r}"
    if tensor.name in names:
        raise InputError(where, "the name twice", "distinct names")
    n_bytes = len(tensor.name.encode("utf-8", errors="surrogateescape"))
    if n_bytes > MAX_NAME or "\0" in tensor.name or ".." in tensor.name.split("/"):
        need = f"a name of at most {MAX_NAME} bytes, without NUL or parent-directory steps"
        raise InputError(where, f"a name of {n_bytes} bytes", need)
    if not 1 <= len(tensor.shape) <= MAX_DIMS or min(tensor.shape) < 1:
        raise InputError(where, f"shape {tensor.shape}", f"1 to {MAX_DIMS} positive axes")
    if isinstance(tensor.format, Unknown):
        return
    need = row_bytes(tensor.format, tensor.shape[-1]) * math.prod(tensor.shape[:-1])
    if need != tensor.n_bytes:
        got = f"{tensor.n_bytes} bytes"
        raise InputError(where, got, f"{need} bytes for {tensor.format.name} {tensor.shape}")

"""Writing GGUF files: streamed, atomic, metadata kept byte for byte.

The header is written here and not through gguf.GGUFWriter, because that drops empty strings and
arrays, cannot name a type id it does not know, leaves the alignment out of all shards but the
first, and writes in place. Tests read what is written here with gguf.GGUFReader.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

import tbq
from gguf_io.atomic import AtomicFiles
from gguf_io.identify import DIALECT_KEY, RELEASE_KEY, known_dialect
from gguf_io.metadata import Field, Metadata, brief, pack_string
from gguf_io.parser import MAGIC, MAX_DIMS, MAX_NAME
from gguf_io.reader import PIECE_BYTES, SET_KEY, SPLIT_KEYS, GgufTensor, split_path
from gguf_io.types import TensorType, Unknown, resolve_type, row_bytes
from tbq import Format, InputError
from tbq.format import GGML
from tbq.registry import get_dialect, split_dialect, type_id, undisputed

GGUF_VERSION = 3
_FIXED_BYTES = 24  # magic, version and two counts, before the first field
OWN_KEYS = (DIALECT_KEY, RELEASE_KEY, "tbq.source", "tbq.version")
_FLOATS = {np.dtype("<f4"): "f32", np.dtype("<f2"): "f16"}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written.

    Attributes:
        name: at most 63 bytes of UTF-8.
        shape: in NumPy's order, up to 4 axes; none for a scalar.
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
        return cls(tensor.name, tensor.shape, tensor.format, tensor.n_bytes, tensor.pieces)


@dataclass(frozen=True)
class Slot:
    """Where in a file the data of a tensor start."""

    tensor: OutputTensor
    at: int


# Writes the data of all tensors of a file, whose header and final size it has already.
Fill = Callable[[BinaryIO, Sequence[Slot]], None]


def write_chunks(file: BinaryIO, slots: Sequence[Slot]) -> None:
    """Write the chunks of one tensor after the other.

    Raises:
        InputError: the chunks of a tensor are not as long together as it says.
        OSError: the file cannot be written.
    """
    for slot in slots:
        tensor, written = slot.tensor, 0
        file.seek(slot.at)
        for chunk in tensor.chunks():
            data = as_bytes(chunk)
            file.write(data)
            written += data.nbytes
        if written != tensor.n_bytes:
            need = f"the {tensor.n_bytes} bytes of its type and shape"
            raise InputError(f"tensor {tensor.name!r}", f"{written} bytes", need)


def as_bytes(data: np.ndarray) -> memoryview:
    """Return the bytes of an array of any shape and layout, as files take them."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[OutputTensor],
    dialect: str | None = None,
    approve: Callable[[], None] = lambda: None,
    fill: Fill = write_chunks,
) -> None:
    """Write a GGUF v3 file, atomically: the path gets the whole file or stays as it was.

    Args:
        path: the file; an existing one is replaced.
        metadata: values (see `Field.of`), Fields, or the Metadata of an open file, which is kept
            byte for byte. `general.alignment` sets the alignment. Keys of a split model are
            dropped; if a fork's formats are written, the keys `tbq.dialect`, `tbq.release`,
            `tbq.source` and `tbq.version` are set, otherwise dropped.
        tensors: written in this order, their chunks one at a time.
        dialect: whose type ids are written, `dialect` or `dialect@release`; if omitted, those of
            the tensors' formats, by the newest release that has them all.
        approve: called when all is written and nothing has appeared yet; what it raises undoes all.
        fill: what writes the data of the tensors of a file.

    Raises:
        UnknownFormatError: `dialect` is not registered.
        InputError: formats of several dialects, or that no one release has; an Unknown type beside
            a fork's; a bad name, shape, value or chunk; two tensors of one name.
        OSError: the file cannot be written.
    """
    fields = _without_split(_fields(metadata))
    with AtomicFiles() as output:
        tensors = list(tensors)
        place = file_dialect((tensor.format for tensor in tensors), dialect)
        labelled = _labelled(fields, tensors, place)
        _write(output.create(path), labelled, tensors, place, fill)
        approve()


def write_gguf_shards(
    prefix: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    shards: Sequence[Sequence[OutputTensor]],
    dialect: str | None = None,
    approve: Callable[[], None] = lambda: None,
    fill: Fill = write_chunks,
) -> None:
    """Write a split model, PREFIX-00001-of-0000N.gguf and so on: all shards or none.

    As llama.cpp does it, the first shard holds all metadata; the others hold the split keys, and
    here also what is needed to read them, the alignment and the dialect, and the checksum of the
    set, by which shards of two sets are told apart. See `write_gguf`.
    """
    fields = _without_split(_fields(metadata))
    everything = [tensor for shard in shards for tensor in shard]
    place = file_dialect((tensor.format for tensor in everything), dialect)
    labelled = _labelled(fields, everything, place)
    needed = {key: labelled[key] for key in ("general.alignment", *OWN_KEYS) if key in labelled}
    files: list[tuple[BinaryIO, int]] = []
    with AtomicFiles() as output:
        for no, shard in enumerate(shards):
            numbers = (no, len(shards), len(everything))
            types = (GGUFValueType.UINT16, GGUFValueType.UINT16, GGUFValueType.INT32)
            split = {
                key: Field.of(number, kind)
                for key, number, kind in zip(SPLIT_KEYS, numbers, types, strict=True)
            }
            split[SET_KEY] = Field.of(0, GGUFValueType.UINT32)
            file = output.create(split_path(prefix, no, len(shards)))
            own = (labelled if no == 0 else needed) | split
            _write(file, own, list(shard), place, fill)
            files.append((file, _place_of_value(own, SET_KEY)))
        _stamp(files)
        approve()


def _stamp(files: Sequence[tuple[BinaryIO, int]]) -> None:
    """Write the checksum of all files where each has room for it, still 0."""
    crc = 0
    for file, _ in files:
        file.seek(0)
        while piece := file.read(PIECE_BYTES):
            crc = zlib.crc32(piece, crc)
    for file, place in files:
        file.seek(place)
        file.write(struct.pack("<I", crc))


def _place_of_value(fields: dict[str, Field], key: str) -> int:
    """Return where in the file the value of a scalar field stands."""
    before = itertools.takewhile(lambda item: item[0] != key, fields.items())
    at = _FIXED_BYTES + sum(len(pack_string(k)) + len(value.raw) for k, value in before)
    return at + len(pack_string(key)) + 4  # the type word


Place = tuple[str, str] | None  # the dialect and release whose ids are written


def file_dialect(types: Iterable[TensorType], given: str | None = None) -> Place:
    """Return the dialect and the release in which all of `types` have an id.

    None if ids that mean the same everywhere do and nothing else is asked for.

    Raises:
        InputError: there are types of several dialects, or an Unknown type beside one, whose ids
            would collide; or no release has them all.
        UnknownFormatError: `given` is not registered.
    """
    types = list(dict.fromkeys(types))
    found = sorted({kind.dialect for kind in types if isinstance(kind, Format)} - {GGML})
    if len(found) > 1:
        got = f"formats of the dialects {', '.join(found)}"
        raise InputError("tensors", got, "one dialect per file, because type ids collide")
    foreign = [kind for kind in types if isinstance(kind, Unknown)]
    if found and foreign:
        got = f"{foreign[0].name} beside formats of {found[0]}"
        raise InputError("tensors", got, "type ids that all belong to one dialect")
    name, release = (found[0] if found else GGML), None
    if given is not None:
        dialect, release = split_dialect(given)
        if found and found[0] != dialect.name:
            need = f"{found[0]}, the dialect of the tensors' formats"
            raise InputError("dialect", known_dialect(given), need)
        name = dialect.name
    if name == GGML and not any(_needs_dialect(kind) for kind in types):
        return None
    return name, _release(name, release, types)


def _needs_dialect(kind: TensorType) -> bool:
    """Tell whether a type is known, and its id means something else elsewhere."""
    if isinstance(kind, Unknown):
        return False
    return not kind.is_ggml or undisputed(type_id(kind)) is not kind


def _release(name: str, release: str | None, types: list[TensorType]) -> str:
    """Return the newest release of a dialect, or the given one, that has ids for all types."""
    known = [kind for kind in types if isinstance(kind, Format)]
    dialect = get_dialect(name)
    wanted = dialect.releases if release is None else (dialect.release(release),)
    failure: InputError | None = None
    for candidate in wanted:
        try:
            for kind in known:
                type_id(kind, name, candidate.name)
        except InputError as error:
            failure = failure or error
        else:
            return candidate.name
    raise failure or InputError("dialect", name, "one with releases")


def _fields(metadata: Mapping[str, Any]) -> dict[str, Field]:
    items = metadata.fields if isinstance(metadata, Metadata) else metadata
    return {k: v if isinstance(v, Field) else Field.of(v) for k, v in items.items()}


def _without_split(fields: dict[str, Field]) -> dict[str, Field]:
    return {k: value for k, value in fields.items() if k not in (*SPLIT_KEYS, SET_KEY)}


def _labelled(
    fields: dict[str, Field], tensors: list[OutputTensor], place: Place
) -> dict[str, Field]:
    """Make the file say which dialect and release its type ids belong to."""
    fields = dict(fields)
    kinds = [t.format for t in tensors if isinstance(t.format, Format)]
    own = [kind for kind in kinds if _needs_dialect(kind)]
    if own:
        sources = "; ".join(dict.fromkeys(kind.source for kind in own))
        values = (*(place or ()), sources, tbq.__version__)
        return fields | {k: Field.of(v) for k, v in zip(OWN_KEYS, values, strict=True)}
    if not any(isinstance(tensor.format, Unknown) for tensor in tensors):
        for key in OWN_KEYS:
            fields.pop(key, None)
    return fields


def _write(
    file: BinaryIO,
    fields: dict[str, Field],
    tensors: list[OutputTensor],
    place: Place,
    fill: Fill,
) -> None:
    alignment = _alignment(fields)
    file.write(_header(fields, tensors, alignment, place))
    slots, end = [], _padded(file.tell(), alignment)
    for tensor in tensors:
        slots.append(Slot(tensor, end))
        end = _padded(end + tensor.n_bytes, alignment)
    file.truncate(end)
    fill(file, slots)


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _alignment(fields: dict[str, Field]) -> int:
    given = fields.get("general.alignment")
    value = Metadata(fields).number("general.alignment") if given else GGUF_DEFAULT_ALIGNMENT
    if value is None or not 8 <= value < 1 << 32 or value & (value - 1):
        got = brief(fields["general.alignment"].value)
        raise InputError("general.alignment", got, "a power of two, at least 8, below 2^32")
    if given is not None and given.type is not GGUFValueType.UINT32:
        fields["general.alignment"] = Field.of(value, GGUFValueType.UINT32)
    return value


def _header(
    fields: dict[str, Field], tensors: list[OutputTensor], alignment: int, place: Place
) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(fields))]
    for key, value in fields.items():
        parts += [pack_string(key), bytes(value.raw)]
    offset = 0
    names: set[str] = set()
    for tensor in tensors:
        _check(tensor, names)
        names.add(tensor.name)
        ne = tensor.shape[::-1]
        parts += [
            pack_string(tensor.name),
            struct.pack(f"<I{len(ne)}Q", len(ne), *ne),
            struct.pack("<IQ", _id(tensor.format, place), offset),
        ]
        offset += _padded(tensor.n_bytes, alignment)
    return b"".join(parts)


def _id(kind: TensorType, place: Place) -> int:
    if isinstance(kind, Unknown):
        return kind.type_id
    return type_id(kind, *(place or (GGML, None)))


def _check(tensor: OutputTensor, names: set[str]) -> None:
    where = f"tensor {tensor.name!r}"
    if tensor.name in names:
        raise InputError(where, "the name twice", "distinct names")
    n_bytes = len(tensor.name.encode("utf-8", errors="surrogateescape"))
    if n_bytes > MAX_NAME or "\0" in tensor.name or ".." in tensor.name.split("/"):
        need = f"a name of at most {MAX_NAME} bytes, without NUL or parent-directory steps"
        raise InputError(where, f"a name of {n_bytes} bytes", need)
    if len(tensor.shape) > MAX_DIMS or min(tensor.shape, default=0) < 0:
        raise InputError(where, f"shape {tensor.shape}", f"up to {MAX_DIMS} axes, none negative")
    if isinstance(tensor.format, Unknown):
        return
    room = 0
    if 0 not in tensor.shape:
        row_values = tensor.shape[-1] if tensor.shape else 1
        room = row_bytes(tensor.format, row_values) * math.prod(tensor.shape[:-1])
    if room != tensor.n_bytes:
        got = f"{tensor.n_bytes} bytes"
        raise InputError(where, got, f"{room} bytes for {tensor.format.name} {tensor.shape}")

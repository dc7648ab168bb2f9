"""Converting whole files: what every tensor becomes, writing it, reading it back to compare."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFValueType

import tbq
from gguf_io.cache_tensor import CacheTensor
from gguf_io.metadata import Field
from gguf_io.reader import GgufFile, GgufTensor
from gguf_io.state import StateFile
from gguf_io.state_writer import Conversion, Plan
from gguf_io.type_policy import Options, choose_types, file_type
from gguf_io.types import TensorType, Unknown, overflowed, row_bytes
from gguf_io.writer import OutputTensor, file_dialect, write_gguf, write_gguf_shards
from tbq import Format, ValueOverflowError
from tbq.api import index_step
from tbq.quality import Distortion
from tbq.registry import writers

# Float32 values that are held at a time.
CHUNK_VALUES = 1 << 21
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION

Done = Callable[["Outcome"], None]
Advance = Callable[[int], None]


def _ignore(*_: object) -> None:
    """Do nothing: the default for who wants to know how far the work is."""


@dataclass
class Outcome:
    """What becomes of one tensor, and what was found when it was read back.

    Attributes:
        tensor: the source.
        type: what is written.
        converts: whether the bytes change.
        n_bytes: bytes that are written.
        note: what the user should know about it.
        fallback: whether another type was taken because the blocks do not divide the rows.
        nonfinite: values that are NaN or infinite in the source.
        overflowed: finite values that come back as NaN or infinite.
        distortion: of what was read back, for tensors that were converted.
        identical: whether what was read back is the same, for those that were not.
    """

    tensor: GgufTensor | CacheTensor
    type: TensorType
    converts: bool
    n_bytes: int
    note: str = ""
    fallback: bool = False
    nonfinite: int = 0
    overflowed: int = 0
    distortion: Distortion | None = None
    identical: bool | None = None

    @property
    def repacks(self) -> bool:
        """Whether the codes and scales stay, in other blocks."""
        return self.converts and _repacks(self.tensor, self.type)

    @property
    def failed(self) -> bool:
        """Whether the tensor read back is not what it should be."""
        if self.identical is not None:
            return not self.identical
        d = self.distortion
        if d is None:
            return False
        overflowed = d.nonfinite_decoded > d.nonfinite_original + self.overflowed
        return overflowed or d.relative_mse > 1


# --- models --------------------------------------------------------------------------------------


def plan_model(
    file: GgufFile, options: Options, order: Iterable[GgufTensor] | None = None
) -> list[Outcome]:
    """Decide what every tensor becomes, as llama-quantize would, in llama-quantize's order.

    Raises:
        InputError, BackendError: as `gguf_io.type_policy.choose_types`; or the types have no ids
            in one dialect.
    """
    outcomes = []
    for choice in choose_types(
        file, options, llama_quantize_order(file) if order is None else order
    ):
        t, size = choice.tensor, choice.tensor.n_bytes
        if choice.converts:
            size = row_bytes(choice.type, t.row_values) * t.n_rows
        outcomes.append(
            Outcome(t, choice.type, choice.converts, size, choice.note, choice.fallback)
        )
    file_dialect((outcome.type for outcome in outcomes), options.to)
    return outcomes


def llama_quantize_order(file: GgufFile) -> list[GgufTensor]:
    """Return the tensors as llama-quantize writes them: by layer and name."""

    def layer_and_name(tensor: GgufTensor) -> tuple[int, bytes]:
        layer = re.match(r"blk\.(\d+)", tensor.name)
        name = tensor.name.encode("utf-8", errors="surrogateescape")
        return int(layer[1]) if layer else -1, name

    return sorted(file.tensors.values(), key=layer_and_name)


def model_metadata(
    file: GgufFile,
    target: TensorType | None,
    changes: Mapping[str, Field] | None = None,
    mixture: str = "",
) -> dict[str, Any]:
    """Copy a file's metadata and set what llama-quantize sets, where it sets it: at the end.

    Without a target the file type stays what it was. `changes` are set last.
    """
    fields = dict(file.metadata.fields)
    version = Field.of(QUANTIZATION_VERSION, GGUFValueType.UINT32)
    kept = fields.pop("general.file_type", None)
    number = file_type(target, mixture) if target is not None else None
    stated = Field.of(number, GGUFValueType.UINT32) if number is not None else None
    fields.pop("general.quantization_version", None)
    fields["general.quantization_version"] = version
    if target is None:
        stated = kept
    if stated is not None:
        fields["general.file_type"] = stated
    return fields | dict(changes or {})


def write_model(
    file: GgufFile,
    outcomes: Sequence[Outcome],
    outputs: Sequence[Path],
    target: TensorType | None,
    *,
    mixture: str = "",
    metadata: Mapping[str, Field] | None = None,
    dialect: str | None = None,
    keep_split: bool = False,
    allow_overflow: bool = False,
    threads: int | None = None,
    done: Done = _ignore,
    advance: Advance = _ignore,
) -> None:
    """Write a model as planned, atomically.

    Args:
        file: the open source.
        outcomes: what `plan_model` returned.
        outputs: the file, or with `keep_split` the shards, as many as the source has.
        target: the type that the file is said to be mostly of; None: what the source says.
        mixture: which of the target's mixtures it is said to be, see `type_policy.Options`.
        metadata: fields to set, whatever the source has.
        dialect: whose type ids are written; if omitted, the newest release's of the formats.
        keep_split: whether tensors stay in the shards that they are in.
        allow_overflow: write finite values that come back as infinite or NaN.
        threads: worker threads of the codecs.
        done: called with every tensor that has been written.
        advance: called with the number of source bytes that have been read.

    Raises:
        ValueOverflowError: finite values would come back as infinite or NaN.
        FileFormatError: the source changed while it was read.
        OSError: a file cannot be written.
    """

    def approve() -> None:
        file.check_unchanged()
        refuse_overflow(outcomes, allow_overflow)

    fields = model_metadata(file, target, metadata, mixture)
    tensors = [_output_tensor(outcome, threads, done, advance) for outcome in outcomes]
    if not keep_split:
        write_gguf(outputs[0], fields, tensors, dialect, approve=approve)
        return
    shards: list[list[OutputTensor]] = [[] for _ in outputs]
    for outcome, tensor in zip(outcomes, tensors, strict=True):
        shards[outcome.tensor.shard].append(tensor)
    prefix = str(outputs[0]).removesuffix(f"-00001-of-{len(outputs):05d}.gguf")
    write_gguf_shards(prefix, fields, shards, dialect, approve=approve)


def refuse_overflow(outcomes: Iterable[Outcome], allowed: bool) -> None:
    """Raise ValueOverflowError if finite values would come back as infinite or NaN."""
    counts = {o.tensor.name: o.overflowed for o in outcomes if o.overflowed}
    if counts and not allowed:
        raise ValueOverflowError(counts)


def _output_tensor(
    outcome: Outcome, threads: int | None, done: Done, advance: Advance
) -> OutputTensor:
    tensor = outcome.tensor

    def chunks() -> Iterator[np.ndarray]:
        if outcome.converts:
            for piece in tensor_pieces(outcome):
                yield _converted(outcome, piece, threads)
                advance(piece.n_bytes(tensor))
        else:
            for data in tensor.pieces():
                yield data
                advance(data.nbytes)
        done(outcome)

    return OutputTensor(tensor.name, tensor.shape, outcome.type, outcome.n_bytes, chunks)


class Piece(NamedTuple):
    """Values of a tensor: whole rows, or a part of one."""

    rows: slice
    values: slice

    def n_bytes(self, tensor: GgufTensor) -> int:
        """Return about how many bytes of its tensor it is."""
        n = (self.rows.stop - self.rows.start) * (self.values.stop - self.values.start)
        return tensor.n_bytes * n // tensor.n_values


def tensor_pieces(outcome: Outcome) -> Iterator[Piece]:
    """Yield what is converted at a time: rows, or parts of rows that are too wide to be held."""
    tensor, codec = outcome.tensor, outcome.type.codec
    n = tensor.row_values
    source = tensor.format.codec
    whole = (
        outcome.repacks or codec.position == "row" or codec.layout.header or source.layout.header
    )
    step = max(1, CHUNK_VALUES // n)
    group = math.lcm(codec.group_values, source.group_values)
    part = n if whole or n <= CHUNK_VALUES else max(1, CHUNK_VALUES // group) * group
    for start in range(0, tensor.n_rows, step):
        for first in range(0, n, part):
            last = min(first + part, n)
            yield Piece(slice(start, min(start + step, tensor.n_rows)), slice(first, last))


def _repacks(tensor: GgufTensor | CacheTensor, kind: TensorType) -> bool:
    known = isinstance(tensor.format, Format) and isinstance(kind, Format)
    return known and tensor.format != kind and tbq.repackable(tensor.format, kind)


def _converted(outcome: Outcome, piece: Piece, threads: int | None) -> np.ndarray:
    if _repacks(outcome.tensor, outcome.type):
        rows = outcome.tensor.rows(piece.rows.start, piece.rows.stop)
        return tbq.repack(rows, outcome.tensor.format, outcome.type)
    x = outcome.tensor.dequantize_piece(piece.rows, piece.values, threads=threads)
    outcome.nonfinite += x.size - int(np.isfinite(x).sum())
    first = piece.rows.start * index_step(outcome.type, outcome.tensor.ggml_shape[0])
    first += piece.values.start // outcome.type.group_values
    position = first if index_step(outcome.type, x.shape[-1]) else 0
    writer = _writer(outcome.type)
    packed = tbq.quantize(x, writer, first_block=position, threads=threads)
    outcome.overflowed += overflowed(x, packed, outcome.type)
    return packed


def _writer(kind: TensorType) -> TensorType:
    """Return llama-quantize's own writer of a type where ggml has two."""
    found = writers(kind) if kind.is_ggml else []
    return next((fmt for fmt in found if fmt.dialect.startswith("llama-quantize")), kind)


def verify_model(
    outcomes: Sequence[Outcome],
    written: GgufFile,
    *,
    threads: int | None = None,
    advance: Advance = _ignore,
) -> None:
    """Compare every tensor of a written model with its source, and keep what is found."""
    for outcome in outcomes:
        source, copy = outcome.tensor, written.tensors[outcome.tensor.name]
        if outcome.converts:
            outcome.distortion = Distortion()
            for piece in tensor_pieces(outcome):
                x, y = (t.dequantize_piece(*piece, threads=threads) for t in (source, copy))
                outcome.distortion.add(x, y)
                advance(piece.n_bytes(source))
            continue
        outcome.identical, at = True, 0
        for data in source.pieces():
            outcome.identical &= np.array_equal(data, copy.read(at, data.size))
            at += data.size
            advance(data.size)


# --- dumps ---------------------------------------------------------------------------------------


def state_outcomes(plan: Plan) -> list[Outcome]:
    """Return what becomes of each tensor of a dump that has bytes."""
    return [
        Outcome(c.tensor, c.format, c.converts, c.n_bytes, _note(c))
        for c in plan.conversions.values()
        if c.tensor.n_bytes
    ]


def _note(c: Conversion) -> str:
    before, after = c.tensor.stored_head, c.stored_head
    if before != after:
        return f"heads of {c.tensor.head_dim} values take {after} in a row, not {before}"
    if c.converts and c.format == c.tensor.format:
        kind = c.rotation.kind if c.rotation else "none"
        return f"type {c.format.name} stays, its rotation becomes {kind}"
    return ""


def verify_state(
    outcomes: Sequence[Outcome],
    written: StateFile,
    *,
    threads: int | None = None,
    advance: Advance = _ignore,
) -> None:
    """Compare every tensor of a written dump with its source, and keep what is found."""
    for outcome in outcomes:
        source, copy = outcome.tensor, written.tensors[outcome.tensor.name]
        unknown = isinstance(source.format, Unknown)
        wide = 0 if unknown else max(source.n_embd, copy.n_embd)
        step = max(1, CHUNK_VALUES // (wide or source.row_bytes))
        distortion, outcome.identical = Distortion(), True
        for start in range(0, source.n_cells, step):
            stop = min(start + step, source.n_cells)
            if outcome.converts:
                x, y = (t.values(start, stop, threads=threads) for t in (source, copy))
                distortion.add(x, y)
            else:
                same = np.array_equal(source.rows(start, stop), copy.rows(start, stop))
                outcome.identical &= same
            advance((stop - start) * source.row_bytes)
        if outcome.converts:
            outcome.identical, outcome.distortion = None, distortion
            outcome.nonfinite = distortion.nonfinite_original

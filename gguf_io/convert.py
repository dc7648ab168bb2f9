"""Converting whole files: what every tensor becomes, writing it, reading it back to compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from gguf import GGUFValueType

from gguf_io.cache_tensor import CacheTensor
from gguf_io.distributed import filler
from gguf_io.metadata import Field
from gguf_io.reader import GgufFile, GgufTensor
from gguf_io.state import StateFile
from gguf_io.state_writer import Conversion, Plan
from gguf_io.steps import CHUNK_VALUES, Step, carry_out, repacks, tensor_steps
from gguf_io.type_policy import Options, choose_types, file_type
from gguf_io.types import TensorType, dequantize_rows, row_bytes
from gguf_io.writer import OutputTensor, file_dialect, write_chunks, write_gguf, write_gguf_shards
from tbq import Format, ValueOverflowError
from tbq.quality import Distortion

if TYPE_CHECKING:
    from distributed import Client

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION

Source = TypeVar("Source", bound=GgufTensor | CacheTensor)
Done = Callable[["Outcome[GgufTensor]"], None]
Advance = Callable[[int], None]


def _ignore(*_: object) -> None:
    """Do nothing: the default for who wants to know how far the work is."""


@dataclass
class Outcome(Generic[Source]):
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

    tensor: Source
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
        return self.converts and repacks(self.tensor.format, self.type)

    def steps(self: Outcome[GgufTensor]) -> Iterator[Step]:
        """Yield the steps that write a model's tensor."""
        return tensor_steps(self.tensor, self.type, self.converts)

    def count(self, nonfinite: int, overflowed: int) -> None:
        """Add what a step found."""
        self.nonfinite += nonfinite
        self.overflowed += overflowed

    def compared(self, distortion: Distortion, identical: bool) -> None:
        """Keep what was found when it was read back: of what was converted, or of what was not."""
        self.distortion = distortion if self.converts else None
        self.identical = None if self.converts else identical

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
) -> list[Outcome[GgufTensor]]:
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
    target: Format | None,
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
    outcomes: Sequence[Outcome[GgufTensor]],
    outputs: Sequence[Path],
    target: Format | None,
    *,
    mixture: str = "",
    metadata: Mapping[str, Field] | None = None,
    dialect: str | None = None,
    keep_split: bool = False,
    allow_overflow: bool = False,
    threads: int | None = None,
    client: Client | None = None,
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
        client: whose workers do it, one thread each, see `gguf_io.distributed.connected`; if
            omitted, this process does.
        done: called with every tensor that has been written.
        advance: called with the number of source bytes that have been read.

    Raises:
        ValueOverflowError: finite values would come back as infinite or NaN.
        FileFormatError: the source changed while it was read.
        BackendError: a worker cannot do it, or none is left.
        OSError: a file cannot be written.
    """

    def approve() -> None:
        file.check_unchanged()
        refuse_overflow(outcomes, allow_overflow)

    fields = model_metadata(file, target, metadata, mixture)
    tensors = [_output_tensor(outcome, threads, done, advance) for outcome in outcomes]
    fill = write_chunks if client is None else filler(client, outcomes, done, advance)
    if not keep_split:
        write_gguf(outputs[0], fields, tensors, dialect, approve=approve, fill=fill)
        return
    shards: list[list[OutputTensor]] = [[] for _ in outputs]
    for outcome, tensor in zip(outcomes, tensors, strict=True):
        shards[outcome.tensor.shard].append(tensor)
    prefix = str(outputs[0]).removesuffix(f"-00001-of-{len(outputs):05d}.gguf")
    write_gguf_shards(prefix, fields, shards, dialect, approve=approve, fill=fill)


def refuse_overflow(outcomes: Iterable[Outcome[Source]], allowed: bool) -> None:
    """Raise ValueOverflowError if finite values would come back as infinite or NaN."""
    counts = {o.tensor.name: o.overflowed for o in outcomes if o.overflowed}
    if counts and not allowed:
        raise ValueOverflowError(counts)


def _output_tensor(
    outcome: Outcome[GgufTensor], threads: int | None, done: Done, advance: Advance
) -> OutputTensor:
    tensor = outcome.tensor

    def chunks() -> Iterator[np.ndarray]:
        for step in outcome.steps():
            yield _converted(outcome, step, threads)
            advance(step.n_bytes)
        done(outcome)

    return OutputTensor(tensor.name, tensor.shape, outcome.type, outcome.n_bytes, chunks)


def _converted(outcome: Outcome[GgufTensor], step: Step, threads: int | None) -> np.ndarray:
    found = carry_out(step, outcome.tensor.read(step.start, step.n_bytes), threads)
    outcome.count(found.nonfinite, found.overflowed)
    return found.data


def verify_model(
    outcomes: Sequence[Outcome[GgufTensor]],
    written: GgufFile,
    *,
    threads: int | None = None,
    advance: Advance = _ignore,
) -> None:
    """Compare every tensor of a written model with its source, and keep what is found."""
    for outcome in outcomes:
        source, copy = outcome.tensor, written.tensors[outcome.tensor.name]
        distortion, identical = Distortion(), True
        for step in outcome.steps():
            before = source.read(step.start, step.n_bytes)
            after = copy.read(step.at, step.n_written)
            if outcome.converts:
                x, y = (
                    dequantize_rows(data.reshape(step.n_rows, -1), kind, threads=threads)
                    for data, kind in ((before, source.format), (after, copy.format))
                )
                distortion.add(x, y)
            else:
                identical &= np.array_equal(before, after)
            advance(step.n_bytes)
        outcome.compared(distortion, identical)


# --- dumps ---------------------------------------------------------------------------------------


def state_outcomes(plan: Plan) -> list[Outcome[CacheTensor]]:
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
    outcomes: Sequence[Outcome[CacheTensor]],
    written: StateFile,
    *,
    threads: int | None = None,
    advance: Advance = _ignore,
) -> None:
    """Compare every tensor of a written dump with its source, and keep what is found."""
    for outcome in outcomes:
        source, copy = outcome.tensor, written.tensors[outcome.tensor.name]
        wide = max(source.n_embd or 0, copy.n_embd or 0)
        step = max(1, CHUNK_VALUES // (wide or source.row_bytes))
        distortion, identical = Distortion(), True
        for start in range(0, source.n_cells, step):
            stop = min(start + step, source.n_cells)
            if outcome.converts:
                x, y = (t.values(start, stop, threads=threads) for t in (source, copy))
                distortion.add(x, y)
            else:
                identical &= np.array_equal(source.rows(start, stop), copy.rows(start, stop))
            advance((stop - start) * source.row_bytes)
        outcome.compared(distortion, identical)
        if outcome.converts:
            outcome.nonfinite = distortion.nonfinite_original

"""What of a tensor is written at a time: which bytes are read, what they become, where they go.

A step needs nothing of another one. Whoever carries them out, in whatever order, however often and
however a tensor is cut into them, the same bytes come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import tbq
from gguf_io.reader import GgufTensor
from gguf_io.types import TensorType, Unknown, dequantize_rows, known, overflowed
from tbq import Format
from tbq.api import index_step
from tbq.registry import writers

# Float32 values that are held at a time.
CHUNK_VALUES = 1 << 21
# Bytes that are copied at a time.
COPY_BYTES = 1 << 23


class Piece(NamedTuple):
    """Values of a tensor: whole rows, or a part of one."""

    rows: range
    values: range


@dataclass(frozen=True)
class Step:
    """One piece of work on a tensor.

    Attributes:
        start, n_bytes: which of the tensor's stored bytes are read.
        at, n_written: where among the bytes that are written for the tensor the result goes.
        n_rows: of how many rows, or parts of rows, the bytes are.
        source, target: the types before and after; None where the bytes stay as they are.
        first_block: what `tbq.quantize` has to know of where they stand in the tensor.
    """

    start: int
    n_bytes: int
    at: int
    n_written: int
    n_rows: int = 0
    source: Format | None = None
    target: Format | None = None
    first_block: int = 0

    @property
    def memory(self) -> int:
        """Bytes that carrying it out holds at most: what is read, floats twice, the result."""
        if self.source is None:
            return self.n_bytes
        n = self.n_rows * self.source.row_values(self.n_bytes // self.n_rows)
        return self.n_bytes + 2 * 4 * n + self.n_written


class Converted(NamedTuple):
    """What a step made.

    Attributes:
        data: uint8, any shape.
        nonfinite: values that are NaN or infinite in the source.
        overflowed: finite values that come back as NaN or infinite.
    """

    data: np.ndarray
    nonfinite: int = 0
    overflowed: int = 0


def tensor_steps(tensor: GgufTensor, target: TensorType, converts: bool) -> Iterator[Step]:
    """Yield the steps that write a tensor as `target`; without `converts`, those that copy it."""
    if converts:
        kind = known(target)
        for piece in tensor_pieces(tensor, kind):
            yield conversion_step(tensor, kind, piece)
        return
    for start in range(0, tensor.n_bytes, COPY_BYTES):
        n_bytes = min(COPY_BYTES, tensor.n_bytes - start)
        yield Step(start, n_bytes, start, n_bytes)


def tensor_pieces(tensor: GgufTensor, target: Format) -> Iterator[Piece]:
    """Yield what is converted at a time: rows, or parts of rows that are too wide to be held."""
    n, codec, source = tensor.row_values, target.codec, known(tensor.format).codec
    headed = codec.layout.header_bytes or source.layout.header_bytes
    whole = headed or codec.position == "row" or repacks(tensor.format, target)
    step = max(1, CHUNK_VALUES // n)
    group = math.lcm(codec.group_values, source.group_values)
    part = n if whole or n <= CHUNK_VALUES else max(1, CHUNK_VALUES // group) * group
    for start in range(0, tensor.n_rows, step):
        for first in range(0, n, part):
            rows = range(start, min(start + step, tensor.n_rows))
            yield Piece(rows, range(first, min(first + part, n)))


def conversion_step(tensor: GgufTensor, target: Format, piece: Piece) -> Step:
    """Return the step that converts a piece: whole rows, or groups of blocks of a single row."""
    (rows, values), n, source = piece, tensor.row_values, known(tensor.format)
    start, n_bytes = _extent(source, n, piece)
    at, n_written = _extent(target, n, piece)
    block = 0
    if index_step(target, len(values)):
        block = rows.start * index_step(target, n) + values.start // target.group_values
    return Step(start, n_bytes, at, n_written, len(rows), source, target, block)


def _extent(kind: Format, n: int, piece: Piece) -> tuple[int, int]:
    """Return where the bytes of a piece of rows of n values start, and how many they are."""
    rows, values = piece
    before = kind.row_bytes(values.start) if values.start else 0
    return rows.start * kind.row_bytes(n) + before, len(rows) * kind.row_bytes(len(values))


def carry_out(step: Step, data: np.ndarray, threads: int | None = None) -> Converted:
    """Return what the bytes that a step reads, uint8 (n_bytes,), become."""
    if step.source is None or step.target is None:
        return Converted(data)
    rows = data.reshape(step.n_rows, -1)
    if repacks(step.source, step.target):
        return Converted(tbq.repack(rows, step.source, step.target))
    x = dequantize_rows(rows, step.source, threads=threads)
    writer = _writer(step.target)
    packed = tbq.quantize(x, writer, first_block=step.first_block, threads=threads)
    nonfinite = x.size - int(np.isfinite(x).sum())
    return Converted(packed, nonfinite, overflowed(x, packed, step.target))


def repacks(source: TensorType, target: TensorType) -> bool:
    """Tell whether codes and scales stay when one type becomes another, in other blocks."""
    if isinstance(source, Unknown) or isinstance(target, Unknown):
        return False
    return source != target and tbq.repackable(source, target)


def _writer(kind: Format) -> Format:
    """Return llama-quantize's own writer of a type where ggml has two."""
    found = writers(kind) if kind.is_ggml else []
    return next((fmt for fmt in found if fmt.dialect.startswith("llama-quantize")), kind)
